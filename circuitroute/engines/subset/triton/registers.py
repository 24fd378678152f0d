"""A row in the registers of a few neighbouring lanes: marginals, log Z, count posterior, sample; and their gradient.

Legend: T tokens (rows), N variables, K the largest count, J = K + 1; E slots of a lane, G lanes of a row, BT rows of
a program; tensors are [BT, G].

The tree is that of :mod:`..torch.tree`, node i of a level times node i + m/2, because that tree
defines the sample. Seen as a binary tree of E G slots, its lower levels lie within a lane, whose E coins are loaded
into registers, and its upper levels join lanes, each lane exchanging its polynomial with its partner's. An odd level
ends in the polynomial 1: slots below it hold no variable. Per row and count, lane g works on the counts g, g + G, ...

Float32 decides what it can. Rows where a coefficient that matters is lost (marked LOST), or where rounding could
decide the sample, are appended to the list TODO, their number to COUNT. The host never looks: a kernel of
:mod:`~circuitroute.engines.subset.triton.memory` works the list off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from circuitroute.engines.subset.triton import tree
from circuitroute.engines.subset.triton.root import SMALLEST_COEFFICIENT, allowed_range, weigh
from circuitroute.engines.subset.triton.shift import (
    INFINITY,
    coin,
    evidence,
    excess,
    mixed,
    row_sum,
    solve_shift,
    uniform,
)

MARGIN = tl.constexpr(3e-5)  # as in circuitroute.engines.subset.torch.sampling


# ---------------------------------------------------------------------------------------------- where things lie


@triton.jit
def _descend(index, valid, path, BITS: tl.constexpr, LEVEL: tl.constexpr, N: tl.constexpr):
    """Follow the low BITS bits of ``path`` down from a node of level LEVEL: (index, whether there is such a node)."""
    for bit in tl.static_range(BITS):
        index, valid = _child(index, valid, (path >> bit) & 1, LEVEL - bit, N)
    return index, valid


@triton.jit
def _child(index, valid, side, LEVEL: tl.constexpr, N: tl.constexpr):
    """The left (0) or right (1) child of a node of level LEVEL: node i, or i plus half the level below."""
    index = index + side * ((N + (1 << LEVEL) - 1) >> LEVEL)
    return index, valid & (index < ((N + (1 << (LEVEL - 1)) - 1) >> (LEVEL - 1)))


@triton.jit
def _lane_nodes(g, inside, LE: tl.constexpr, LG: tl.constexpr, N: tl.constexpr):
    """(index, whether there is one) of the node that each lane holds."""
    index, valid = _descend(g * 0, inside, g, LG, LE + LG, N)
    if (N + (2 << LE) - 1) >> (LE + 1) == (1 << LG) >> 1:
        return g, valid  # the same numbers, in a form that the compiler sees to be contiguous
    else:
        return index, valid


@triton.jit
def _slots(lane, valid, LEVEL: tl.constexpr, LE: tl.constexpr, N: tl.constexpr):
    """(index, whether there is one) of all nodes of level LEVEL within each lane, [*, G, nodes]; siblings are next."""
    path = tl.arange(0, 1 << (LE - LEVEL))[None, None, :]
    index, there = lane[:, :, None], valid[:, :, None]
    for bit in tl.static_range(LE - LEVEL):
        index, there = _child(index, there, (path >> (LE - LEVEL - 1 - bit)) & 1, LE - bit, N)
    return index, there


@triton.jit
def _load_slots(POINTER, row, lane, valid, other, LE: tl.constexpr, N: tl.constexpr):
    """The left and the right leaves of each lane, as float32.

    Slot by slot: that keeps all slots of a lane in its own registers, which the compiler then does with all that is
    computed from them. One load of all would have it deal them out over the warp, and shuffle at every step.
    """
    left, right = (), ()
    for e in tl.static_range(0, 1 << LE, 2):
        left = left + (_load_slot(POINTER, row, lane, valid, other, e, LE, N),)
        right = right + (_load_slot(POINTER, row, lane, valid, other, e + 1, LE, N),)
    return tree.stacked(left, LE - 1), tree.stacked(right, LE - 1)


@triton.jit
def _load_slot(POINTER, row, lane, valid, other, e: tl.constexpr, LE: tl.constexpr, N: tl.constexpr):
    index, there = lane, valid
    for bit in tl.static_range(LE):
        index, there = _child(index, there, (e >> (LE - 1 - bit)) & 1, LE - bit, N)
    return tl.load(POINTER + row * N + index, mask=there, other=other).to(tl.float32)


@triton.jit
def _load_counts(POINTER, row, g, inside, other, J: tl.constexpr, K: tl.constexpr, G: tl.constexpr):
    """Per-count values of a row, [*, J], dealt out to its lanes: a tuple of chunks of G counts."""
    out = ()
    for first in tl.static_range(0, K + 1, G):
        out = out + (tl.load(POINTER + row + first + g, mask=inside & (first + g < J), other=other),)
    return out


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


# ---------------------------------------------------------------------------------------------- the tree


@triton.jit
def _up_in_lane(left, right, LE: tl.constexpr, K: tl.constexpr):
    """(levels, polynomial): the levels within a lane, each as (left, right), from the leaves', and what they make."""
    levels = ((left, right),)
    product = tree.multiply(left, right, K)
    for _ in tl.static_range(LE - 1):
        left, right = tree.halves(product)
        levels = levels + ((left, right),)
        product = tree.multiply(left, right, K)
    return levels, product


