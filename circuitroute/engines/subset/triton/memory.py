"""One row per program, its tree in memory: any number of variables and counts, in logarithms where it must be.

Legend: T tokens (rows), N variables, K the largest count, J = K + 1; m nodes at a level, d their degree; BLOCK
results are worked out at a time.

The same tree as :mod:`..torch.tree`; level l is [d + 1, even(m)] in scratch memory. LOG works as
the naive engine does, in float64 with logsumexp for + and + for *, which no row's range defeats, and takes the rows of
a list that another kernel left. Otherwise + and * are float32's, for counts too large for
:mod:`~circuitroute.engines.subset.triton.registers`, and rows in need of LOG are put on the list.

Tangents are kept as slopes, of the logarithm: the slope of a product is the sum of its factors', that of a sum the
mean of its terms' by weight. So one loop serves values and slopes, up and down.
"""

from __future__ import annotations

import triton
import triton.language as tl

from circuitroute.engines.subset.triton.registers import MARGIN
from circuitroute.engines.subset.triton.root import SMALLEST_COEFFICIENT, allowed_range, weigh
from circuitroute.engines.subset.triton.shift import (
    INFINITY,
    coin,
    evidence,
    excess,
    mixed,
    solve_shift,
    uniform,
)

LOG_ZERO = tl.constexpr(-1e300)  # as in circuitroute.engines.logspace


# ---------------------------------------------------------------------------------------------- levels


@triton.jit
def _level(level, N: tl.constexpr, K: tl.constexpr):
    """(slots, degree) of a level: a root stands alone, other levels are padded to pairs."""
    nodes = (N + (1 << level) - 1) >> level
    slots = tl.where(nodes > 1, nodes + (nodes & 1), 1)
    return slots, tl.minimum(1 << level, K)


@triton.jit
def _term(LEFT, RIGHT, a, left, left_row, right, there, LOG: tl.constexpr):
    """The product of coefficient a of one polynomial and the entry ``right`` of another."""
    zero: tl.constexpr = LOG_ZERO if LOG else 0.0
    x = tl.load(LEFT + a * left_row + left, mask=there, other=zero)
    y = tl.load(RIGHT + right, mask=there, other=zero)
    return x + y if LOG else x * y


@triton.jit
def _sum_of_products(
    LEFT,
    RIGHT,
    D_LEFT,
    D_RIGHT,
    left,
    left_row,
    degree,
    right,
    right_row,
    right_degree,
    j,
    inside,
    BACK: tl.constexpr,
    LOG: tl.constexpr,
    DUAL: tl.constexpr,
):
    """(value, slope) of the sum over a of left[a] right[j - a], or right[j + a] if not BACK.

    ``left`` and ``right`` are where coefficient 0 lies, the rows how far the next coefficient is.
    """
    zero: tl.constexpr = LOG_ZERO if LOG else 0.0
    kind: tl.constexpr = tl.float64 if LOG else tl.float32
    top = tl.zeros([inside.shape[0]], kind)
    if LOG:
        top += LOG_ZERO
        a = 0
        while a <= degree:
            at = j - a if BACK else j + a
            there = inside & (at >= 0) & (at <= right_degree)
            top = tl.maximum(top, _term(LEFT, RIGHT, a, left, left_row, at * right_row + right, there, LOG))
            a += 1
    total, moved = tl.zeros([inside.shape[0]], kind), tl.zeros([inside.shape[0]], kind)
    a = 0
    while a <= degree:
        at = j - a if BACK else j + a
        there = inside & (at >= 0) & (at <= right_degree)
        term = _term(LEFT, RIGHT, a, left, left_row, at * right_row + right, there, LOG)
        if LOG:
            term = tl.exp(term - top)
        total += term
        if DUAL:
            slope = tl.load(D_LEFT + a * left_row + left, mask=there, other=0.0)
            slope += tl.load(D_RIGHT + at * right_row + right, mask=there, other=0.0)
            moved += term * slope
        a += 1
    slope = tl.where(total > 0.0, moved / tl.where(total > 0.0, total, 1.0), 0.0)
    value = top + tl.log(total) if LOG else total
    return tl.where(inside, value, zero), slope


