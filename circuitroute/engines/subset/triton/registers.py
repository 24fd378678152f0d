"""A row in the registers of a few neighbouring lanes: marginals, log Z, count posterior, sample; and their gradient.

Legend: T tokens (rows), N variables, K the largest count, J = K + 1; 2^LE slots of a lane, G = 2^LG lanes of a row, BT
rows of a program; tensors are [BT, G]. Per row and count, lane g works on the counts g, g + G, ...

Float32 decides what it can. Rows where a coefficient that matters is lost (marked as ``fallback``), or where rounding
could decide the sample, are appended to the list ``todo``, their number to ``length``. The host never looks: a kernel
of :mod:`~circuitroute.engines.subset.triton.memory` works the list off.

With EXACT only the count K is allowed, whatever the potential says of others. Then one coefficient of the root matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from circuitroute.engines.subset.triton import SIZES, tree
from circuitroute.engines.subset.triton.coins import INFINITY, coin, exact, from_exact, log_normaliser
from circuitroute.engines.subset.triton.root import allowed_range, dual_weigh, dual_weigh_one, weigh, weigh_one
from circuitroute.engines.subset.triton.sampling import draw
from circuitroute.engines.subset.triton.shift import evidence, solve_coins

# ---------------------------------------------------------------------------------------------- loads and stores


@triton.jit
def _place(tokens, LE: tl.constexpr, LG: tl.constexpr, BT: tl.constexpr, N: tl.constexpr):
    """(token, row, g, inside, lane, leaves): the program's rows, [BT] and [BT, 1], and lanes; where their nodes lie."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    row = token[:, None].to(tl.int64)
    g = tl.arange(0, 1 << LG)[None, :]
    inside = (row < tokens) & (g < 1 << LG)
    lane = tree.lane_nodes(g, inside, LE, LG, N)
    index, there = tree.slots(lane, 0, LE, N)
    start = (row * N)[:, :, None]
    return token, row, g, inside, lane, (start, tl.permute(index, (1, 2, 0)), tl.permute(there, (1, 2, 0)))


@triton.jit
def _slot_pointers(POINTER, leaves):
    """Where the leaves lie, [rows, lanes, slots].

    The program's number in the second dimension is 0, but the compiler does not know, so that nothing is known of what
    the addresses divide by. Else a lane would load its neighbours' leaves with its own, and everything be exchanged.
    """
    return POINTER + tl.program_id(1) + leaves[0] + leaves[1]


@triton.jit
def _load_slots(POINTER, leaves, other):
    """The left and the right leaves of each lane, as float32."""
    x = tl.load(_slot_pointers(POINTER, leaves), mask=leaves[2], other=other)
    return tree.split(tl.permute(x, (2, 0, 1)).to(tl.float32))


@triton.jit
def _store_slots(POINTER, leaves, x):
    """What belongs to the leaves, [slots, rows, lanes]."""
    tl.store(_slot_pointers(POINTER, leaves), tl.permute(x, (1, 2, 0)), mask=leaves[2])


@triton.jit
def _load_counts(POINTER, start, g, inside, other, J: tl.constexpr, G: tl.constexpr):
    """Per-count values of a row, [*, J], dealt out to its lanes: a tuple of chunks of G counts."""
    out = ()
    for first in tl.static_range(0, J if J > 1 else 2, G):
        out = out + (tl.load(POINTER + start + first + g, mask=inside & (first + g < J), other=other),)
    return out


@triton.jit
def _load_potential(
    rows, row, potential_stride, tokens, g, inside, J: tl.constexpr, G: tl.constexpr, ONLY: tl.constexpr
):
    """A row's potential as chunks; with ONLY, a tuple of that of this count, [BT, 1]."""
    if ONLY:
        return (tl.load(rows.potential + row * potential_stride + ONLY, mask=row < tokens, other=-INFINITY),)
    else:
        return _load_counts(rows.potential, row * potential_stride, g, inside, -INFINITY, J, G)


@triton.jit
def _store_counts(POINTER, chunks, row, g, inside, J: tl.constexpr, G: tl.constexpr):
    for c in tl.static_range(len(chunks)):
        tl.store(POINTER + row * J + c * G + g, chunks[c], mask=inside & (c * G + g < J))


