"""Sampling, for kernels: keyed uniforms, inversion, and the split of a count down the tree.

See :mod:`circuitroute.engines.subset.torch.sampling`: a draw that float32 rounding could change is in doubt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from circuitroute.engines import sampling
from circuitroute.engines.subset.triton import tree
from circuitroute.engines.subset.triton.coins import LOG_ZERO
from circuitroute.engines.subset.triton.levels import BLOCK, extent, term

# On the right of a product: the interpreter of triton 3.8 cannot multiply a constant by a tensor.
MARGIN = tl.constexpr(sampling.MARGIN[torch.float32])
WIDE_MARGIN = tl.constexpr(sampling.MARGIN[torch.float64])

# ---------------------------------------------------------------------------------------------- uniforms


@triton.jit
def mixed(key):
    """(low, high) words of the row's key, see :func:`circuitroute.keys.mix64`."""
    x = key.to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def uniform(words, number, DTYPE: tl.constexpr):
    """The uniform with this number, in (0, 1), see :func:`circuitroute.keys.uniform_at`."""
    low, high = words
    x = (number.to(tl.uint32) * 0x9E3779B9) ^ low
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ high
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x.to(tl.int32, bitcast=True).to(DTYPE) + 0.5) * 2.3283064365386963e-10 + 0.5


# ---------------------------------------------------------------------------------------------- in registers


@triton.jit
def _invert(weights, u):
    """How many cumulative weights lie at or below u times the total, and whether one lies within the margin."""
    total = weights[0]
    for a in tl.static_range(1, len(weights)):
        total += weights[a]
    threshold = u * total
    chosen = tl.zeros_like(total).to(tl.int32)
    cumulative, nearest = tl.zeros_like(total), total
    for a in tl.static_range(len(weights) - 1):
        cumulative += weights[a]
        gap = cumulative - threshold
        chosen += (gap <= 0.0).to(tl.int32)
        nearest = tl.minimum(nearest, tl.abs(gap))
    return chosen, nearest <= total * MARGIN


@triton.jit
def _products(a, b):
    out = ()
    for j in tl.static_range(len(a)):
        out = out + (a[j] * b[j],)
    return out


@triton.jit
def _window(right, MAX: tl.constexpr, SIZE: tl.constexpr):
    """right[MAX - i] for i = 0.., zero where there is none."""
    zero = tl.zeros_like(right[0])
    out = ()
    for i in tl.static_range(SIZE):
        out = out + (right[MAX - i] if MAX - i < len(right) and i <= MAX else zero,)
    return out


@triton.jit
def _advance(window, distance, STEP: tl.constexpr, LEFT: tl.constexpr):
    """The window moved on by STEP where that bit of ``distance`` is set, as far as later steps will look."""
    move = (distance & STEP) != 0
    out = ()
    for i in tl.static_range(STEP + LEFT):
        out = out + (tl.where(move, window[i + STEP], window[i]),)
    return out


@triton.jit
def _taken_from(right, count, LEFT: tl.constexpr, BITS: tl.constexpr):
    """right[count - a] for a = 0 .. LEFT, where ``count`` differs by row: a barrel shifter of BITS stages."""
    most: tl.constexpr = (1 << BITS) - 1
    window = _window(right, most, most + LEFT + 1)
    for stage in tl.static_range(BITS):
        window = _advance(window, most - count, 1 << (BITS - 1 - stage), LEFT)
    return window


@triton.jit
def _split(left, right, count, u, K: tl.constexpr):
    """How many of ``count`` go to the left factor, drawn by inversion at u, and whether that is in doubt."""
    full: tl.constexpr = len(left) + len(right) - 2
    most: tl.constexpr = full if full < K else K
    bits: tl.constexpr = 1 if most < 2 else 2 if most < 4 else 3 if most < 8 else 4 if most < 16 else 5
    taken, doubt = _invert(_products(left, _taken_from(right, count, len(left) - 1, bits)), u)
    # An empty node leaves nothing to decide.
    return taken, doubt & (count > 0)


@triton.jit
def _node_uniforms(words, number, lane, LEVEL: tl.constexpr, LE: tl.constexpr, N: tl.constexpr):
    """The uniforms of a lane's nodes of level LEVEL, which are numbered from ``number`` on."""
    if LEVEL == LE:
        return uniform(words, number + lane[0], tl.float32)
    else:
        index, _ = tree.slots(lane, LEVEL, LE, N)
        return uniform((words[0][None, :, :], words[1][None, :, :]), number[None, :, :] + index, tl.float32)


