"""One row per program, its tree in memory: for counts too large for registers, and the rows float32 cannot decide.

Legend: T tokens (rows), N variables, K the largest count, J = K + 1; tensors are [1, N] and [1, J], padded to powers
of two: 2^DEPTH and JP.

With LOG a kernel works off the list of rows that another one left, around their known shift: in float64, and what that
does not decide in float64 logarithms, as the naive engine does. Otherwise it takes every row, in float32, and puts
those in need of LOG on the list. See :mod:`~circuitroute.engines.subset.triton.levels` for the tree, of SIZE values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from circuitroute.engines.subset.triton import SIZES, levels
from circuitroute.engines.subset.triton.coins import (
    INFINITY,
    LOG_ZERO,
    coin,
    exact,
    from_exact,
    log_coins,
    log_normaliser,
)
from circuitroute.engines.subset.triton.root import (
    SMALLEST_COEFFICIENT,
    allowed_range,
    log_weigh,
    weigh,
    wide_weigh,
)
from circuitroute.engines.subset.triton.sampling import draw_in_memory
from circuitroute.engines.subset.triton.shift import evidence, solve_shift
from circuitroute.engines.subset.triton.weights import direct_slopes

# ---------------------------------------------------------------------------------------------- what both share


@triton.jit
def _load_row(rows, potential_stride, row, i, j, N: tl.constexpr, J: tl.constexpr):
    """(logits, potential); -inf where there is no variable and no count."""
    x = tl.load(rows.logits + row * N + i, mask=i < N, other=-INFINITY).to(tl.float32)
    if rows.temperature is not None:
        t = tl.load(rows.temperature + row).to(tl.float32)
        x = tl.div_rn(x, t + tl.zeros_like(x))
    return x, tl.load(rows.potential + row * potential_stride + j, mask=j < J, other=-INFINITY)


@triton.jit
def _store_one(POINTER, row, value):
    """Store what belongs to a row, [1, 1]."""
    tl.store(POINTER + row + tl.zeros_like(value).to(tl.int32), value)


@triton.jit
def _coins(x, shift, WIDE: tl.constexpr, LOG: tl.constexpr, FAST: tl.constexpr):
    """(absent, present, log normaliser); the first two in float64 if WIDE, of a float64 shift, in logarithms if LOG."""
    if WIDE:
        absent, present, normaliser = log_coins(x, shift)
        return absent if LOG else tl.exp(absent), present if LOG else tl.exp(present), normaliser
    else:
        absent, present = coin(x, shift, FAST)
        return absent, present, log_normaliser((x,), shift, FAST)


@triton.jit
def _tree_up(
    TREE,
    absent,
    present,
    i,
    N: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    LOG: tl.constexpr,
    DUAL: tl.constexpr,
):
    """Plant the leaves and build the tree; where its root lies."""
    absent = tl.where(i < N, absent, 0.0 if LOG else 1.0)
    levels.plant(TREE, absent, tl.where(i < N, present, LOG_ZERO if LOG else 0.0), i, N)
    tl.debug_barrier()
    return levels.up(TREE, N, K, DEPTH, LOG, DUAL)


@triton.jit
def _tree_down(
    TREE,
    root,
    present,
    i,
    N: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    DUAL: tl.constexpr,
):
    """Each variable's marginal, not rounded: its leaf's adjoint times its probability."""
    tl.debug_barrier()
    levels.down(TREE, root, N, K, DEPTH, SIZE, LOG, DUAL)
    below = levels.load_present(TREE + SIZE, i, N)
    return tl.exp(below + present) if LOG else below * present


@triton.jit
def _direct(slopes, row, i, N: tl.constexpr):
    """(w0 - c, c, z) of a row of a routing step, see :func:`~.weights.direct_slopes`."""
    rest, score = direct_slopes(slopes, tl.zeros([1, 1], tl.int64) + row, tl.full([1, 1], 1, tl.int1))
    return rest, score, tl.load(slopes.mask + row * N + i, mask=i < N, other=0) != 0


# ---------------------------------------------------------------------------------------------- one row


@triton.jit
def _weigh(
    coefficients, phi, j, shift, known, JP: tl.constexpr, WIDE: tl.constexpr, LOG: tl.constexpr, FAST: tl.constexpr
):
    """(adjoint, posterior, log total, [] int32 whether a coefficient that matters is lost) of the root."""
    if LOG:
        adjoint, posterior, log_root = log_weigh(coefficients, phi, j, shift, known[0])
        return adjoint, posterior, log_root, 0
    elif WIDE:
        adjoint, posterior, log_root, underflow = wide_weigh(coefficients, phi, j, shift, known)
        return adjoint, posterior, log_root, _any(underflow)
    else:
        weights, shares, log_root, underflow = weigh((coefficients,), (phi,), j, exact(shift), known, JP, FAST)
        return weights[0], shares[0], log_root, _any(underflow)


@triton.jit
def _any(row):
    return tl.max(tl.max(tl.where(row, 1, 0), axis=1), axis=0)


@triton.jit
def _sweep(
    rows,
    swept,
    TREE,
    COUNTS,
    row,
    x,
    phi,
    known,
    shift,
    wanted,
    N: tl.constexpr,
    J: tl.constexpr,
    DEPTH: tl.constexpr,
    JP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    LOG: tl.constexpr,
    FAST: tl.constexpr,
):
    """([] int32 whether a coefficient that matters is lost, and whether the sample is in doubt) of one sweep.

    Moments are stored where they are ``wanted``, and nothing where a coefficient is lost; with LOG none is.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    i, j = tl.arange(0, 1 << DEPTH if N > 1 else 2)[None, :], tl.arange(0, JP)[None, :]
    absent, present, normaliser = _coins(x, shift, WIDE, LOG, FAST)
    root = _tree_up(TREE, absent, present, i, N, K, DEPTH, LOG, 0)
    coefficients = tl.load(TREE + root + j, mask=j <= K, other=LOG_ZERO if LOG else 0.0)
    adjoint, posterior, log_root, lost = _weigh(coefficients, phi, j, shift, known, JP, WIDE, LOG, FAST)
    tl.store(TREE + SIZE + root + j, adjoint, mask=j <= K)
    doubt = 0
    if swept.mask is not None:
        if lost == 0:
            key = tl.load(rows.key + row)
            doubt = draw_in_memory(TREE, COUNTS, root, posterior, j, key, N, K, DEPTH, LOG)
            chosen = (tl.load(COUNTS + i, mask=i < N, other=0) > 0) & (log_root == log_root)
            tl.store(swept.mask + row * N + i, chosen, mask=i < N)
    if swept.log_root is not None:
        if (wanted > 0) & (lost == 0):
            tl.store(swept.count_probs + row * J + j, posterior.to(tl.float32), mask=j < J)
            _store_one(swept.log_partition, row, (log_root + normaliser).to(tl.float32))
            _store_one(swept.log_root, row, log_root)
    if swept.marginals is not None:
        if (wanted > 0) & (lost == 0):
            m = _tree_down(TREE, root, present, i, N, K, DEPTH, SIZE, LOG, 0)
            m = tl.minimum(m, 1.0).to(tl.float32)  # rounding may go an ulp beyond
            m = tl.where(log_root == log_root, tl.where(x == INFINITY, 1.0, m), float("nan"))
            tl.store(swept.marginals + row * N + i, m, mask=i < N)
    tl.debug_barrier()  # everyone has read the tree before the next one is planted
    return lost, doubt


