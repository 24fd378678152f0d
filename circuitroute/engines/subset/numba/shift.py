"""The shift of :mod:`circuitroute.engines.shift` in compiled form, for a few tokens at a time.

Legend: x [N] lanes of logits; s = high + low the shift; all per lane.

Step by step the algorithm there: Newton on log(F / target) inside a bracket found on the way, each lane frozen once its
expected count is within the tolerance, so that a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import math

from circuitroute.engines.shift import BEYOND, FIRST_STRIDE, LEAST_WANTED, MAX_STEPS, TOLERANCE
from circuitroute.engines.subset.numba.coins import coins, sigmoids
from circuitroute.engines.subset.numba.simd.functions import exp, rough_log
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    any_lane,
    fill,
    inlined,
    load,
    magnitude,
    maximum,
    minimum,
    where,
)


@inlined
def fill_aim(phi_PJ, first, last, aim):
    """Fill ``aim`` [3]: smallest and largest count of finite potential, and the potential's mean slope between them."""
    for lane in range(WIDTH):
        row = min(first + lane, last) if len(phi_PJ) > 1 else 0
        low, high = 0, 0
        for j in range(phi_PJ.shape[1] - 1, -1, -1):
            low = j if math.isfinite(phi_PJ[row, j]) else low
        for j in range(phi_PJ.shape[1]):
            high = j if math.isfinite(phi_PJ[row, j]) else high
        slope = (phi_PJ[row, high] - phi_PJ[row, low]) / (high - low) if high > low else 0.0
        aim[lane], aim[WIDTH + lane] = low, high
        aim[2 * WIDTH + lane] = slope if math.isfinite(slope) else 0.0


@inlined
def find_evidence(x, n):
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
def solve_shift(x, n, evidence, aim, tree, present):
    """Shifts (high, low) whose expected count lies in the range of ``aim``; the coins are left in the tree.

    Also returns the sum of exp(x - top) over finite logits, which a softmax wants too.
    """
    forced, finite, top, bottom = evidence
    fewest, most, tilt = load(aim, 0), load(aim, WIDTH), load(aim, 2 * WIDTH)
    target, natural = fewest, fewest < most
    if any_lane(natural):
        expected = _expected(x, n, tilt)
        target = minimum(maximum(expected, fewest), most)
        natural = natural & (expected >= fewest) & (expected <= most)
    wanted = target - forced
    # All undecided variables are out, or all are in: any shift well beyond the last logit will do.
    past = rough_log(maximum(finite, fill(x, 1.0))) + BEYOND
    none_in, all_in = wanted <= 0.0, wanted >= finite
    total = _sum_exp(x, n, top)
    s = rough_log(total / maximum(wanted, fill(x, LEAST_WANTED)))
    s = where(none_in, past, where(all_in, (bottom - top) - past, s))
    s = where(natural, -tilt - top, s)
    high, low = _newton(x, n, top, s, target, natural | none_in | all_in, tree, present)
    return high, low, total


@inlined
def _newton(x, n, top, s, target, done, tree, present):
    below, above, stride = fill(x, -math.inf), fill(x, math.inf), fill(x, FIRST_STRIDE)
    for step in range(MAX_STEPS + 1):
        high = top + s
        low = s - (high - top)
        F, V = coins(x, n, high, low, tree, present)
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