@triton.jit
def draw(
    within,
    across,
    adjoint,
    key,
    lane,
    g,
    N: tl.constexpr,
    LE: tl.constexpr,
    LG: tl.constexpr,
    ONLY: tl.constexpr,
):
    """Which slots are chosen, and whether that is in doubt: the count, then its split down the tree of :mod:`.tree`.

    ONLY is the one count that is possible, 0 where there are others.
    """
    root = across[LG]
    K: tl.constexpr = ONLY if ONLY else len(root) - 1
    words = mixed(key)
    if ONLY:
        count = tl.zeros_like(root[0]).to(tl.int32) + ONLY
        doubt = count < 0
    else:
        count, doubt = _invert(_products(root, adjoint), uniform(words, g * 0, tl.float32))
    index, number = g * 0, g * 0 + 1
    for above in tl.static_range(LG):
        left, right = tree.siblings(across[LG - 1 - above], g, 1 << above)
        taken, near = _split(left, right, count, uniform(words, number + index, tl.float32), K)
        doubt = doubt | near
        side = (g >> above) & 1
        count = tl.where(side == 0, taken, count - taken)
        index, _ = tree.child(index, doubt, side, LE + LG - above, N)
        number += tree.nodes(LE + LG - above, N)
    for above in tl.static_range(LE):
        left, right = within[LE - 1 - above]
        u = _node_uniforms(words, number, lane, LE - above, LE, N)
        taken, near = _split(left, right, count, u, K)
        doubt = doubt | (near if len(near.shape) == 2 else tl.max(near.to(tl.int32), axis=0) > 0)
        count = tree.join(taken, count - taken)
        number += tree.nodes(LE - above, N)
    return count > 0, doubt


# ---------------------------------------------------------------------------------------------- in memory


@triton.jit
def _draw_count(posterior, count, u, K: tl.constexpr):
    """([] int32 count, [] int32 whether it is in doubt) by inversion of the posterior [1, counts] at u."""
    cumulative, total = tl.cumsum(posterior, axis=1), tl.sum(posterior, axis=1, keep_dims=True)
    before = count < K
    drawn = tl.sum(tl.sum(((cumulative <= u * total) & before).to(tl.int32), axis=1), axis=0)
    margin: tl.constexpr = MARGIN if posterior.dtype == tl.float32 else WIDE_MARGIN
    near = (tl.abs(cumulative - u * total) <= total * margin) & before
    return drawn, tl.max(tl.max(near.to(tl.int32), axis=1), axis=0)


@triton.jit
def _share(TREE, left, right, count, a, top, inside, LOG: tl.constexpr):
    """The weight of splitting ``count`` into a and the rest; with LOG its logarithm, less ``top`` and undone."""
    there = inside & (count >= a) & (count - a <= right[2])
    share = term(TREE, left, right, a, count - a, there, LOG)
    return tl.exp(share - top) if LOG else share


@triton.jit
def _split_level(TREE, COUNTS, words, number, level, N: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr):
    """Split the counts of level + 1, which stand at COUNTS, between the nodes of ``level``; whether one is in doubt."""
    slots, degree = extent(level, N, K)
    half = slots // 2
    kind: tl.constexpr = TREE.dtype.element_ty
    margin: tl.constexpr = MARGIN if kind == tl.float32 else WIDE_MARGIN
    near = 0
    start = 0
    while start < half:
        i = start + tl.arange(0, BLOCK)
        inside = i < half
        left, right = (i, slots, degree), (i + half, slots, degree)
        count = tl.load(COUNTS + i, mask=inside, other=0)
        u = uniform(words, number + i, kind)
        top = tl.zeros_like(u)
        if LOG:
            top += LOG_ZERO
            a = 0
            while a <= degree:
                there = inside & (count >= a) & (count - a <= degree)
                top = tl.maximum(top, term(TREE, left, right, a, count - a, there, LOG))
                a += 1
        total = tl.zeros_like(u)
        a = 0
        while a <= degree:
            total += _share(TREE, left, right, count, a, top, inside, LOG)
            a += 1
        cumulative, taken = tl.zeros_like(u), tl.zeros_like(count)
        a = 0
        while a < degree:
            cumulative += _share(TREE, left, right, count, a, top, inside, LOG)
            taken += (cumulative <= u * total).to(tl.int32)
            close = (tl.abs(cumulative - u * total) <= total * margin) & (count > 0)
            near = tl.maximum(near, tl.max(close.to(tl.int32), axis=0))
            a += 1
        # The counts of both levels share their memory: everyone has read before anyone writes.
        tl.debug_barrier()
        tl.store(COUNTS + i, taken, mask=inside)
        tl.store(COUNTS + i + half, count - taken, mask=inside)
        start += BLOCK
    tl.debug_barrier()
    return near


@triton.jit
def draw_in_memory(
    TREE, COUNTS, root, posterior, count, key, N: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr, LOG: tl.constexpr
):
    """Draw the count and split it down the tree of :mod:`.levels` to the leaves, at COUNTS; whether it is in doubt."""
    words = mixed(key)
    drawn, near = _draw_count(posterior, count, uniform(words, root * 0, posterior.dtype), K)
    tl.store(COUNTS, drawn)
    tl.debug_barrier()
    number, at, level = 1, root, DEPTH - 1
    if DEPTH > 0:  # see levels.up
        while level >= 0:
            slots, degree = extent(level, N, K)
            at -= (degree + 1) * slots
            near = tl.maximum(near, _split_level(TREE + at, COUNTS, words, number, level, N, K, LOG))
            number += slots // 2
            level -= 1
    return near
