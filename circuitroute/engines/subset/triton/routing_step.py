"""One routing step, for kernels: a row in the registers of a few neighbouring lanes, from logits to weights and back.

Legend: T tokens (rows), N variables, K the largest count, J = K + 1, S = max(1, K) slots; 2^LE slots of a lane,
G = 2^LG lanes of a row, BT rows of a program; tensors are [BT, G], or [2^LE, BT, G]. What a step is stands in
:mod:`circuitroute.engines.step`.

The sweep is that of :mod:`.registers`. Rows that float32 cannot decide are listed, :mod:`.memory` sweeps them again,
and :func:`settle` weighs them anew, one row per program. Rows with NaN, or that nothing satisfies, are settled here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from circuitroute.engines.subset.triton import SIZES, registers, tree
from circuitroute.engines.subset.triton.coins import (
    INFINITY,
    along,
    coin,
    exact,
    from_exact,
    log_coins,
    log_normaliser,
    row_sum,
)
from circuitroute.engines.subset.triton.decision import (
    in_order,
    index_of,
    is_sampled,
    keys_of,
    logit_of,
    mode,
    row_any,
    row_count,
)
from circuitroute.engines.subset.triton.root import SMALLEST_COEFFICIENT, allowed_range, is_possible
from circuitroute.engines.subset.triton.sampling import draw
from circuitroute.engines.subset.triton.shift import evidence, solve_coins
from circuitroute.engines.subset.triton.weights import direct_slopes, log_literals, scale, slopes_of, weights_of

# ---------------------------------------------------------------------------------------------- rows in lanes


@triton.jit
def _whole(pair):
    """The left and the right leaves of each lane together, in the order in which leaves lie."""
    return tree.join(pair[0], pair[1])


@triton.jit
def _numbers(lane, LE: tl.constexpr, N: tl.constexpr):
    """The variable of each slot, int32, -1 where there is none; held as logits are."""
    index, there = tree.slots(lane, 0, LE, N)
    return tl.where(there, index, -1)


@triton.jit
def _slot_numbers(g, S: tl.constexpr, LG: tl.constexpr, BT: tl.constexpr):
    """Which of a row's S slots each lane holds, int64: g, g + G, ..., as many as a power of two."""
    G: tl.constexpr = 1 << LG
    bits: tl.constexpr = 0 if S <= G else 1 if S <= 2 * G else 2 if S <= 4 * G else 3 if S <= 8 * G else 4
    first = tl.arange(0, 1 << bits)[:, None, None].to(tl.int64) * G
    return tl.zeros([1 << bits, BT, G], tl.int64) + first + g[None, :, :]


@triton.jit
def _tempered(pair, rows, row, inside):
    """Logits over the row's temperature; no NaN."""
    left, right = _cleaned(pair[0]), _cleaned(pair[1])
    if rows.temperature is not None:
        t = tl.load(rows.temperature + row, mask=inside, other=1.0).to(tl.float32)
        left, right = tl.div_rn(left, _wide(t, left)), tl.div_rn(right, _wide(t, right))
    return left, right


@triton.jit
def _cleaned(x):
    return tl.where(x != x, 0.0, x)


@triton.jit
def _wide(row, x):
    """What belongs to a row at every slot: exact division takes no broadcast."""
    return along(row, x) + tl.zeros_like(x)


@triton.jit
def _invalid(x, phi, G: tl.constexpr):
    """[BT, 1] bool, rows with NaN."""
    bad = row_any(x != x)
    for c in tl.static_range(len(phi)):
        bad = bad | row_any(phi[c] != phi[c])
    return bad


@triton.jit
def _satisfiable(phi, known, g, G: tl.constexpr, ONLY: tl.constexpr):
    """[BT, 1] bool, whether evidence and potential leave a subset."""
    forced, undecided, _, _ = known
    if ONLY:
        return is_possible(phi[0], known, ONLY)
    some = tl.zeros_like(phi[0])
    for c in tl.static_range(len(phi)):
        count = (c * G + g).to(tl.float32)
        some += tl.where((phi[c] > -INFINITY) & (count >= forced) & (count <= forced + undecided), 1.0, 0.0)
    return row_sum(some) > 0.0


@triton.jit
def _at_count(chunks, count, g, G: tl.constexpr):
    """[BT, 1], what chunks hold at the row's count."""
    found = tl.zeros_like(chunks[0])
    for c in tl.static_range(len(chunks)):
        found += tl.where(c * G + g == count, chunks[c], 0.0)
    return row_sum(found)