@triton.jit
def _derive(
    rows,
    swept,
    slopes,
    TREE,
    row,
    x,
    phi,
    u,
    N: tl.constexpr,
    J: tl.constexpr,
    DEPTH: tl.constexpr,
    JP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    LOG: tl.constexpr,
    FAST: tl.constexpr,
):
    """Store a row's derivative along (u, v), unless a coefficient that matters is lost; [] int32 whether one is."""
    K: tl.constexpr = J - 1 if J > 1 else 1
    DUAL: tl.constexpr = 2 * SIZE
    i, j = tl.arange(0, 1 << DEPTH if N > 1 else 2)[None, :], tl.arange(0, JP)[None, :]
    exact_shift = tl.load(swept.shift + row)
    shift = exact_shift if WIDE else from_exact(exact_shift)
    absent, present, _ = _coins(x, shift, WIDE, LOG, FAST)
    # A coin's slopes, -p u and (1 - p) u: they average to nothing, and so do their sums over the tree.
    gain = (tl.exp(absent) if LOG else absent) * u
    levels.plant(TREE + DUAL, -(tl.exp(present) if LOG else present) * u, gain, i, N)
    root = _tree_up(TREE, absent, present, i, N, K, DEPTH, LOG, DUAL)

    coefficients = tl.load(TREE + root + j, mask=j <= K, other=LOG_ZERO if LOG else 0.0)
    if WIDE:
        adjoint, posterior, _, lost = _weigh(coefficients, phi, j, shift, evidence((x,)), JP, WIDE, LOG, FAST)
    else:
        posterior = tl.load(swept.count_probs + row * J + j, mask=j < J, other=0.0)
        found = coefficients >= SMALLEST_COEFFICIENT
        adjoint, lost = tl.where(found, posterior / tl.where(found, coefficients, 1.0), 0.0), 0
    if lost == 0:
        slope = tl.load(TREE + DUAL + root + j, mask=j <= K, other=0.0)
        if slopes.v is not None:
            slope += tl.load(slopes.v + row * J + j, mask=j < J, other=0.0).to(tl.float32)
        slope -= tl.sum(posterior * slope, axis=1, keep_dims=True)
        by_potential = posterior * slope
        if slopes.mask is not None:
            rest, score, chosen = _direct(slopes, row, i, N)
            count = tl.sum(chosen.to(tl.int32), axis=1, keep_dims=True)
            by_potential += rest * posterior + tl.where(j == count, score, 0.0)
        tl.store(slopes.count_probs + row * J + j, by_potential.to(tl.float32), mask=j < J)
        tl.store(TREE + SIZE + root + j, adjoint, mask=j <= K)
        # The root's coefficients do not move its adjoint: what is left is v_j - d log Z.
        slope -= tl.load(TREE + DUAL + root + j, mask=j <= K, other=0.0)
        tl.store(TREE + SIZE + DUAL + root + j, slope, mask=j <= K)

        m = _tree_down(TREE, root, present, i, N, K, DEPTH, SIZE, LOG, DUAL)
        moved = levels.load_present(TREE + SIZE + DUAL, i, N) + gain
        moved = tl.where(tl.abs(x) < INFINITY, m * moved, 0.0)
        if slopes.mask is not None:
            moved = moved.to(tl.float32) + rest * m.to(tl.float32) + tl.where(chosen, score, 0.0)
            moved = tl.where(tl.abs(x) < INFINITY, moved, 0.0)
            if rows.temperature is not None:
                moved = moved / tl.load(rows.temperature + row).to(tl.float32)
            if slopes.choice is None:
                moved += tl.load(slopes.marginals + row * N + i, mask=i < N, other=0.0).to(tl.float32)
        tl.store(slopes.marginals + row * N + i, moved.to(tl.float32), mask=i < N)
    tl.debug_barrier()  # everyone has read the tree before the next one is planted
    return lost


