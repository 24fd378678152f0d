"""The sample of :mod:`circuitroute.engines.subset.torch.sampling` in compiled form, for a few tokens at a time.

Legend: as in :mod:`circuitroute.engines.subset.numba.tree`; u uniform in (0, 1). All per lane.

Uniforms, pairs and margins are the same: a lane is *uncertain* if rounding could have decided any of its splits.
"""

from __future__ import annotations

import numpy as np

from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    any_lane,
    as_int,
    as_kind_of,
    fill,
    gather,
    inlined,
    lane_numbers,
    largest_lane,
    load,
    magnitude,
    maximum,
    minimum,
    store,
    where,
    whole,
)
from circuitroute.engines.subset.numba.tree import node

_GOLDEN32 = np.int32(0x9E3779B9 - (1 << 32))
_FIRST = np.int32(0x7FEB352D)
_SECOND = np.int32(0x846CA68B - (1 << 32))


@inlined
def mix64(key):
    """:func:`circuitroute.keys.mix64` of one key, as (low, high) words."""
    x = mixed(np.uint64(key))
    return np.int32(x & np.uint64(0xFFFFFFFF)), np.int32(x >> np.uint64(32))


@inlined
def mixed(x):
    """:func:`circuitroute.keys.mix64` of one uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@inlined
def uniform(kind, low, high, number):
    """:func:`circuitroute.keys.uniform_at` of one number, in the dtype of ``kind``."""
    x = low ^ np.int32(number * np.int64(_GOLDEN32))
    x = (x ^ (x >> 16)) * _FIRST
    x = x ^ high
    x = (x ^ (x >> 15)) * _SECOND
    x = x ^ (x >> 16)
    return (as_kind_of(kind, x) + 0.5) * 2.0**-32 + 0.5


@inlined
def draw(tree, shape, probs, key_T, first, last, margin, counts, words, spare):
    """Fill ``counts`` [N] with the sample, 0 or 1, of the rows' keys; returns the uncertain lanes.

    Args:
        probs: [J] float64, the count posterior.
        words, spare: room for two int32 lanes, and for the cumulative weights of one split.
    """
    for lane in range(WIDTH):
        words[lane], words[WIDTH + lane] = mix64(key_T[min(first + lane, last)])
    low, high = load(words, 0), load(words, WIDTH)
    count, uncertain = draw_count(probs, low, high, margin)
    store(counts, 0, count)
    return uncertain | split_counts(tree, shape, counts, low, high, margin, spare)


@inlined
def draw_count(probs, low, high, margin):
    """A count from each posterior [J] (float64): (int32 lanes, uncertain)."""
    u, total, J = uniform(probs, low, high, 0), fill(probs, 0.0), len(probs) // WIDTH
    for j in range(J):
        total += load(probs, j * WIDTH)
    threshold, allowance = u * total, total * margin
    reached, count, uncertain = fill(probs, 0.0), whole(0), u < 0.0
    for j in range(J - 1):
        reached += load(probs, j * WIDTH)
        gap = reached - threshold
        count += as_int(gap <= 0.0)
        uncertain = uncertain | (magnitude(gap) <= allowance)
    return count, uncertain


@inlined
def split_counts(tree, shape, counts, low, high, margin, reached):
    """Split the root's count, ``counts[0]``, down to the leaves, whose counts are 0 or 1; returns the uncertain lanes.

    Args:
        reached: room for the cumulative weights of one split.
    """
    uncertain = load(counts, 0) < 0
    number = 1
    for level in range(len(shape) - 2, -1, -1):
        half, d = shape[level, 1] // 2, shape[level, 2]
        for i in range(half):
            count = load(counts, i * WIDTH)
            left, right = count, count
            if any_lane(count > 0):
                u = uniform(tree, low, high, number + i)
                a, b = node(shape, level, i), node(shape, level, i + half)
                if d == 1:
                    left, right, doubt = _split_pair(tree, a, b, count, u, margin)
                else:
                    left, doubt = _split(tree, a, b, d, count, u, margin, reached)
                    right = count - left
                uncertain = uncertain | doubt
            store(counts, i * WIDTH, left)
            store(counts, (i + half) * WIDTH, right)
        number += half
    return uncertain


@inlined
def _split(tree, a, b, d, count, u, margin, reached):
    """How many of ``count`` go to the node at a, and where that is uncertain: inversion of the cumulative weights."""
    total = fill(tree, 0.0)
    most = min(d, largest_lane(count))
    for take in range(most + 1):
        rest = count - take
        inside = (rest >= 0) & (rest <= d)
        at = minimum(maximum(rest, whole(0)), whole(d)) * WIDTH + lane_numbers() + b
        weight = load(tree, a + take * WIDTH) * gather(tree, at)
        total = where(inside, total + weight, total)
        store(reached, take * WIDTH, total)
    threshold, allowance = u * total, total * margin
    left, doubt = whole(0), count < 0
    for take in range(most):
        gap = load(reached, take * WIDTH) - threshold
        left += as_int(gap <= 0.0)
        doubt = doubt | (magnitude(gap) <= allowance)
    return where(count > 0, left, whole(0)), doubt & (count > 0)


@inlined
def _split_pair(tree, a, b, count, u, margin):
    """The last split, between two variables: only a count of one leaves a choice."""
    in_right = load(tree, a) * load(tree, b + WIDTH)
    total = in_right + load(tree, a + WIDTH) * load(tree, b)
    gap = in_right - u * total
    both, one, to_left = count >= 2, count == 1, gap <= 0.0
    doubt = one & (magnitude(gap) <= total * margin)
    return as_int(both | (one & to_left)), as_int(both | (one & ~to_left)), doubt
