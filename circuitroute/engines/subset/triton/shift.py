"""The shift that centres a row's coins, for kernels: :mod:`circuitroute.engines.shift`, shapes as in :mod:`.coins`."""

from __future__ import annotations

import triton
import triton.language as tl

from circuitroute.engines import shift
from circuitroute.engines.subset.triton.coins import INFINITY, LOG2E, along, coin, exp2, row_sum

TOLERANCE = tl.constexpr(shift.TOLERANCE)
MAX_STEPS = tl.constexpr(shift.MAX_STEPS)


@triton.jit
def _row_max(x):
    """[rows, 1]."""
    return tl.max(tl.max(x, axis=0) if len(x.shape) == 3 else x, axis=1, keep_dims=True)


@triton.jit
def _two_floats(top, s):
    """top + s as the unevaluated sum of two floats: one would lose the digits of s when logits are large."""
    high = top + s
    return high, s - (high - top)


@triton.jit
def evidence(x):
    """(forced, undecided, top, bottom) of a row: counts of +inf and of finite logits, and the latter's extent."""
    forced, undecided = tl.zeros_like(x[0]), tl.zeros_like(x[0])
    top, bottom = tl.zeros_like(x[0]) - INFINITY, tl.zeros_like(x[0]) + INFINITY
    for e in tl.static_range(len(x)):
        finite = tl.abs(x[e]) < INFINITY
        forced += tl.where(x[e] == INFINITY, 1.0, 0.0)
        undecided += tl.where(finite, 1.0, 0.0)
        top = tl.maximum(top, tl.where(finite, x[e], -INFINITY))
        bottom = tl.minimum(bottom, tl.where(finite, x[e], INFINITY))
    forced, undecided = row_sum(forced), row_sum(undecided)
    top, bottom = _row_max(top), -_row_max(-bottom)
    none = undecided == 0
    return forced, undecided, tl.where(none, 0.0, top), tl.where(none, 0.0, bottom)


@triton.jit
def _coins(x, shift, FAST: tl.constexpr):
    """A pair (absent, present) for each tensor of ``x``."""
    out = ()
    for e in tl.static_range(len(x)):
        out = out + (coin(x[e], shift, FAST),)
    return out


@triton.jit
def _no_coins(x):
    out = ()
    for e in tl.static_range(len(x)):
        out = out + ((tl.zeros_like(x[e]), tl.zeros_like(x[e])),)
    return out


@triton.jit
def _expected_count(coins):
    """(F, V): mean and variance of the number of heads."""
    mean, variance = tl.zeros_like(coins[0][0]), tl.zeros_like(coins[0][0])
    for e in tl.static_range(len(coins)):
        absent, present = coins[e]
        mean += present
        variance += present * absent
    return row_sum(mean), row_sum(variance)


@triton.jit
def _aim(x, allowed, FAST: tl.constexpr):
    """(target, whether -tilt has that expected count) of rows with any allowed counts."""
    least, most, tilt = allowed
    target, natural = least, tl.zeros_like(least) > 0.0
    if tl.max(tl.max(most - least, axis=1), axis=0) > 0.0:
        mean, _ = _expected_count(_coins(x, (-tilt, tl.zeros_like(tilt)), FAST))
        target = tl.minimum(tl.maximum(mean, least), most)
        natural = (mean >= least) & (mean <= most) & (most > least)
    return target, natural


@triton.jit
def _start(x, known, allowed, FAST: tl.constexpr, ONLY: tl.constexpr):
    """(s, target, whether s is right already): where Newton starts, relative to the largest finite logit."""
    forced, undecided, top, bottom = known
    if ONLY:
        target = tl.zeros_like(top) + ONLY
        natural, tilt = target < 0.0, tl.zeros_like(top)
    else:
        target, natural = _aim(x, allowed, FAST)
        tilt = allowed[2]
    wanted = target - forced
    none_in, all_in = wanted <= 0.0, wanted >= undecided
    # Everything undecided is out, or in: any shift well past the last logit does.
    past = tl.log(tl.maximum(undecided, 1.0)) + 2.0
    weight = tl.zeros_like(x[0])
    for e in tl.static_range(len(x)):
        weight += tl.where(x[e] < INFINITY, exp2((x[e] - along(top, x[e])) * LOG2E, FAST), 0.0)
    s = tl.log(row_sum(weight) / tl.maximum(wanted, 1e-3))
    s = tl.where(none_in, past, tl.where(all_in, bottom - top - past, s))
    return tl.where(natural, -tilt - top, s), target, natural | none_in | all_in


@triton.jit
def solve_shift(x, known, allowed, FAST: tl.constexpr, ONLY: tl.constexpr):
    """The shift alone, see :func:`solve_coins`."""
    shift, _ = solve_coins(x, known, allowed, FAST, ONLY)
    return shift


@triton.jit
def solve_coins(x, known, allowed, FAST: tl.constexpr, ONLY: tl.constexpr):
    """The shift (high, low) whose expected count lies in [least, most], as near as possible to -tilt; and its coins.

    Newton's method on log(F / target) from s = logsumexp(theta) - log(target), inside a bracket found on the way.
    ``known`` is what :func:`evidence` found, ``allowed`` is (least, most, tilt), or None where ONLY is the one allowed
    count of all rows. Coins are a pair (absent, present) for each tensor of ``x``.
    """
    top = known[2]
    s, target, settled = _start(x, known, allowed, FAST, ONLY)
    settled = settled.to(tl.int32)
    lower, upper, stride = s * 0.0 - INFINITY, s * 0.0 + INFINITY, s * 0.0 + 6.0
    shift, coins = _two_floats(top, s), _no_coins(x)
    unsettled = tl.full([], 1, tl.int32)  # coins are found in the loop alone: it is entered for settled rows, too
    step = 0
    while (unsettled > 0) & (step < MAX_STEPS):
        shift = _two_floats(top, s)
        coins = _coins(x, shift, FAST)
        mean, variance = _expected_count(coins)
        settled = tl.where(tl.abs(mean - target) <= TOLERANCE, 1, settled)
        above = mean > target
        lower, upper = tl.where(above, s, lower), tl.where(above, upper, s)
        newton = s + tl.log(mean / target) * mean / variance
        # No lower (upper) bound yet: walk down (up) by doubling strides instead of bisecting.
        careful = 0.5 * (lower + upper)
        careful = tl.where(lower == -INFINITY, s - stride, careful)
        careful = tl.where(upper == INFINITY, s + stride, careful)
        inside = (newton > lower) & (newton < upper) & (tl.abs(newton - s) < stride)
        s = tl.where(settled > 0, s, tl.where(inside, newton, careful))
        stride *= 2.0
        unsettled = tl.max(tl.max(1 - settled, axis=1), axis=0)
        step += 1
    return shift, coins