# ---------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=SIZES)
def forward(
    rows,
    swept,
    scratch,
    tokens,
    potential_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    DEPTH: tl.constexpr,
    JP: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr = False,
):
    """One sweep, of every row or with LOG of those on the list; arguments as for :func:`.registers.forward`.

    ``scratch`` is an :class:`~..engine.Scratch`: two trees per program, values and adjoints, and room to split counts.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    program = tl.program_id(0)
    TREE = scratch.trees + program.to(tl.int64) * (2 * SIZE)
    COUNTS = scratch.counts + program * (N + 2)
    i, j = tl.arange(0, 1 << DEPTH if N > 1 else 2)[None, :], tl.arange(0, JP)[None, :]
    at, many = program, tl.load(swept.length) if LOG else tokens
    while at < many:
        row = (tl.load(swept.todo + at) if LOG else at).to(tl.int64)
        x, phi = _load_row(rows, potential_stride, row, i, j, N, J)
        known = evidence((x,))
        if LOG:
            shift, wanted = tl.load(swept.shift + row), tl.load(swept.fallback + row).to(tl.int32)
            lost, doubt = _sweep(
                rows, swept, TREE, COUNTS, row, x, phi, known, shift, wanted, N, J, DEPTH, JP, SIZE, 1, 0, FAST
            )
            if (lost | doubt) > 0:
                _sweep(rows, swept, TREE, COUNTS, row, x, phi, known, shift, wanted, N, J, DEPTH, JP, SIZE, 1, 1, FAST)
        else:
            allowed = None if EXACT else allowed_range((phi,), j, JP)
            shift = solve_shift((x,), known, allowed, FAST, K if EXACT else 0)
            lost, doubt = _sweep(
                rows, swept, TREE, COUNTS, row, x, phi, known, shift, 1, N, J, DEPTH, JP, SIZE, 0, 0, FAST
            )
            _store_one(swept.shift, row, exact(shift))
            tl.store(swept.fallback + row, lost > 0)
            if (lost | doubt) > 0:
                tl.store(swept.todo + tl.atomic_add(swept.length, 1), at)
        at += tl.num_programs(0)


@triton.jit(do_not_specialize=SIZES)
def backward(
    rows,
    swept,
    slopes,
    scratch,
    tokens,
    potential_stride,
    N: tl.constexpr,
    J: tl.constexpr,
    DEPTH: tl.constexpr,
    JP: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    FAST: tl.constexpr,
):
    """The derivative of (marginals, posterior) along (u, v), of every row, or with LOG of those that float32 lost.

    With slopes, the root's adjoint moves by v_j - d log Z, and m_i by the slopes of its adjoint and its weight.
    ``scratch`` holds four trees per program: values, adjoints, and the slopes of both.
    """
    program = tl.program_id(0)
    TREE = scratch.trees + program.to(tl.int64) * (4 * SIZE)
    i, j = tl.arange(0, 1 << DEPTH if N > 1 else 2)[None, :], tl.arange(0, JP)[None, :]
    at, many = program, tl.load(swept.length) if LOG else tokens
    while at < many:
        row = (tl.load(swept.todo + at) if LOG else at).to(tl.int64)
        wanted = tl.load(swept.fallback + row).to(tl.int32) if LOG else 1
        if wanted > 0:
            x, phi = _load_row(rows, potential_stride, row, i, j, N, J)
            u = tl.load(slopes.u + row * N + i, mask=i < N, other=0.0).to(tl.float32)
            u = tl.where(tl.abs(x) < INFINITY, u, 0.0)
            lost = _derive(rows, swept, slopes, TREE, row, x, phi, u, N, J, DEPTH, JP, SIZE, LOG, 0, FAST)
            if LOG:
                if lost > 0:
                    _derive(rows, swept, slopes, TREE, row, x, phi, u, N, J, DEPTH, JP, SIZE, 1, 1, FAST)
        at += tl.num_programs(0)