@triton.jit
def _deal(coefficients, g, G: tl.constexpr):
    """Coefficients that all lanes hold, as chunks."""
    out = ()
    for first in tl.static_range(0, len(coefficients), G):
        out = out + (_pick(coefficients, first, g, G),)
    return out


@triton.jit
def _pick(coefficients, first: tl.constexpr, g, G: tl.constexpr):
    chosen = tl.zeros_like(coefficients[0])
    for i in tl.static_range(G):
        if first + i < len(coefficients):
            chosen = tl.where(g == i, coefficients[first + i], chosen)
    return chosen


@triton.jit
def _collect(chunks, g, LENGTH: tl.constexpr, G: tl.constexpr):
    """Chunks, as coefficients that all lanes hold."""
    out = ()
    for j in tl.static_range(LENGTH):
        source = tl.zeros_like(chunks[0]).to(tl.int32) + j % G
        out = out + (tl.gather(chunks[j // G], source, axis=1),)
    return out


@triton.jit
def _one_count(g, value, ONLY: tl.constexpr, J: tl.constexpr, G: tl.constexpr):
    """``value`` at the count ONLY and 0 at others, as chunks."""
    out = ()
    for first in tl.static_range(0, J, G):
        out = out + (tl.where(first + g == ONLY, value, 0.0),)
    return out


@triton.jit
def _weigh(root, phi, g, shift, known, J: tl.constexpr, G: tl.constexpr, ONLY: tl.constexpr, FAST: tl.constexpr):
    """(adjoint, posterior, log total, underflow) of a root; its coefficients and adjoint as all lanes hold them."""
    if ONLY:
        one, log_root, underflow = weigh_one(root[0], phi[0], shift, known, ONLY)
        return (one,), _one_count(g, 1.0, ONLY, J, G), log_root, underflow
    else:
        weights, posterior, log_root, underflow = weigh(_deal(root, g, G), phi, g, shift, known, G, FAST)
        return _collect(weights, g, len(root), G), posterior, log_root, underflow


@triton.jit
def _dual_weigh(root, posterior, v, g, J: tl.constexpr, G: tl.constexpr, ONLY: tl.constexpr):
    """(adjoint and its tangent, the posterior's tangent) of a DUAL root, likewise."""
    if ONLY:
        return dual_weigh_one(root[0], root[1]), _one_count(g, 0.0, ONLY, J, G)
    else:
        half: tl.constexpr = len(root) // 2
        coefficients, tangents = _deal(root[:half], g, G), _deal(root[half:], g, G)
        adjoint, d_adjoint, d_posterior = dual_weigh(coefficients, tangents, posterior, v)
        return _collect(adjoint, g, half, G) + _collect(d_adjoint, g, half, G), d_posterior


@triton.jit
def _append(swept, flagged, token):
    """Put the flagged rows of a program on the list."""
    many = tl.sum(flagged, axis=0)
    if many > 0:
        first = tl.atomic_add(swept.length, many)
        tl.store(swept.todo + first + tl.cumsum(flagged, axis=0) - flagged, token, mask=flagged > 0)


# ---------------------------------------------------------------------------------------------- leaves


@triton.jit
def _dual_coin(x, u, shift, FAST: tl.constexpr):
    """A coin and its tangent (-w, w) along u; see :meth:`..torch.sweep._Block.derivative`. Evidence does not move."""
    absent, present = coin(x, shift, FAST)
    w = tl.where(tl.abs(x) < INFINITY, absent * present * u, 0.0)
    return absent, present, -w, w


@triton.jit
def _marginal(adjoint, leaf):
    """A variable's marginal. Rounding may go an ulp beyond 1; what is forced, or cannot be told from it, is certain.

    The leaf tells, so that logits need not be kept until here.
    """
    return tl.where(leaf[0] == 0.0, 1.0, tl.minimum(adjoint[1] * leaf[1], 1.0))


@triton.jit
def _dual_marginal(adjoint, leaf):
    """Its derivative."""
    return adjoint[3] * leaf[1] + adjoint[1] * leaf[3]


# ---------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=SIZES)
def forward(
    rows,
    swept,
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
    """One sweep: the moments, where ``swept`` has room for them, and a sample of each row's key, where there are keys.

    ``rows`` is an :class:`~..engine.Rows`, ``swept`` a :class:`~..engine.Swept`; rows' potentials are
    ``potential_stride`` apart, 0 where all rows share one.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1  # with count 0 alone, a count of 1 that is not allowed
    G: tl.constexpr = 1 << LG
    token, row, g, inside, lane, leaves = _place(tokens, LE, LG, BT, N)
    there = token < tokens
    x = _load_slots(rows.logits, leaves, -INFINITY)
    ONLY: tl.constexpr = K if EXACT else 0
    phi = _load_potential(rows, row, potential_stride, tokens, g, inside, J, G, ONLY)

    known = evidence(x)
    shift, coins = solve_coins(x, known, None if EXACT else allowed_range(phi, g, G), FAST, ONLY)
    exact_shift = exact(shift)
    left, right = coins
    normaliser = log_normaliser(x, shift, FAST, coins)  # here rather than at the end, where registers are short
    within, across = tree.up(left, right, g, LE, LG, K, False, ONLY)
    adjoint, posterior, log_root, underflow = _weigh(across[LG], phi, g, exact_shift, known, J, G, ONLY, FAST)

    lost = tl.reshape(tl.where(underflow, 1, 0), [BT])
    flagged = lost
    if swept.mask is not None:
        key = tl.load(rows.key + token, mask=there, other=0)[:, None]
        chosen, doubt = draw(within, across, adjoint, key, lane, g, N, LE, LG, ONLY)
        _store_slots(swept.mask, leaves, chosen)
        flagged = flagged | tl.max(tl.where(doubt, 1, 0), axis=1)
    if swept.marginals is not None:
        a, b = tree.down(within, across, adjoint, g, LE, LG, False, ONLY)
        marginals = tree.join(_marginal(a, left), _marginal(b, right))
        _store_slots(swept.marginals, leaves, marginals)
        _store_counts(swept.count_probs, posterior, row, g, inside, J, G)
        log_partition = log_root + normaliser
        tl.store(swept.log_partition + token, tl.reshape(log_partition, [BT]).to(tl.float32), mask=there)
        tl.store(swept.log_root + token, tl.reshape(log_root, [BT]), mask=there)
    tl.store(swept.shift + token, tl.reshape(exact_shift, [BT]), mask=there)
    tl.store(swept.fallback + token, lost > 0, mask=there)
    _append(swept, tl.where(there, flagged, 0), token)


@triton.jit(do_not_specialize=SIZES)
def backward(
    rows,
    swept,
    slopes,
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
    """The derivative of (marginals, posterior) along (u, v): the sweep again, on dual numbers.

    ``slopes`` is an :class:`~..engine.Slopes`. The derivation stands at
    :meth:`..torch.sweep._Block.derivative`.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    G: tl.constexpr = 1 << LG
    token, row, g, inside, _, leaves = _place(tokens, LE, LG, BT, N)
    x = _load_slots(rows.logits, leaves, -INFINITY)
    u = _load_slots(slopes.u, leaves, 0.0)

    shift = from_exact(tl.load(swept.shift + token, mask=token < tokens, other=0.0)[:, None])
    left, right = _dual_coin(x[0], u[0], shift, FAST), _dual_coin(x[1], u[1], shift, FAST)
    ONLY: tl.constexpr = K if EXACT else 0
    within, across = tree.up(left, right, g, LE, LG, K, True, ONLY)
    posterior = _load_counts(swept.count_probs, row * J, g, inside, 0.0, J, G)
    v = _load_counts(slopes.v, row * J, g, inside, 0.0, J, G) if slopes.v is not None else ()
    adjoint, d_posterior = _dual_weigh(across[LG], posterior, v, g, J, G, ONLY)
    _store_counts(slopes.count_probs, d_posterior, row, g, inside, J, G)

    a, b = tree.down(within, across, adjoint, g, LE, LG, True, ONLY)
    d_marginals = tree.join(_dual_marginal(a, left), _dual_marginal(b, right))
    _store_slots(slopes.marginals, leaves, d_marginals)
