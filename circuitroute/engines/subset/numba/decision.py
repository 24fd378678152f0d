"""The decision of a routing step in compiled form, for a few tokens at a time: the mode, slots in order, and weights.

Legend: N variables, J counts, S slots; a [N] the logits that are decided on, theta [N] those that the weights are made
of, z [N] int32 of 0 and 1; a list is [S] int32 ``keys`` (ranks of logits, decreasing) with the ``index`` of each. All
per lane.
"""

from __future__ import annotations

import math

import numpy as np

from circuitroute.engines.step import COMBINES, MAX_RELATIVE_LOGIT, SHARE
from circuitroute.engines.subset.numba.coins import sigmoids
from circuitroute.engines.subset.numba.sampling import mix64, mixed, uniform
from circuitroute.engines.subset.numba.shift import find_evidence
from circuitroute.engines.subset.numba.simd.functions import exp
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    any_lane,
    as_double,
    fill,
    gather,
    inlined,
    lane_numbers,
    largest_lane,
    load,
    magnitude,
    maximum,
    minimum,
    of_rank,
    rank_of,
    store,
    where,
    whole,
)

SOFTMAX, NORMALIZED, SIGMOID, MARGINAL = (COMBINES.index(x) for x in ("softmax", "normalized", "sigmoid", "marginal"))
_NOTHING, _LARGEST = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)
_MOST = float(np.finfo(np.float32).max)


