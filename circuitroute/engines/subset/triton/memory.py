"""One row per program, its tree in memory: for counts too large for registers, and the rows float32 cannot decide.

Legend: T tokens (rows), N variables, K the largest count, J = K + 1; tensors are [1, N] and [1, J], padded to powers
of two: 2^DEPTH and JP.

With LOG a kernel works off the list of rows that another one left, in float64 logarithms, as the naive engine does.
Otherwise it takes every row, in float32, and puts those in need of LOG on the list. See
:mod:`~circuitroute.engines.subset.triton.levels` for the tree, which has SIZE values.
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
    log_adjoint,
    log_weigh,
    weigh,
)
from circuitroute.engines.subset.triton.sampling import draw_in_memory
from circuitroute.engines.subset.triton.shift import evidence, solve_shift

# ---------------------------------------------------------------------------------------------- what both share


@triton.jit
def _load_row(rows, potential_stride, row, i, j, N: tl.constexpr, J: tl.constexpr):
    """(logits, potential); -inf where there is no variable and no count."""
    x = tl.load(rows.logits + row * N + i, mask=i < N, other=-INFINITY).to(tl.float32)
    return x, tl.load(rows.potential + row * potential_stride + j, mask=j < J, other=-INFINITY)


@triton.jit
def _store_one(POINTER, row, value):
    """Store what belongs to a row, [1, 1]."""
    tl.store(POINTER + row + tl.zeros_like(value).to(tl.int32), value)


@triton.jit
def _coins(x, shift, LOG: tl.constexpr, FAST: tl.constexpr):
    """(absent, present, log normaliser); the first two in logarithms if LOG, of a float64 shift."""
    if LOG:
        return log_coins(x, shift)
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
            shift = tl.load(swept.shift + row)
        else:
            allowed = None if EXACT else allowed_range((phi,), j, JP)
            shift = solve_shift((x,), known, allowed, FAST, K if EXACT else 0)
        absent, present, normaliser = _coins(x, shift, LOG, FAST)
        root = _tree_up(TREE, absent, present, i, N, K, DEPTH, LOG, 0)

        coefficients = tl.load(TREE + root + j, mask=j <= K, other=LOG_ZERO if LOG else 0.0)
        if LOG:
            adjoint, posterior, log_root = log_weigh(coefficients, phi, j, shift, known[0])
            lost = tl.load(swept.fallback + row).to(tl.int32)
        else:
            weights, shares, log_root, underflow = weigh((coefficients,), (phi,), j, exact(shift), known, JP, FAST)
            adjoint, posterior = weights[0], shares[0]
            lost = tl.max(tl.max(tl.where(underflow, 1, 0), axis=1), axis=0)
            _store_one(swept.shift, row, exact(shift))
            tl.store(swept.fallback + row, lost > 0)
        tl.store(TREE + SIZE + root + j, adjoint, mask=j <= K)

        flagged = lost
        if swept.mask is not None:
            key = tl.load(rows.key + row)
            flagged |= draw_in_memory(TREE, COUNTS, root, posterior, j, key, N, K, DEPTH, LOG)
            chosen = (tl.load(COUNTS + i, mask=i < N, other=0) > 0) & (log_root == log_root)
            tl.store(swept.mask + row * N + i, chosen, mask=i < N)
        if swept.marginals is not None:
            if lost > 0 or not LOG:
                m = _tree_down(TREE, root, present, i, N, K, DEPTH, SIZE, LOG, 0)
                m = tl.minimum(m, 1.0).to(tl.float32)  # rounding may go an ulp beyond
                m = tl.where(log_root == log_root, tl.where(x == INFINITY, 1.0, m), float("nan"))
                tl.store(swept.marginals + row * N + i, m, mask=i < N)
                tl.store(swept.count_probs + row * J + j, posterior.to(tl.float32), mask=j < J)
                _store_one(swept.log_partition, row, (log_root + normaliser).to(tl.float32))
                _store_one(swept.log_root, row, log_root)
        if not LOG:
            if flagged > 0:
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
    """The derivative of (marginals, posterior) along (u, v), of every row, or with LOG of those that underflowed.

    With slopes, the root's adjoint moves by v_j - d log Z, and m_i by the slopes of its adjoint and its weight.
    ``scratch`` holds four trees per program: values, adjoints, and the slopes of both.
    """
    K: tl.constexpr = J - 1 if J > 1 else 1
    DUAL: tl.constexpr = 2 * SIZE
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
            posterior = tl.load(swept.count_probs + row * J + j, mask=j < J, other=0.0)
            exact_shift = tl.load(swept.shift + row)
            shift = exact_shift if LOG else from_exact(exact_shift)
            absent, present, _ = _coins(x, shift, LOG, FAST)
            # A coin's slopes, -p u and (1 - p) u: small where it is all but certain, so that sums over the tree are.
            gain = (tl.exp(absent) if LOG else absent) * u
            levels.plant(TREE + DUAL, -(tl.exp(present) if LOG else present) * u, gain, i, N)
            root = _tree_up(TREE, absent, present, i, N, K, DEPTH, LOG, DUAL)

            coefficients = tl.load(TREE + root + j, mask=j <= K, other=0.0)
            slope = tl.load(TREE + DUAL + root + j, mask=j <= K, other=0.0)
            if slopes.v is not None:
                slope += tl.load(slopes.v + row * J + j, mask=j < J, other=0.0).to(tl.float32)
            slope -= tl.sum(posterior * slope, axis=1, keep_dims=True)
            tl.store(slopes.count_probs + row * J + j, posterior * slope, mask=j < J)
            if LOG:
                forced = tl.sum((x == INFINITY).to(tl.float32), axis=1, keep_dims=True)
                adjoint = log_adjoint(phi, j, exact_shift, forced, tl.load(swept.log_root + row))
            else:
                found = coefficients >= SMALLEST_COEFFICIENT
                adjoint = tl.where(found, posterior / tl.where(found, coefficients, 1.0), 0.0)
            tl.store(TREE + SIZE + root + j, adjoint, mask=j <= K)
            # The root's coefficients do not move its adjoint: what is left is v_j - d log Z.
            slope -= tl.load(TREE + DUAL + root + j, mask=j <= K, other=0.0)
            tl.store(TREE + SIZE + DUAL + root + j, slope, mask=j <= K)

            m = _tree_down(TREE, root, present, i, N, K, DEPTH, SIZE, LOG, DUAL)
            moved = levels.load_present(TREE + SIZE + DUAL, i, N) + gain
            moved = tl.where(tl.abs(x) < INFINITY, m * moved, 0.0)
            tl.store(slopes.marginals + row * N + i, moved.to(tl.float32), mask=i < N)
            tl.debug_barrier()
        at += tl.num_programs(0)