@triton.jit
def _dual_up_in_lane(levels, d_left, d_right, LE: tl.constexpr, K: tl.constexpr):
    tangents = ((d_left, d_right),)
    tangent = tree.dual_multiply(levels[0][0], d_left, levels[0][1], d_right, K)
    for level in tl.static_range(1, LE):
        d_left, d_right = tree.halves(tangent)
        tangents = tangents + ((d_left, d_right),)
        tangent = tree.dual_multiply(levels[level][0], d_left, levels[level][1], d_right, K)
    return tangents, tangent


@triton.jit
def _siblings(own, g, STEP: tl.constexpr):
    """The polynomials of a lane and its partner: (left, right), the same for both, so that both multiply alike."""
    other = tree.from_lane(own, tl.zeros_like(own[0]).to(tl.int32) + (g ^ STEP))
    is_right = (g & STEP) != 0
    return tree.where(is_right, other, own), tree.where(is_right, own, other)


@triton.jit
def _up_across(own, g, LG: tl.constexpr, K: tl.constexpr):
    """What each lane holds at every level across lanes, ending in the root, which all hold."""
    held = (own,)
    for level in tl.static_range(LG):
        left, right = _siblings(held[level], g, 1 << (LG - 1 - level))
        held = held + (tree.multiply(left, right, K),)
    return held


@triton.jit
def _dual_up_across(held, tangent, g, LG: tl.constexpr, K: tl.constexpr):
    tangents = (tangent,)
    for level in tl.static_range(LG):
        left, right = _siblings(held[level], g, 1 << (LG - 1 - level))
        d_left, d_right = _siblings(tangents[level], g, 1 << (LG - 1 - level))
        tangents = tangents + (tree.dual_multiply(left, d_left, right, d_right, K),)
    return tangents


@triton.jit
def _down_across(held, adjoint, g, LG: tl.constexpr):
    """The adjoint of each lane's own polynomial from that of the root."""
    for up in tl.static_range(LG):
        own = held[LG - 1 - up]
        sibling = tree.from_lane(own, tl.zeros_like(own[0]).to(tl.int32) + (g ^ (1 << up)))
        adjoint = tree.correlate(adjoint, sibling, len(own))
    return adjoint


@triton.jit
def _dual_down_across(held, tangents, adjoint, d_adjoint, g, LG: tl.constexpr):
    for up in tl.static_range(LG):
        own, d_own = held[LG - 1 - up], tangents[LG - 1 - up]
        partner = tl.zeros_like(own[0]).to(tl.int32) + (g ^ (1 << up))
        sibling, d_sibling = tree.from_lane(own, partner), tree.from_lane(d_own, partner)
        d_adjoint = tree.dual_correlate(adjoint, d_adjoint, sibling, d_sibling, len(own))
        adjoint = tree.correlate(adjoint, sibling, len(own))
    return adjoint, d_adjoint