def _folded_share() -> int:
    """What :func:`circuitroute.keys.fold_in` mixes with a key for the index ``SHARE``."""
    x, word = SHARE, (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


_FOLDED, _GOLDEN64 = np.uint64(_folded_share()), np.uint64(0x9E3779B97F4A7C15)


# ---------------------------------------------------------------------------------------------- lists


@inlined
def _insert(key, i, keys, index, depth):
    """Variable i into the first ``depth`` places of a list, after those of the same key."""
    carried, number = key, whole(i)
    for s in range(depth):
        at, which = load(keys, s * WIDTH), load(index, s * WIDTH)
        before = key > at
        store(keys, s * WIDTH, where(before, carried, at))
        store(index, s * WIDTH, where(before, number, which))
        carried, number = where(before, at, carried), where(before, which, number)


@inlined
def _clear(keys, index):
    for s in range(len(keys) // WIDTH):
        store(keys, s * WIDTH, whole(_NOTHING))
        store(index, s * WIDTH, whole(0))


@inlined
def list_all(values, n, keys, index):
    """The largest of all."""
    S = len(keys) // WIDTH
    _clear(keys, index)
    for i in range(n):
        key = rank_of(load(values, i * WIDTH))
        if i < S or any_lane(key > load(keys, (S - 1) * WIDTH)):
            _insert(key, i, keys, index, min(i + 1, S))


@inlined
def list_some(values, z, which, n, depth, keys, index):
    """The largest of those whose z is ``which``, ``depth`` of them."""
    _clear(keys, index)
    number = whole(0)
    for i in range(n):
        wanted = load(z, i * WIDTH) == which
        key = where(wanted, rank_of(load(values, i * WIDTH)), whole(_NOTHING))
        if any_lane(key > load(keys, (depth - 1) * WIDTH)):
            number += where(wanted, whole(1), whole(0))
            _insert(key, i, keys, index, min(largest_lane(number), depth))


@inlined
def list_slots(theta, z, n, count, lists):
    """The chosen by decreasing theta, then the others likewise."""
    keys, index, other_keys, other_index = lists
    S = len(keys) // WIDTH
    list_some(theta, z, 1, n, S, keys, index)
    unused = largest_lane(S - count)
    if unused <= 0:
        return
    list_some(theta, z, 0, n, unused, other_keys, other_index)
    for s in range(S):
        later = s - count  # which of the others is in slot s
        at = maximum(later, whole(0)) * WIDTH + lane_numbers()
        store(index, s * WIDTH, where(later >= 0, gather(other_index, at), load(index, s * WIDTH)))


# ---------------------------------------------------------------------------------------------- which


@inlined
def clean(x, n):
    """Zeros in the place of NaN, and the lanes that had some."""
    zero, lost = fill(x, 0.0), fill(x, 0.0) > 0.0
    for i in range(n):
        value = load(x, i * WIDTH)
        number = value == value
        lost = lost | ~number
        store(x, i * WIDTH, where(number, value, zero))
    return lost


@inlined
def possible(phi, forced, finite):
    """Whether some count has a potential and leaves a subset; both numbers as float64 lanes."""
    found = forced < 0.0
    for j in range(len(phi) // WIDTH):
        found = found | ((load(phi, j * WIDTH) > -math.inf) & (forced <= j) & (forced + finite >= j))
    return found


@inlined
def best_count(keys, phi, forced):
    """int32 lanes, the count of the mode, of :mod:`circuitroute.engines.subset.mode`; ``keys`` are the largest."""
    nothing = fill(phi, -math.inf)
    total, best, count = fill(phi, 0.0), nothing, whole(0)
    for j in range(len(phi) // WIDTH):
        if j > 0:
            value = as_double(of_rank(load(keys, (j - 1) * WIDTH)))
            total += where(value == math.inf, fill(phi, 0.0), value)
        score = where(forced > j, nothing, total + load(phi, j * WIDTH))
        better = score > best
        best, count = where(better, score, best), where(better, whole(j), count)
    return count


@inlined
def take_first(a, n, count, keys, index, ruled, z):
    """z is 1 for the first ``count`` of a list, in the lanes that are ruled."""
    at = maximum(count - 1, whole(0)) * WIDTH + lane_numbers()
    some = count > 0
    key, last = where(some, gather(keys, at), whole(_LARGEST)), where(some, gather(index, at), whole(-1))
    for i in range(n):
        mine = rank_of(load(a, i * WIDTH))
        taken = (mine > key) | ((mine == key) & (last >= i))
        store(z, i * WIDTH, where(ruled, where(taken, whole(1), whole(0)), load(z, i * WIDTH)))


@inlined
def sampled(key_T, first, last, share, words, line):
    """The lanes whose tokens are sampled."""
    for lane in range(WIDTH):
        key = (np.uint64(key_T[min(first + lane, last)]) ^ _FOLDED) + _GOLDEN64
        words[lane], words[WIDTH + lane] = mix64(mixed(key))
    return uniform(line, load(words, 0), load(words, WIDTH), 0) < share


@inlined
def count_chosen(z, n, invalid):
    """How many are chosen; none in invalid lanes, where z becomes 0."""
    count = whole(0)
    for i in range(n):
        chosen = where(invalid, whole(0), load(z, i * WIDTH))
        store(z, i * WIDTH, chosen)
        count += chosen
    return count


@inlined
def log_mismatch(x, z, tree, s, n):
    """float64: -|x_i - s| summed over undecided variables that are not what their coin is more likely to show."""
    total = as_double(fill(x, 0.0))
    zero = total
    for i in range(n):
        value = load(x, i * WIDTH)
        likely = load(tree, (2 * i + 1) * WIDTH) > load(tree, 2 * i * WIDTH)
        differs = (likely ^ (load(z, i * WIDTH) == 1)) & (magnitude(value) < math.inf)
        if any_lane(differs):
            total -= where(differs, magnitude(as_double(value) - s), zero)
    return total


# ---------------------------------------------------------------------------------------------- weights


@inlined
def softmax_parts(theta, n, evidence, total):
    """(some forced, all -inf, top, 1 / total), from ``evidence`` and the sum of exp(theta - top) over finite logits.

    Forced variables share all of it; in a row of -inf all have the same.
    """
    forced, finite, top, _ = evidence
    some, none = forced > 0.0, finite == 0.0
    return some, none, top, 1.0 / where(some, forced, where(none, fill(theta, n), total))


@inlined
def softmax_total(theta, n, top):
    """The sum of exp(theta - top) over logits below +inf."""
    total = fill(theta, 0.0)
    for i in range(n):
        value = load(theta, i * WIDTH)
        total += where(value == math.inf, fill(theta, 0.0), exp(value - top))
    return total


@inlined
def _softmax_share(value, parts, kind):
    """Softmax times its total."""
    some, none, top, _ = parts
    one, zero = fill(kind, 1.0), fill(kind, 0.0)
    return where(some, where(value == math.inf, one, zero), where(none, one, exp(value - top)))


@inlined
def relative(value, top, kind):
    """e^(theta - top), e^30 at most; +inf counts as the largest number, and a top of -inf as 0."""
    most = fill(kind, _MOST)
    value, top = minimum(value, most), minimum(top, most)
    top = where(top == -math.inf, fill(kind, 0.0), top)
    return exp(minimum(value - top, fill(kind, MAX_RELATIVE_LOGIT)))


@inlined
def weigh_slots(theta, parts, count, index, combine, marginals, weights):
    """Fill in the weights [S] of the chosen, which are the first ``count`` of the list; 0 after them.

    Args:
        parts: see :func:`softmax_parts`, for that rule.
        marginals: [N], likewise.
    """
    S = len(index) // WIDTH
    zero = fill(theta, 0.0)
    total, top, normaliser = zero, zero, zero
    for s in range(S):
        at = load(index, s * WIDTH) * WIDTH + lane_numbers()
        value = gather(marginals if combine == MARGINAL else theta, at)
        if combine == SOFTMAX:
            w = _softmax_share(value, parts, theta) * parts[3]
        elif combine == NORMALIZED:
            top = value if s == 0 else top
            w = relative(value, top, theta)
        elif combine == SIGMOID:
            w, _ = sigmoids(value)
        else:
            w = value
        w = where(count > s, w, zero)
        total += w
        store(weights, s * WIDTH, w)
    if combine == NORMALIZED:
        normaliser = where(total > 0.0, 1.0 / total, zero)
        for s in range(S):
            store(weights, s * WIDTH, load(weights, s * WIDTH) * normaliser)


@inlined
def weigh_all(theta, z, n, combine, weights):
    """Fill in every variable's weight [N], as if it were chosen; see :mod:`circuitroute.engines.step`."""
    zero = fill(theta, 0.0)
    if combine == SOFTMAX:
        evidence, total = find_evidence(theta, n), zero
        parts = softmax_parts(theta, n, evidence, fill(theta, 1.0))
        for i in range(n):
            e = _softmax_share(load(theta, i * WIDTH), parts, theta)
            total += e
            store(weights, i * WIDTH, e)
        inverse = 1.0 / total
        for i in range(n):
            store(weights, i * WIDTH, load(weights, i * WIDTH) * inverse)
    elif combine == NORMALIZED:
        total, top = zero, fill(theta, -math.inf)
        for i in range(n):
            top = where(load(z, i * WIDTH) == 1, maximum(top, load(theta, i * WIDTH)), top)
        for i in range(n):
            e = relative(load(theta, i * WIDTH), top, theta)
            total += where(load(z, i * WIDTH) == 1, e, zero)
            store(weights, i * WIDTH, e)
        normaliser = where(total > 0.0, 1.0 / total, fill(theta, 1.0))
        for i in range(n):
            store(weights, i * WIDTH, load(weights, i * WIDTH) * normaliser)
    elif combine == SIGMOID:
        for i in range(n):
            p, _ = sigmoids(load(theta, i * WIDTH))
            store(weights, i * WIDTH, p)