@triton.jit
def _reveal(chunks, invalid):
    """The same chunks, NaN in invalid rows."""
    out = ()
    for c in tl.static_range(len(chunks)):
        out = out + (tl.where(invalid, float("nan"), chunks[c]),)
    return out


# ---------------------------------------------------------------------------------------------- forward


@triton.jit
def _put_slots(
    rows, decided, keys, known, MARGINALS, row, slot, count, there, S: tl.constexpr, N: tl.constexpr, J: tl.constexpr,
    COMBINE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store a row's slots: the variables of these keys, of which the first ``count`` are chosen, and their weights."""
    index, used, at = index_of(keys), slot < along(count, slot), along(row, slot) * S + slot
    inside = along(there, slot) & (slot < S)
    if COMBINE == "marginal":
        weight = tl.load(MARGINALS + along(row, slot) * N + index, mask=inside & used, other=0.0)
    else:
        weight = weights_of(logit_of(keys), known, COMBINE, FAST)
    tl.store(decided.indices + at, index, mask=inside)
    tl.store(decided.weights + at, tl.where(used, weight, 0.0), mask=inside)


@triton.jit(do_not_specialize=(*SIZES, "below"))
def step_forward(
    rows,
    swept,
    decided,
    below,
    tokens,
    potential_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    LE: tl.constexpr,
    LG: tl.constexpr,
    BT: tl.constexpr,
    COMBINE: tl.constexpr,
    SAMPLED: tl.constexpr,
    MOMENTS: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr = False,
):
    """Decide and weigh every row.

    ``rows`` is a :class:`~..step.Tempered`, ``swept`` a :class:`~..engine.Swept`, ``decided`` a
    :class:`~..step.Decided`. SAMPLED says who is sampled: "all" rows, "some" or "none".
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    G: tl.constexpr = 1 << LG
    token, row, g, inside, lane, leaves = registers._place(tokens, LE, LG, BT, N)
    there = token < tokens
    given = registers._load_slots(rows.logits, leaves, -INFINITY)
    ONLY: tl.constexpr = K if EXACT else 0
    phi = registers._load_potential(rows, row, potential_stride, tokens, g, inside, J, G, ONLY)
    invalid = _invalid(_whole(given), phi, G)
    number, slot = _numbers(lane, LE, N), _slot_numbers(g, K, LG, BT)
    choice = _cleaned(_whole(given))
    theta = choice
    if rows.theta is not None:
        theta = _whole(registers._load_slots(rows.theta, leaves, -INFINITY))
        invalid = invalid | row_any(theta != theta)
        theta = _cleaned(theta)

    x = _tempered(given, rows, row, inside)
    known = evidence(x)
    invalid = invalid | (_satisfiable(phi, known, g, G, ONLY) == 0)
    flagged = tl.zeros([BT], tl.int32)
    if MOMENTS:
        shift, coins = solve_coins(x, known, None if EXACT else allowed_range(phi, g, G), FAST, ONLY)
        exact_shift = exact(shift)
        left, right = coins
        within, across = tree.up(left, right, g, LE, LG, K, False, ONLY)
        adjoint, posterior, log_root, underflow = registers._weigh(
            across[LG], phi, g, exact_shift, known, J, G, ONLY, FAST
        )
        lost = tl.reshape(tl.where(underflow & (invalid == 0), 1, 0), [BT])
        flagged = lost
    if SAMPLED != "none":
        key = tl.load(rows.key + token, mask=there, other=0)[:, None]
        chosen, doubt = draw(within, across, adjoint, key, lane, g, N, LE, LG, ONLY)
        doubtful = tl.max(tl.where(doubt & (invalid == 0), 1, 0), axis=1)
    if SAMPLED != "all":
        at = tl.where(row < tokens, row, 0) * potential_stride
        best, ranked, _ = mode(keys_of(choice, number, None), rows.potential + at, slot, J, K)
        if SAMPLED == "some":
            sampled = is_sampled(key, below)
            chosen = (along(sampled, chosen) & chosen) | ((along(sampled, best) == 0) & best)
            doubtful = tl.where(tl.reshape(sampled, [BT]), doubtful, 0)
        else:
            chosen = best
    if SAMPLED != "none":
        flagged = flagged | doubtful

    chosen = chosen & (along(invalid, chosen) == 0)
    registers._store_slots(swept.mask, leaves, chosen)
    tl.store(decided.invalid + token, tl.reshape(invalid, [BT]), mask=there)
    count = row_count(chosen)
    if MOMENTS:
        log_partition = tl.where(invalid, float("nan"), log_root + log_normaliser(x, shift, FAST, coins))
        forced = known[0]
        log_prob = (
            (phi[0] if EXACT else _at_count(phi, count, g, G)).to(tl.float64)
            - log_root
            + log_literals(x, tree.split(chosen), shift, FAST, coins)
        )
        log_prob += exact_shift * (count.to(tl.float32) - forced).to(tl.float64)
        log_prob = tl.where(invalid, float("nan"), tl.minimum(log_prob, 0.0))  # rounding may go beyond
        registers._store_counts(swept.count_probs, _reveal(posterior, invalid), row, g, inside, J, G)
        tl.store(swept.log_partition + token, tl.reshape(log_partition, [BT]).to(tl.float32), mask=there)
        tl.store(decided.log_prob + token, tl.reshape(log_prob, [BT]).to(tl.float32), mask=there)
        tl.store(swept.log_root + token, tl.reshape(tl.where(invalid, float("nan"), log_root), [BT]), mask=there)
        tl.store(swept.shift + token, tl.reshape(exact_shift, [BT]), mask=there)
        tl.store(swept.fallback + token, lost > 0, mask=there)
        registers._append(swept, tl.where(there, flagged, 0), token)
    if COMBINE == "marginal":
        a, b = tree.down(within, across, adjoint, g, LE, LG, False, ONLY)
        marginals = tree.join(registers._marginal(a, left), registers._marginal(b, right))
        marginals = tl.where(along(invalid, marginals), float("nan"), marginals)
        registers._store_slots(swept.marginals, leaves, marginals)
        tl.debug_barrier()  # other lanes read them as weights
    if SAMPLED == "none" and rows.theta is None:
        keys = ranked
    else:
        keys = in_order(keys_of(theta, number, chosen), slot, K)
    base = scale(theta, chosen, N, COMBINE, FAST)
    _put_slots(rows, decided, keys, base, swept.marginals, row, slot, count, row < tokens, K, N, J, COMBINE, FAST)


@triton.jit(do_not_specialize=(*SIZES, "below"))
def settle(
    rows,
    swept,
    decided,
    below,
    tokens,
    potential_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    DEPTH: tl.constexpr,
    JP: tl.constexpr,
    COMBINE: tl.constexpr,
    SAMPLED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Weigh the listed rows, one per program, after :func:`.memory.forward` has swept them in float64."""
    S: tl.constexpr = J - 1 if J > 1 else 1
    i, slot = tl.arange(0, 1 << DEPTH if N > 1 else 2)[None, :], tl.arange(0, JP)[None, :].to(tl.int64)
    number = tl.where(i < N, i, -1)
    at, many = tl.program_id(0), tl.load(swept.length)
    while at < many:
        row = tl.zeros([1, 1], tl.int64) + tl.load(swept.todo + at)
        x, theta = _settled_row(rows, row, i, N)
        chosen = tl.load(swept.mask + row * N + i, mask=i < N, other=0) != 0
        if SAMPLED == "some":
            choice = tl.load(rows.logits + row * N + i, mask=i < N, other=-INFINITY).to(tl.float32)
            potential = rows.potential + row * potential_stride
            best, _, _ = mode(keys_of(choice, number, None), potential, slot, J, S)
            sampled = is_sampled(tl.load(rows.key + row), below)
            chosen = (sampled & chosen) | ((sampled == 0) & best)
            tl.store(swept.mask + row * N + i, chosen, mask=i < N)
        count = row_count(chosen)
        forced = row_count(x == INFINITY)
        shift = tl.load(swept.shift + row)
        absent, present, _ = log_coins(x, shift)
        log_prob = row_sum(tl.where(chosen, present, absent)) + shift * (count - forced).to(tl.float64)
        log_prob += tl.load(rows.potential + row * potential_stride + count).to(tl.float64)
        log_prob -= tl.load(swept.log_root + row)
        tl.store(decided.log_prob + row, tl.minimum(log_prob, 0.0).to(tl.float32))
        keys, base = in_order(keys_of(theta, number, chosen), slot, S), scale(theta, chosen, N, COMBINE, FAST)
        _put_slots(rows, decided, keys, base, swept.marginals, row, slot, count, row >= 0, S, N, J, COMBINE, FAST)
        at += tl.num_programs(0)


@triton.jit
def _settled_row(rows, row, i, N: tl.constexpr):
    """(tempered logits, theta) of a row without NaN."""
    x = tl.load(rows.logits + row * N + i, mask=i < N, other=-INFINITY).to(tl.float32)
    theta = x
    if rows.theta is not None:
        theta = tl.load(rows.theta + row * N + i, mask=i < N, other=-INFINITY).to(tl.float32)
    if rows.temperature is not None:
        t = tl.load(rows.temperature + row).to(tl.float32)
        x = tl.div_rn(x, t + tl.zeros_like(x))
    return x, theta


@triton.jit(do_not_specialize=SIZES)
def marginals(
    rows,
    swept,
    invalid,
    tokens,
    potential_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    LE: tl.constexpr,
    LG: tl.constexpr,
    BT: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr = False,
):
    """The marginals, around the shift and the posterior of a step; of rows that underflowed they are not right."""
    K: tl.constexpr = J - 1 if J > 1 else 1
    G: tl.constexpr = 1 << LG
    _, row, g, inside, _, leaves = registers._place(tokens, LE, LG, BT, N)
    x = _tempered(registers._load_slots(rows.logits, leaves, -INFINITY), rows, row, inside)
    there = row < tokens
    shift = from_exact(tl.load(swept.shift + row, mask=there, other=0.0))
    left, right = coin(x[0], shift, FAST), coin(x[1], shift, FAST)
    ONLY: tl.constexpr = K if EXACT else 0
    within, across = tree.up(left, right, g, LE, LG, K, False, ONLY)
    if EXACT:
        adjoint = _adjoint(across[LG], (1.0,))
    else:
        posterior = registers._load_counts(swept.count_probs, row * J, g, inside, 0.0, J, G)
        adjoint = registers._collect(_adjoint(registers._deal(across[LG], g, G), posterior), g, K + 1, G)
    a, b = tree.down(within, across, adjoint, g, LE, LG, False, ONLY)
    found = tree.join(registers._marginal(a, left), registers._marginal(b, right))
    wrong = tl.load(invalid + row, mask=there, other=0) != 0
    registers._store_slots(swept.marginals, leaves, tl.where(along(wrong, found), float("nan"), found))


@triton.jit
def _adjoint(coefficients, posterior):
    """The root's adjoint: the posterior over the coefficients."""
    out = ()
    for c in tl.static_range(len(posterior)):
        found = coefficients[c] >= SMALLEST_COEFFICIENT
        out = out + (tl.where(found, posterior[c] / tl.where(found, coefficients[c], 1.0), 0.0),)
    return out


# ---------------------------------------------------------------------------------------------- backward


@triton.jit
def _only(leaves, rows):
    """The leaves of some rows, [BT, 1] bool."""
    return leaves[0], leaves[1], leaves[2] & rows[:, :, None]


@triton.jit
def _chosen(swept, leaves):
    """The decision, as logits are held; read again rather than kept in registers."""
    return _whole(registers._load_slots(swept.mask, leaves, 0)) > 0.0


@triton.jit
def _reaching_gates(decided, upstream, row, leaves, there, number, chosen, S: tl.constexpr):
    """v: the gradient of the gates, and those of the slots at their variables; nothing comes from unused slots."""
    v = tl.zeros_like(number).to(tl.float32)
    if upstream.weights is not None:
        for s in tl.static_range(S):
            index = tl.load(decided.indices + row * S + s, mask=there, other=0).to(tl.int32)
            slope = tl.load(upstream.weights + row * S + s, mask=there, other=0.0).to(tl.float32)
            v += tl.where((number == along(index, number)) & chosen, along(slope, number), 0.0)
    if upstream.gates is not None:
        v += _whole(registers._load_slots(upstream.gates, leaves, 0.0))
    return v


@triton.jit(do_not_specialize=SIZES)
def step_backward(
    rows,
    swept,
    decided,
    upstream,
    slopes,
    tokens,
    potential_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    LE: tl.constexpr,
    LG: tl.constexpr,
    BT: tl.constexpr,
    COMBINE: tl.constexpr,
    SIMPLE: tl.constexpr,
    SWEEPS: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr = False,
):
    """The gradients of all rows; of those that underflowed, the part of theta, and u for :func:`.memory.backward`.

    ``upstream`` is an :class:`circuitroute.engines.step.Upstream`, ``slopes`` an :class:`~..engine.Slopes`. SWEEPS is
    whether anything reaches the logits of the decision.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    G: tl.constexpr = 1 << LG
    _, row, g, inside, lane, leaves = registers._place(tokens, LE, LG, BT, N)
    there = row < tokens
    given = registers._load_slots(rows.logits, leaves, -INFINITY)
    number = _numbers(lane, LE, N)
    valid = tl.load(decided.invalid + row, mask=there, other=1) == 0
    chosen = _chosen(swept, leaves)
    v = _reaching_gates(decided, upstream, row, leaves, there, number, chosen, K)
    theta = _whole(given)
    if rows.theta is not None:
        theta = _whole(registers._load_slots(rows.theta, leaves, -INFINITY))
    theta = _cleaned(theta)
    if COMBINE == "marginal":
        u = tl.where(chosen, v, 0.0)
        if SIMPLE:
            u += v * _whole(registers._load_slots(swept.marginals, leaves, 0.0))
        by_theta = tl.zeros_like(v)
    else:
        base = scale(theta, chosen, N, COMBINE, FAST)
        u, by_theta = slopes_of(theta, chosen, v, base, COMBINE, FAST)
        if not SIMPLE:
            u = tl.zeros_like(v)
        by_theta = tl.where(along(valid, theta) & (tl.abs(theta) < INFINITY), by_theta, 0.0)
    registers._store_slots(slopes.logits, leaves, by_theta)  # not kept in registers through the sweep

    if SWEEPS:
        if upstream.marginals is not None:
            u += _whole(registers._load_slots(upstream.marginals, leaves, 0.0))
        u = tl.where(along(valid, u), u, 0.0)
        x = _tempered(given, rows, row, inside)
        u_left, u_right = tree.split(u)
        shift = from_exact(tl.load(swept.shift + row, mask=there, other=0.0))
        left = registers._dual_coin(x[0], u_left, shift, FAST)
        right = registers._dual_coin(x[1], u_right, shift, FAST)
        ONLY: tl.constexpr = K if EXACT else 0
        within, across = tree.up(left, right, g, LE, LG, K, True, ONLY)
        posterior = registers._load_counts(swept.count_probs, row * J, g, inside, 0.0, J, G)
        v_q = ()
        if upstream.count_probs is not None:
            v_q = registers._load_counts(upstream.count_probs, row * J, g, inside, 0.0, J, G)
        adjoint, d_posterior = registers._dual_weigh(across[LG], posterior, v_q, g, J, G, ONLY)
        rest, score = direct_slopes(upstream, row, there)
        count = row_count(_chosen(swept, leaves))
        by_potential = _potential_slopes(d_posterior, posterior, rest, score, count, valid, g, G)
        registers._store_counts(slopes.count_probs, by_potential, row, g, inside, J, G)
        a, b = tree.down(within, across, adjoint, g, LE, LG, True, ONLY)
        moved = tree.join(registers._dual_marginal(a, left), registers._dual_marginal(b, right))
        m = tree.join(a[1] * left[1], b[1] * right[1])
        by_choice = moved + along(rest, m) * m
        if upstream.log_prob is not None:
            by_choice += tl.where(_chosen(swept, leaves), along(score, m), 0.0)
        by_choice = tl.where(along(valid, m) & (tl.abs(_whole(x)) < INFINITY), by_choice, 0.0)
        if rows.temperature is not None:
            t = tl.load(rows.temperature + row, mask=there, other=1.0).to(tl.float32)
            by_choice = by_choice / along(t, m)
        lost = tl.load(swept.fallback + row, mask=there, other=0) != 0
        registers._store_slots(slopes.u, _only(leaves, lost), u)
        if slopes.choice is not None:
            registers._store_slots(slopes.choice, leaves, by_choice)
        else:
            by_choice += _whole(registers._load_slots(slopes.logits, leaves, 0.0))
            registers._store_slots(slopes.logits, _only(leaves, lost == 0), by_choice)
    else:
        registers._store_counts(slopes.count_probs, _zeros(g, J, G, BT), row, g, inside, J, G)
        if slopes.choice is not None:
            registers._store_slots(slopes.choice, leaves, tl.zeros_like(v))


@triton.jit
def _potential_slopes(d_posterior, posterior, rest, score, count, valid, g, G: tl.constexpr):
    """H_q (u, v) + (w0 - c) q + c at the count of the decision."""
    out = ()
    for c in tl.static_range(len(posterior)):
        slope = d_posterior[c] + rest * posterior[c] + tl.where(c * G + g == count, score, 0.0)
        out = out + (tl.where(valid, slope, 0.0),)
    return out


@triton.jit
def _zeros(g, J: tl.constexpr, G: tl.constexpr, BT: tl.constexpr):
    out = ()
    for _ in tl.static_range(0, J, G):
        out = out + (tl.zeros([BT, G], tl.float32),)
    return out
