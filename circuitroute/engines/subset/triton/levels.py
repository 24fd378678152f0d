"""A row's tree in memory, for any number of variables and counts, in logarithms where it must be.

Legend: N variables, K the largest count; m nodes at a level, d their degree.

The same tree as :mod:`..torch.tree`; level l is [d + 1, even(m)] at TREE, the levels behind one another from the
leaves up, float32 or float64 as the memory at TREE is. With LOG they are logarithms, logsumexp for + and + for *, which
works at any range.

The adjoints lie SIZE behind the values. Tangents are kept as slopes, the tangents of logarithms, DUAL behind what
they belong to (0: there are none): the slope of a product is the sum of its factors', that of a sum the mean of its
terms' by weight. So one loop serves values and slopes, up and down.

A polynomial is (first, stride, degree): where its coefficient 0 lies, and how far the next one is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from circuitroute.engines.subset.triton.coins import LOG_ZERO

BLOCK = tl.constexpr(128)  # results that are worked out at a time


@triton.jit
def extent(level, N: tl.constexpr, K: tl.constexpr):
    """(slots, degree) of a level: a root stands alone, other levels are padded to pairs."""
    nodes = (N + (1 << level) - 1) >> level
    slots = tl.where(nodes > 1, nodes + (nodes & 1), 1)
    return slots, tl.minimum(1 << level, K)


@triton.jit
def plant(TREE, absent, present, i, N: tl.constexpr):
    """Store the leaves, of which i counts the variables and any slot of padding."""
    slots: tl.constexpr = N + N % 2 if N > 1 else 1
    tl.store(TREE + i, absent, mask=i < slots)
    tl.store(TREE + slots + i, present, mask=i < slots)


@triton.jit
def load_present(TREE, i, N: tl.constexpr):
    """What belongs to the leaves' second coefficients."""
    slots: tl.constexpr = N + N % 2 if N > 1 else 1
    return tl.load(TREE + slots + i, mask=i < N, other=0.0)


@triton.jit
def term(TREE, left, right, a, b, there, LOG: tl.constexpr):
    """The product of coefficient a of one polynomial and coefficient b of another."""
    zero: tl.constexpr = LOG_ZERO if LOG else 0.0
    x = tl.load(TREE + a * left[1] + left[0], mask=there, other=zero)
    # Whole offsets first: a tensor of pointers is added to only once.
    y = tl.load(TREE + (b * right[1] + right[0]), mask=there, other=zero)
    return x + y if LOG else x * y


@triton.jit
def _sum_of_products(TREE, left, right, j, inside, SIGN: tl.constexpr, LOG: tl.constexpr, DUAL: tl.constexpr):
    """(value, slope) of the sum over a of left[a] right[j + SIGN a]."""
    zero: tl.constexpr = LOG_ZERO if LOG else 0.0
    kind: tl.constexpr = TREE.dtype.element_ty
    top = tl.zeros([inside.shape[0]], kind)
    if LOG:
        top += LOG_ZERO
        a = 0
        while a <= left[2]:
            b = j + SIGN * a
            there = inside & (b >= 0) & (b <= right[2])
            top = tl.maximum(top, term(TREE, left, right, a, b, there, LOG))
            a += 1
    total, moved = tl.zeros([inside.shape[0]], kind), tl.zeros([inside.shape[0]], kind)
    a = 0
    while a <= left[2]:
        b = j + SIGN * a
        there = inside & (b >= 0) & (b <= right[2])
        share = term(TREE, left, right, a, b, there, LOG)
        if LOG:
            share = tl.exp(share - top)
        total += share
        if DUAL:
            slope = tl.load(TREE + DUAL + a * left[1] + left[0], mask=there, other=0.0)
            slope += tl.load(TREE + DUAL + (b * right[1] + right[0]), mask=there, other=0.0)
            moved += share * slope
        a += 1
    slope = tl.where(total > 0.0, moved / tl.where(total > 0.0, total, 1.0), 0.0)
    value = top + tl.log(total) if LOG else total
    return tl.where(inside, value, zero), slope


@triton.jit
def _multiply(TREE, level, N: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr, DUAL: tl.constexpr):
    """From level ``level`` at TREE to the next, behind it: node i times node i + m/2. Returns where that lies."""
    slots, degree = extent(level, N, K)
    slots_above, degree_above = extent(level + 1, N, K)
    half, size = slots // 2, (degree + 1) * slots
    start = 0
    while start < (degree_above + 1) * slots_above:
        at = start + tl.arange(0, BLOCK)
        j, i = at // slots_above, at % slots_above
        real = (i < half) & (j <= degree_above)
        left, right = (i, slots, degree), (i + half, slots, degree)
        value, slope = _sum_of_products(TREE, left, right, j, real, -1, LOG, DUAL)
        one = (i >= half) & (j == 0)
        value = tl.where(one, 0.0 if LOG else 1.0, value)
        inside = at < (degree_above + 1) * slots_above
        tl.store(TREE + size + at, value, mask=inside)
        if DUAL:
            tl.store(TREE + DUAL + size + at, slope, mask=inside)
        start += BLOCK
    tl.debug_barrier()
    return size


@triton.jit
def _correlate(
    TREE, level, N: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, LOG: tl.constexpr, DUAL: tl.constexpr
):
    """Adjoints of level ``level`` from those behind it: the parent's, correlated with the sibling."""
    slots, degree = extent(level, N, K)
    slots_above, degree_above = extent(level + 1, N, K)
    half, size = slots // 2, (degree + 1) * slots
    start = 0
    while start < size:
        at = start + tl.arange(0, BLOCK)
        j, node = at // slots, at % slots
        sibling = (tl.where(node < half, node + half, node - half), slots, degree)
        parent = (SIZE + size + node % half, slots_above, degree_above)
        value, slope = _sum_of_products(TREE, sibling, parent, j, at < size, 1, LOG, DUAL)
        tl.store(TREE + SIZE + at, value, mask=at < size)
        if DUAL:
            tl.store(TREE + SIZE + DUAL + at, slope, mask=at < size)
        start += BLOCK
    tl.debug_barrier()


@triton.jit
def up(TREE, N: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr, LOG: tl.constexpr, DUAL: tl.constexpr):
    """All levels from the leaves, which are there; where the root lies."""
    at, level = 0, 0
    if DEPTH > 0:  # a loop that is never entered is not analysed, and triton 3.6 does not compile what is in it
        while level < DEPTH:
            at += _multiply(TREE + at, level, N, K, LOG, DUAL)
            level += 1
    return at


@triton.jit
def down(
    TREE,
    root,
    N: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    DUAL: tl.constexpr,
):
    """All adjoints from the root's, which are there."""
    at, level = root, DEPTH - 1
    if DEPTH > 0:
        while level >= 0:
            slots, degree = extent(level, N, K)
            at -= (degree + 1) * slots
            _correlate(TREE + at, level, N, K, SIZE, LOG, DUAL)
            level -= 1