@triton.jit
def _down_in_lane(levels, adjoint, LE: tl.constexpr):
    """Adjoints of the left and the right leaves from that of the lane's polynomial: correlated with the sibling."""
    for up in tl.static_range(LE - 1):
        left, right = levels[LE - 1 - up]
        a, b = tree.correlate(adjoint, right, len(right)), tree.correlate(adjoint, left, len(left))
        adjoint = tree.joined(a, b)
    left, right = levels[0]
    return tree.correlate(adjoint, right, 2), tree.correlate(adjoint, left, 2)


@triton.jit
def _dual_down_in_lane(levels, tangents, adjoint, d_adjoint, LE: tl.constexpr):
    """Tangents of those adjoints, left and right."""
    for up in tl.static_range(LE - 1):
        left, right = levels[LE - 1 - up]
        d_left, d_right = tangents[LE - 1 - up]
        a = tree.dual_correlate(adjoint, d_adjoint, right, d_right, len(right))
        b = tree.dual_correlate(adjoint, d_adjoint, left, d_left, len(left))
        d_adjoint = tree.joined(a, b)
        a, b = tree.correlate(adjoint, right, len(right)), tree.correlate(adjoint, left, len(left))
        adjoint = tree.joined(a, b)
    left, right = levels[0]
    d_left, d_right = tangents[0]
    a = tree.dual_correlate(adjoint, d_adjoint, right, d_right, 2)
    b = tree.dual_correlate(adjoint, d_adjoint, left, d_left, 2)
    return a, b


# ---------------------------------------------------------------------------------------------- the sample


@triton.jit
def _draw(root, adjoint, held, levels, key, lane, g, N: tl.constexpr, LE: tl.constexpr, LG: tl.constexpr):
    """Which slots are chosen, and whether rounding could have changed it: the count, then its split down the tree."""
    K: tl.constexpr = len(root) - 1
    low, high = mixed(key)
    shares = ()
    for j in tl.static_range(K + 1):
        shares = shares + (adjoint[j] * root[j],)
    count, doubt = tree.invert(shares, uniform(low, high, g * 0, tl.float32), MARGIN)
    index, number = g * 0, g * 0 + 1
    for up in tl.static_range(LG):
        left, right = _siblings(held[LG - 1 - up], g, 1 << up)
        u = uniform(low, high, number + index, tl.float32)
        taken, near = _split(left, right, count, u, K)
        doubt = doubt | near
        side = (g >> up) & 1
        count = tl.where(side == 0, taken, count - taken)
        index, _ = _child(index, doubt, side, LE + LG - up, N)
        number += (N + (1 << (LE + LG - up)) - 1) >> (LE + LG - up)
    for up in tl.static_range(LE):
        left, right = levels[LE - 1 - up]
        u = _node_uniforms(low, high, number, lane, LE - up, LE, N)
        taken, near = _split(left, right, count, u, K)
        doubt = doubt | (near if len(near.shape) == 2 else tl.max(near.to(tl.int32), axis=2) > 0)
        count = tree.join_last(taken, count - taken)
        number += (N + (1 << (LE - up)) - 1) >> (LE - up)
    return count > 0, doubt


@triton.jit
def _node_uniforms(low, high, number, lane, LEVEL: tl.constexpr, LE: tl.constexpr, N: tl.constexpr):
    """The uniforms of a lane's nodes of level LEVEL, which are numbered from ``number`` on."""
    if LEVEL == LE:
        return uniform(low, high, number + lane, tl.float32)
    else:
        index, _ = _slots(lane, lane >= 0, LEVEL, LE, N)
        return uniform(low[:, :, None], high[:, :, None], number[:, :, None] + index, tl.float32)