@triton.jit
def _up(
    VALUES,
    SLOPES,
    level,
    N: tl.constexpr,
    K: tl.constexpr,
    LOG: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From level ``level`` at VALUES to the next, behind it: node i times node i + m/2."""
    slots, degree = _level(level, N, K)
    slots_above, degree_above = _level(level + 1, N, K)
    half, size = slots // 2, (degree + 1) * slots
    start = 0
    while start < (degree_above + 1) * slots_above:
        at = start + tl.arange(0, BLOCK)
        j, i = at // slots_above, at % slots_above
        real = (i < half) & (j <= degree_above)
        value, slope = _sum_of_products(
            VALUES, VALUES, SLOPES, SLOPES, i, slots, degree, i + half, slots, degree, j, real, True, LOG, DUAL
        )
        one = (i >= half) & (j == 0)
        value = tl.where(one, 0.0 if LOG else 1.0, value)
        inside = at < (degree_above + 1) * slots_above
        tl.store(VALUES + size + at, value, mask=inside)
        if DUAL:
            tl.store(SLOPES + size + at, slope, mask=inside)
        start += BLOCK
    tl.debug_barrier()
    return size


@triton.jit
def _down(
    VALUES,
    SLOPES,
    ADJOINTS,
    D_ADJOINTS,
    level,
    N: tl.constexpr,
    K: tl.constexpr,
    LOG: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adjoints of level ``level`` from those behind it: the parent's, correlated with the sibling."""
    slots, degree = _level(level, N, K)
    slots_above, degree_above = _level(level + 1, N, K)
    half, size = slots // 2, (degree + 1) * slots
    start = 0
    while start < size:
        at = start + tl.arange(0, BLOCK)
        j, node = at // slots, at % slots
        sibling, parent = tl.where(node < half, node + half, node - half), node % half
        value, slope = _sum_of_products(
            VALUES,
            ADJOINTS + size,
            SLOPES,
            D_ADJOINTS + size,
            sibling,
            slots,
            degree,
            parent,
            slots_above,
            degree_above,
            j,
            at < size,
            False,
            LOG,
            DUAL,
        )
        tl.store(ADJOINTS + at, value, mask=at < size)
        if DUAL:
            tl.store(D_ADJOINTS + at, slope, mask=at < size)
        start += BLOCK
    tl.debug_barrier()


@triton.jit
def _split(
    VALUES,
    COUNTS,
    low,
    high,
    number,
    level,
    N: tl.constexpr,
    K: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split the counts of level + 1, which stand at COUNTS, between the nodes of ``level``; tell what is in doubt."""
    slots, degree = _level(level, N, K)
    half = slots // 2
    kind: tl.constexpr = tl.float64 if LOG else tl.float32
    near = 0
    start = 0
    while start < half:
        i = start + tl.arange(0, BLOCK)
        count = tl.load(COUNTS + i, mask=i < half, other=0)
        u = uniform(low, high, number + i, kind)
        top = tl.zeros([BLOCK], kind)
        if LOG:
            top += LOG_ZERO
            a = 0
            while a <= degree:
                there = (i < half) & (count >= a) & (count - a <= degree)
                top = tl.maximum(top, _term(VALUES, VALUES, a, i, slots, (count - a) * slots + i + half, there, LOG))
                a += 1
        total = tl.zeros([BLOCK], kind)
        a = 0
        while a <= degree:
            there = (i < half) & (count >= a) & (count - a <= degree)
            term = _term(VALUES, VALUES, a, i, slots, (count - a) * slots + i + half, there, LOG)
            total += tl.exp(term - top) if LOG else term
            a += 1
        cumulative = tl.zeros([BLOCK], kind)
        taken = tl.zeros([BLOCK], tl.int32)
        a = 0
        while a < degree:
            there = (i < half) & (count >= a) & (count - a <= degree)
            term = _term(VALUES, VALUES, a, i, slots, (count - a) * slots + i + half, there, LOG)
            cumulative += tl.exp(term - top) if LOG else term
            taken += (cumulative <= u * total).to(tl.int32)
            close = (tl.abs(cumulative - u * total) <= MARGIN * total) & (count > 0)
            near = tl.maximum(near, tl.max(close.to(tl.int32), axis=0))
            a += 1
        # The counts of both levels share their memory: everyone has read before anyone writes.
        tl.debug_barrier()
        tl.store(COUNTS + i, taken, mask=i < half)
        tl.store(COUNTS + i + half, count - taken, mask=i < half)
        start += BLOCK
    tl.debug_barrier()
    return near


# ---------------------------------------------------------------------------------------------- whole trees


@triton.jit
def _to_root(
    VALUES,
    SLOPES,
    N: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    LOG: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All levels from the leaves, which are there; where the root lies."""
    offset, level = 0, 0
    while level < DEPTH:
        offset += _up(VALUES + offset, SLOPES + offset, level, N, K, LOG, DUAL, BLOCK)
        level += 1
    return offset


@triton.jit
def _to_leaves(
    VALUES,
    SLOPES,
    ADJOINTS,
    D_ADJOINTS,
    root,
    N: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    LOG: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All adjoints from the root's, which are there."""
    at, level = root, DEPTH - 1
    while level >= 0:
        slots, degree = _level(level, N, K)
        at -= (degree + 1) * slots
        _down(VALUES + at, SLOPES + at, ADJOINTS + at, D_ADJOINTS + at, level, N, K, LOG, DUAL, BLOCK)
        level -= 1


@triton.jit
def _draw(
    VALUES,
    COUNTS,
    root,
    posterior,
    count,
    key,
    N: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw the count and split it down to the leaves, at COUNTS; whether rounding could have changed it."""
    low, high = mixed(key)
    drawn, near = _draw_count(posterior, count, uniform(low, high, root * 0, tl.float64 if LOG else tl.float32), K)
    tl.store(COUNTS, drawn)
    tl.debug_barrier()
    number, at, level = 1, root, DEPTH - 1
    while level >= 0:
        slots, degree = _level(level, N, K)
        at -= (degree + 1) * slots
        near = tl.maximum(near, _split(VALUES + at, COUNTS, low, high, number, level, N, K, LOG, BLOCK))
        number += slots // 2
        level -= 1
    return near


# ---------------------------------------------------------------------------------------------- leaves and root


@triton.jit
def _log_leaves(x, shift):
    """(absent, present, log normaliser): the naive engine's coins; decided variables have no normaliser."""
    infinite = tl.abs(x) == INFINITY
    centred = tl.where(infinite, 0.0, x.to(tl.float64)) - shift
    tail = tl.log(1.0 + tl.exp(-tl.abs(centred)))
    absent, present = -tl.maximum(centred, 0.0) - tail, tl.minimum(centred, 0.0) - tail
    absent = tl.where(infinite, tl.where(x == INFINITY, LOG_ZERO, 0.0), absent)
    present = tl.where(infinite, tl.where(x == INFINITY, 0.0, LOG_ZERO), present)
    each = tl.where(infinite, 0.0, tl.maximum(centred, 0.0) + tail)
    return absent, present, tl.sum(each, axis=1, keep_dims=True)


@triton.jit
def _store_leaves(VALUES, absent, present, i, N: tl.constexpr, LOG: tl.constexpr):
    slots: tl.constexpr = N + N % 2 if N > 1 else 1
    tl.store(VALUES + i, tl.where(i < N, absent, 0.0 if LOG else 1.0), mask=i < slots)
    tl.store(VALUES + slots + i, tl.where(i < N, present, LOG_ZERO if LOG else 0.0), mask=i < slots)


@triton.jit
def _log_weigh(coefficients, phi, count, shift, forced):
    """(log adjoint, posterior, log total) of the root, as the naive engine has it; NaN where nothing is left."""
    free = (count - forced).to(tl.float64)
    base = tl.where(phi > -INFINITY, phi.to(tl.float64) + shift * free, LOG_ZERO)
    weights = tl.where(coefficients < 0.5 * LOG_ZERO, LOG_ZERO, base + coefficients)
    top = tl.max(weights, axis=1, keep_dims=True)
    shares = tl.exp(weights - top)
    total = tl.sum(shares, axis=1, keep_dims=True)
    log_total = tl.where(top < 0.5 * LOG_ZERO, float("nan"), top + tl.log(total))
    return tl.where(phi > -INFINITY, base - log_total, LOG_ZERO), tl.exp(weights - log_total), log_total


@triton.jit
def _draw_count(posterior, count, u, K: tl.constexpr):
    """([] int32 count, [] int32 whether it is in doubt) by inversion of the posterior [1, JP] at u."""
    cumulative, total = tl.cumsum(posterior, axis=1), tl.sum(posterior, axis=1, keep_dims=True)
    before = count < K
    drawn = tl.sum(tl.sum(((cumulative <= u * total) & before).to(tl.int32), axis=1), axis=0)
    near = (tl.abs(cumulative - u * total) <= MARGIN * total) & before
    return drawn, tl.max(tl.max(near.to(tl.int32), axis=1), axis=0)


# ---------------------------------------------------------------------------------------------- kernels


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
    SCRATCH,
    COUNTS,
    tokens,
    phi_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    JP: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTS: tl.constexpr,
    SAMPLE: tl.constexpr,
    LOG: tl.constexpr,
    FAST: tl.constexpr,
):
    """One sweep of every row, or with LOG of the rows of the list; results as :func:`lanes.forward`'s.

    SIZE is how many values a tree has; SCRATCH holds two trees per program, of float64 if LOG; NP and JP are N and
    J padded to powers of two.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    slots_below: tl.constexpr = N + N % 2 if N > 1 else 1
    program = tl.program_id(0)
    VALUES = SCRATCH + program.to(tl.int64) * (2 * SIZE)
    ADJOINTS = VALUES + SIZE
    SPLITS = COUNTS + program * (N + 2)
    i, j = tl.arange(0, NP)[None, :], tl.arange(0, JP)[None, :]
    many = tl.load(COUNT) if LOG else tokens
    at = program
    while at < many:
        row = (tl.load(TODO + at) if LOG else at).to(tl.int64)
        lost = tl.load(LOST + row).to(tl.int32) if LOG else 0
        near = 0
        x = tl.load(X + row * N + i, mask=i < N, other=-INFINITY).to(tl.float32)
        phi = tl.load(PHI + row * phi_stride + j, mask=j < J, other=-INFINITY)
        forced, undecided, top, bottom = evidence((x,))
        if LOG:
            shift = tl.load(SHIFT + row + tl.zeros_like(forced).to(tl.int32))
            absent, present, log_coins = _log_leaves(x, shift)
        else:
            least, most, tilt = allowed_range((phi,), j, J, JP)
            high, low = solve_shift((x,), forced, undecided, top, bottom, least, most, tilt, FAST)
            shift = high.to(tl.float64) + low.to(tl.float64)
            absent, present = coin(x, high, low, FAST)
            log_coins = excess((x,), high, low, FAST)
        _store_leaves(VALUES, absent, present, i, N, LOG)
        tl.debug_barrier()
        offset = _to_root(VALUES, VALUES, N, K, DEPTH, LOG, False, BLOCK)

        root = tl.load(VALUES + offset + j, mask=j <= K, other=LOG_ZERO if LOG else 0.0)
        if LOG:
            adjoint, posterior, log_root = _log_weigh(root, phi, j, shift, forced)
        else:
            weights, shares, log_root, underflow = weigh((root,), (phi,), j, shift, forced, undecided, JP, FAST)
            adjoint, posterior = weights[0], shares[0]
            lost = tl.max(tl.max(tl.where(underflow, 1, 0), axis=1), axis=0)
        tl.store(ADJOINTS + offset + j, adjoint, mask=j <= K)
        if SAMPLE:
            near = _draw(VALUES, SPLITS, offset, posterior, j, tl.load(KEY + row), N, K, DEPTH, LOG, BLOCK)
            chosen = tl.load(SPLITS + i, mask=i < N, other=0) > 0
            chosen = chosen & (log_root == log_root)
            tl.store(MASK + row * N + i, chosen.to(tl.int8), mask=i < N)
        if MOMENTS:
            if lost > 0 or not LOG:
                tl.debug_barrier()
                _to_leaves(VALUES, VALUES, ADJOINTS, VALUES, offset, N, K, DEPTH, LOG, False, BLOCK)
                below = tl.load(ADJOINTS + slots_below + i, mask=i < N, other=0.0)
                product = tl.exp(below + present) if LOG else below * present
                product = tl.minimum(product, 1.0).to(tl.float32)  # rounding may go an ulp beyond
                product = tl.where(x == INFINITY, 1.0, product)
                product = tl.where(log_root == log_root, product, float("nan"))
                tl.store(MARGINALS + row * N + i, product, mask=i < N)
                tl.store(PROBS + row * J + j, posterior.to(tl.float32), mask=j < J)
                first = tl.zeros_like(forced).to(tl.int32)
                tl.store(LOG_PARTITION + row + first, (log_root + log_coins).to(tl.float32))
                tl.store(LOG_ROOT + row + first, log_root)
        if not LOG:
            tl.store(SHIFT + row + tl.zeros_like(forced).to(tl.int32), shift)
            tl.store(LOST + row, lost.to(tl.int8))
            if (lost > 0) | (near > 0):
                tl.store(TODO + tl.atomic_add(COUNT, 1), at)
        at += tl.num_programs(0)


@triton.jit
def backward(
    X,
    PHI,
    PROBS,
    LOG_ROOT,
    SHIFT,
    LOST,
    TODO,
    COUNT,
    U,
    V,
    D_MARGINALS,
    D_PROBS,
    SCRATCH,
    tokens,
    phi_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    JP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_V: tl.constexpr,
    LOG: tl.constexpr,
    FAST: tl.constexpr,
):
    """The derivative of (marginals, posterior) along (u, v), of every row, or with LOG of those that underflowed.

    With slopes, the root's adjoint moves by v_j - d log Z, and m_i by the slopes of its adjoint and its weight.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    program = tl.program_id(0)
    VALUES = SCRATCH + program.to(tl.int64) * (4 * SIZE)
    ADJOINTS, SLOPES, D_ADJOINTS = VALUES + SIZE, VALUES + 2 * SIZE, VALUES + 3 * SIZE
    slots_below: tl.constexpr = N + N % 2 if N > 1 else 1
    i, j = tl.arange(0, NP)[None, :], tl.arange(0, JP)[None, :]
    many = tl.load(COUNT) if LOG else tokens
    at = program
    while at < many:
        row = (tl.load(TODO + at) if LOG else at).to(tl.int64)
        wanted = tl.load(LOST + row).to(tl.int32) if LOG else 1
        if wanted > 0:
            x = tl.load(X + row * N + i, mask=i < N, other=-INFINITY).to(tl.float32)
            u = tl.load(U + row * N + i, mask=i < N, other=0.0).to(tl.float32)
            u = tl.where(tl.abs(x) < INFINITY, u, 0.0)
            phi = tl.load(PHI + row * phi_stride + j, mask=j < J, other=-INFINITY)
            posterior = tl.load(PROBS + row * J + j, mask=j < J, other=0.0)
            v = tl.load(V + row * J + j, mask=j < J, other=0.0).to(tl.float32) if HAS_V else tl.zeros_like(posterior)
            forced = tl.sum((x == INFINITY).to(tl.float32), axis=1, keep_dims=True)
            shift = tl.load(SHIFT + row + tl.zeros_like(forced).to(tl.int32))
            if LOG:
                absent, present, _ = _log_leaves(x, shift)
            else:
                high = shift.to(tl.float32)
                absent, present = coin(x, high, (shift - high.to(tl.float64)).to(tl.float32), FAST)
            _store_leaves(VALUES, absent, present, i, N, LOG)
            tl.store(SLOPES + i, tl.zeros_like(u), mask=i < slots_below)
            tl.store(SLOPES + slots_below + i, u, mask=i < slots_below)
            tl.debug_barrier()
            offset = _to_root(VALUES, SLOPES, N, K, DEPTH, LOG, True, BLOCK)

            root = tl.load(VALUES + offset + j, mask=j <= K, other=0.0)
            slope = tl.load(SLOPES + offset + j, mask=j <= K, other=0.0) + v
            slope -= tl.sum(posterior * slope, axis=1, keep_dims=True)
            tl.store(D_PROBS + row * J + j, posterior * slope, mask=j < J)
            if LOG:
                base = phi.to(tl.float64) + shift * (j - forced).to(tl.float64)
                log_root = tl.load(LOG_ROOT + row + tl.zeros_like(forced).to(tl.int32))
                adjoint = tl.where(phi > -INFINITY, base - log_root, LOG_ZERO)
            else:
                found = root >= SMALLEST_COEFFICIENT
                adjoint = tl.where(found, posterior / tl.where(found, root, 1.0), 0.0)
            # The root's coefficients do not move its adjoint: what is left is v_j - d log Z.
            tl.store(ADJOINTS + offset + j, adjoint, mask=j <= K)
            own = tl.load(SLOPES + offset + j, mask=j <= K, other=0.0)
            tl.store(D_ADJOINTS + offset + j, slope - own, mask=j <= K)
            tl.debug_barrier()
            _to_leaves(VALUES, SLOPES, ADJOINTS, D_ADJOINTS, offset, N, K, DEPTH, LOG, True, BLOCK)
            below = tl.load(ADJOINTS + slots_below + i, mask=i < N, other=0.0)
            product = tl.exp(below + present) if LOG else below * present
            moved = tl.load(D_ADJOINTS + slots_below + i, mask=i < N, other=0.0) + u
            moved = tl.where(tl.abs(x) < INFINITY, product * moved, 0.0)
            tl.store(D_MARGINALS + row * N + i, moved.to(tl.float32), mask=i < N)
            tl.debug_barrier()
        at += tl.num_programs(0)
