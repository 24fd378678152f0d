"""The shift of :mod:`circuitroute.engines.shift` and its coins, in compiled form, for a few tokens at a time.

Legend: x [N] lanes of logits; s = high + low the shift; p, q = e p the coins; all per lane.

Step by step the algorithm there: Newton on log(F / target) inside a bracket found on the way, each lane frozen once its
expected count is within the tolerance, so that a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import math

from circuitroute.engines.shift import MAX_STEPS, TOLERANCE
from circuitroute.engines.subset.numba.simd.functions import exp, log, rough_log
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    any_lane,
    as_double,
    as_kind_of,
    fill,
    inlined,
    load,
    magnitude,
    maximum,
    minimum,
    store,
    where,
)


@inlined
def sigmoids(centred):
    """(p, q) with full relative accuracy in both; infinite arguments give exactly 0 and 1."""
    small = exp(-magnitude(centred))
    large = 1.0 / (small + 1.0)
    small = small * large
    positive = centred >= 0.0
    return where(positive, large, small), where(positive, small, large)


@inlined
def toss(x, n, high, low, tree, present):
    """Leaves of ``tree`` as coins with logits (x - high) - low; their expected count and its variance."""
    expected, variance = fill(x, 0.0), fill(x, 0.0)
    for i in range(n):
        p, q = sigmoids((load(x, i * WIDTH) - high) - low)
        store(tree, 2 * i * WIDTH, q)
        store(tree, (2 * i + 1) * WIDTH, p)
        store(present, i * WIDTH, p)
        expected += p
        variance += p * q
    return expected, variance


@inlined
def evidence(x, n):
    """Per lane: how many logits are +inf, how many are finite, and the largest and smallest of these (0 if none)."""
    zero = fill(x, 0.0)
    forced, finite, top, bottom = zero, zero, fill(x, -math.inf), fill(x, math.inf)
    for i in range(n):
        value = load(x, i * WIDTH)
        decided = magnitude(value) == math.inf
        forced = where(value == math.inf, forced + 1.0, forced)
        finite = where(decided, finite, finite + 1.0)
        top = maximum(top, where(decided, fill(x, -math.inf), value))
        bottom = minimum(bottom, where(decided, fill(x, math.inf), value))
    none = finite == 0.0
    return forced, finite, where(none, zero, top), where(none, zero, bottom)


@inlined
def _sum_exp(x, n, top):
    """Sum of exp(x - top) over finite logits."""
    total = fill(x, 0.0)
    for i in range(n):
        value = load(x, i * WIDTH)
        total = where(value == math.inf, total, total + exp(value - top))
    return total


@inlined
def _expected(x, n, tilt):
    """The expected count of coins with logits x + tilt."""
    total = fill(x, 0.0)
    for i in range(n):
        p, _ = sigmoids(load(x, i * WIDTH) + tilt)
        total += p
    return total


@inlined
def solve(x, n, forced, finite, top, bottom, fewest, most, tilt, tree, present):
    """Shifts (high, low) whose expected count lies in [fewest, most]; the coins are left in the tree.

    Returns:
        (high, low).
    """
    target, natural = fewest, fewest < most
    if any_lane(natural):
        expected = _expected(x, n, tilt)
        target = minimum(maximum(expected, fewest), most)
        natural = natural & (expected >= fewest) & (expected <= most)
    wanted = target - forced
    # Everything undecided is out, or in: any shift well past the last logit does.
    past = rough_log(maximum(finite, fill(x, 1.0))) + 2.0
    none_in, all_in = wanted <= 0.0, wanted >= finite
    total = _sum_exp(x, n, top)
    s = rough_log(total / maximum(wanted, fill(x, 1e-3)))
    s = where(none_in, past, where(all_in, (bottom - top) - past, s))
    s = where(natural, -tilt - top, s)
    return _newton(x, n, top, s, target, natural | none_in | all_in, tree, present)


@inlined
def _newton(x, n, top, s, target, done, tree, present):
    below, above, stride = fill(x, -math.inf), fill(x, math.inf), fill(x, 6.0)
    for step in range(MAX_STEPS + 1):
        high = top + s
        low = s - (high - top)
        F, V = toss(x, n, high, low, tree, present)
        done = done | (magnitude(F - target) <= TOLERANCE)
        if step == MAX_STEPS or not any_lane(~done):
            break
        too_many = target < F
        below, above = where(too_many, s, below), where(too_many, above, s)
        newton = s + rough_log(F / target) * F / V
        # No lower (upper) bound yet: walk down (up) by doubling strides instead of bisecting.
        bisect = (below + above) * 0.5
        bisect = where(below == -math.inf, s - stride, bisect)
        bisect = where(above == math.inf, s + stride, bisect)
        inside = (newton > below) & (newton < above) & (magnitude(newton - s) < stride)
        s = where(done, s, where(inside, newton, bisect))
        stride = stride * 2.0
    return high, low


@inlined
def log_normaliser(x, n, high, low, tree, spare):
    """float64 lanes: the sum of max(x - s, 0) - log max(p, q) over undecided variables.

    The first part is summed as the logits above s, less s times their number, as in
    :func:`circuitroute.engines.coins.log_normaliser`.

    Args:
        spare: float64, room for one lane.
    """
    zero = as_double(fill(x, 0.0))
    logits, number, log_product, product = zero, zero, zero, zero + 1.0
    for i in range(n):
        value, q, p = load(x, i * WIDTH), load(tree, 2 * i * WIDTH), load(tree, (2 * i + 1) * WIDTH)
        counted = (p > q) & (value < math.inf)
        logits += as_double(where(counted, value, fill(x, 0.0)))
        number += as_kind_of(spare, counted)
        # Each factor is at least 1/2, and rounded as the tree has it, so that rounding cancels.
        product = product * as_double(maximum(p, q))
        if i % 512 == 511:
            log_product, product = log_product + log(product, spare), zero + 1.0
    s = as_double(high) + as_double(low)
    return logits - s * number - log_product - log(product, spare)