@triton.jit
def _split(left, right, count, u, K: tl.constexpr):
    full: tl.constexpr = len(left) + len(right) - 2
    most: tl.constexpr = full if full < K else K
    bits: tl.constexpr = 1 if most < 2 else 2 if most < 4 else 3 if most < 8 else 4 if most < 16 else 5
    return tree.split(left, right, count, u, MARGIN, bits)


# ---------------------------------------------------------------------------------------------- kernels


@triton.jit
def append(TODO, COUNT, flagged, token):
    """Put the flagged rows of a program on the list."""
    many = tl.sum(flagged, axis=0)
    if many > 0:
        first = tl.atomic_add(COUNT, many)
        tl.store(TODO + first + tl.cumsum(flagged, axis=0) - flagged, token, mask=flagged > 0)


@triton.jit
def forward(
    X,
    PHI,
    KEY,
    MARGINALS,
    PROBS,
    LOG_PARTITION,
    LOG_ROOT,
    SHIFT,
    MASK,
    LOST,
    TODO,
    COUNT,
    tokens,
    phi_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    LE: tl.constexpr,
    LG: tl.constexpr,
    BT: tl.constexpr,
    MOMENTS: tl.constexpr,
    SAMPLE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One sweep: logits [T, N] and potential [T, J] or [J] to the moments, and to a sample of each row's key."""
    K: tl.constexpr = J - 1 if J > 1 else 1  # with count 0 alone, a count of 1 that is not allowed
    G: tl.constexpr = 1 << LG
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    row = token[:, None].to(tl.int64)
    g = tl.arange(0, G)[None, :]
    inside = (row < tokens) & (g < G)
    lane, valid = _lane_nodes(g, inside, LE, LG, N)
    index, there = _slots(lane, valid, 0, LE, N)
    at = row[:, :, None] * N + index
    x = _load_slots(X, row, lane, valid, -INFINITY, LE, N)
    phi = _load_counts(PHI, row * phi_stride, g, inside, -INFINITY, J, K, G)

    least, most, tilt = allowed_range(phi, g, J, G)
    forced, undecided, top, bottom = evidence(x)
    high, low = solve_shift(x, forced, undecided, top, bottom, least, most, tilt, FAST)
    shift = high.to(tl.float64) + low.to(tl.float64)
    left, right = coin(x[0], high, low, FAST), coin(x[1], high, low, FAST)
    levels, product = _up_in_lane(left, right, LE, K)
    held = _up_across(product, g, LG, K)
    root = held[LG]
    weights, posterior, log_root, underflow = weigh(_deal(root, g, G), phi, g, shift, forced, undecided, G, FAST)
    adjoint = _collect(weights, g, K + 1, G)

    lost = tl.reshape(tl.where(underflow, 1, 0), [BT])
    flagged = lost
    if SAMPLE:
        key = tl.load(KEY + token, mask=token < tokens, other=0)[:, None]
        chosen, doubt = _draw(root, adjoint, held, levels, key, lane, g, N, LE, LG)
        tl.store(MASK + at, chosen.to(tl.int8), mask=there)
        flagged = flagged | tl.max(tl.where(doubt, 1, 0), axis=1)
    if MOMENTS:
        a, b = _down_in_lane(levels, _down_across(held, adjoint, g, LG), LE)
        # Rounding may go an ulp beyond 1; what is forced is certain.
        m = tl.where(x[0] == INFINITY, 1.0, tl.minimum(a[1] * left[1], 1.0))
        other = tl.where(x[1] == INFINITY, 1.0, tl.minimum(b[1] * right[1], 1.0))
        tl.store(MARGINALS + at, tree.join_last(m, other), mask=there)
        _store_counts(PROBS, posterior, row, g, inside, J, G)
        log_partition = log_root + excess(x, high, low, FAST)
        tl.store(LOG_PARTITION + token, tl.reshape(log_partition, [BT]).to(tl.float32), mask=token < tokens)
        tl.store(LOG_ROOT + token, tl.reshape(log_root, [BT]), mask=token < tokens)
    tl.store(SHIFT + token, tl.reshape(shift, [BT]), mask=token < tokens)
    tl.store(LOST + token, lost.to(tl.int8), mask=token < tokens)
    append(TODO, COUNT, tl.where(token < tokens, flagged, 0), token)


@triton.jit
def backward(
    X,
    PROBS,
    SHIFT,
    U,
    V,
    D_MARGINALS,
    D_PROBS,
    tokens,
    N: tl.constexpr,
    J: tl.constexpr,
    LE: tl.constexpr,
    LG: tl.constexpr,
    BT: tl.constexpr,
    HAS_V: tl.constexpr,
    FAST: tl.constexpr,
):
    """The derivative of (marginals, posterior) along (u, v): the sweep again, on dual numbers.

    The derivation stands at :func:`..torch.engine._second_derivative_block`. The root's adjoint
    is the posterior that the forward sweep left, over the coefficients.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    G: tl.constexpr = 1 << LG
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    row = token[:, None].to(tl.int64)
    g = tl.arange(0, G)[None, :]
    inside = (row < tokens) & (g < G)
    lane, valid = _lane_nodes(g, inside, LE, LG, N)
    index, there = _slots(lane, valid, 0, LE, N)
    at = row[:, :, None] * N + index
    x = _load_slots(X, row, lane, valid, -INFINITY, LE, N)
    u = _load_slots(U, row, lane, valid, 0.0, LE, N)
    shift = tl.load(SHIFT + token, mask=token < tokens, other=0.0)[:, None]
    high = shift.to(tl.float32)
    low = (shift - high.to(tl.float64)).to(tl.float32)

    left, right = coin(x[0], high, low, FAST), coin(x[1], high, low, FAST)
    moved_left = tl.where(tl.abs(x[0]) < INFINITY, left[1] * u[0], 0.0)
    moved_right = tl.where(tl.abs(x[1]) < INFINITY, right[1] * u[1], 0.0)
    zero = tl.zeros_like(moved_left)
    levels, product = _up_in_lane(left, right, LE, K)
    tangents, tangent = _dual_up_in_lane(levels, (zero, moved_left), (zero, moved_right), LE, K)
    held = _up_across(product, g, LG, K)
    d_held = _dual_up_across(held, tangent, g, LG, K)

    coefficients, d_coefficients = _deal(held[LG], g, G), _deal(d_held[LG], g, G)
    posterior = _load_counts(PROBS, row * J, g, inside, 0.0, J, K, G)
    adjoint, gain = (), ()
    mean = tl.zeros_like(coefficients[0])
    for c in tl.static_range(len(posterior)):
        found = coefficients[c] >= SMALLEST_COEFFICIENT
        weight = tl.where(found, posterior[c] / coefficients[c], 0.0)
        gain = gain + (weight * d_coefficients[c],)
        adjoint = adjoint + (weight,)
        mean += gain[c]
    v = ()
    if HAS_V:
        v = _load_counts(V, row * J, g, inside, 0.0, J, K, G)
    else:
        v = posterior
    for c in tl.static_range(len(posterior)):
        if HAS_V:
            mean += posterior[c] * v[c]
    mean = row_sum(mean)
    d_adjoint, d_posterior = (), ()
    for c in tl.static_range(len(posterior)):
        slope = v[c] - mean if HAS_V else tl.zeros_like(mean) - mean
        d_adjoint = d_adjoint + (adjoint[c] * slope,)
        d_posterior = d_posterior + (gain[c] + posterior[c] * slope,)
    _store_counts(D_PROBS, d_posterior, row, g, inside, J, G)

    a, da = _collect(adjoint, g, K + 1, G), _collect(d_adjoint, g, K + 1, G)
    a, da = _dual_down_across(held, d_held, a, da, g, LG)
    da_left, da_right = _dual_down_in_lane(levels, tangents, a, da, LE)
    a_left, a_right = _down_in_lane(levels, a, LE)
    d_left = da_left[1] * left[1] + a_left[1] * moved_left
    d_right = da_right[1] * right[1] + a_right[1] * moved_right
    tl.store(D_MARGINALS + at, tree.join_last(d_left, d_right), mask=there)
