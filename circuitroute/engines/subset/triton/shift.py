"""Coins, the shift that centres them, and keyed uniforms: the kernels' share of ``coins``, ``shift`` and ``keys``.

Shapes: x is a tuple of tensors [rows, lanes] or [rows, lanes, slots], which together hold a row's logits; what
belongs to a row is [rows, 1]. Slots without a variable hold -inf.

FAST uses the approximate instructions of NVIDIA GPUs, right to one or two units in the last place; without it the
same formulas run under Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_EXPONENT = tl.constexpr(83.0)  # as in circuitroute.engines.coins
TOLERANCE = tl.constexpr(0.45)  # as in circuitroute.engines.shift
MAX_STEPS = tl.constexpr(60)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def row_sum(x):
    """[rows, 1], in the lanes' order."""
    return tl.sum(tl.sum(x, axis=2) if len(x.shape) == 3 else x, axis=1, keep_dims=True)


@triton.jit
def row_max(x):
    """[rows, 1]."""
    return tl.max(tl.max(x, axis=2) if len(x.shape) == 3 else x, axis=1, keep_dims=True)


@triton.jit
def along(row, x):
    """What belongs to a row, [rows, 1], in a shape that goes with ``x``."""
    if len(x.shape) == 3:
        return row[:, :, None]
    else:
        return row


@triton.jit
def coin(x, high, low, FAST: tl.constexpr):
    """Probabilities (absent, present) of a coin with logit x - (high + low), both to full relative accuracy."""
    against = exp2(tl.minimum((along(high, x) - x) + along(low, x), MAX_EXPONENT) * LOG2E, FAST)
    present = reciprocal(1.0 + against, FAST)
    return against * present, tl.where(x == -INFINITY, 0.0, present)


@triton.jit
def two_floats(top, s):
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
    top, bottom = row_max(top), -row_max(-bottom)
    none = undecided == 0
    return forced, undecided, tl.where(none, 0.0, top), tl.where(none, 0.0, bottom)


@triton.jit
def expected_count(x, high, low, FAST: tl.constexpr):
    """(F, V): mean and variance of the number of heads."""
    mean, variance = tl.zeros_like(x[0]), tl.zeros_like(x[0])
    for e in tl.static_range(len(x)):
        absent, present = coin(x[e], high, low, FAST)
        mean += present
        variance += present * absent
    return row_sum(mean), row_sum(variance)


@triton.jit
def solve_shift(x, forced, undecided, top, bottom, least, most, tilt, FAST: tl.constexpr):
    """The shift, as two floats, whose expected count lies in [least, most], as near as may be to -tilt.

    Newton on log(F / target) from s = logsumexp(theta) - log(target), inside a bracket found on the way, as in
    :func:`circuitroute.engines.shift.solve_shift`. Everything but s is relative to the largest finite logit.
    """
    target, natural = least, tl.zeros_like(least) > 0.0
    if tl.max(tl.max(most - least, axis=1), axis=0) > 0.0:
        mean, _ = expected_count(x, -tilt, tl.zeros_like(tilt), FAST)
        target = tl.minimum(tl.maximum(mean, least), most)
        natural = (mean >= least) & (mean <= most) & (most > least)
    wanted = target - forced
    none_in, all_in = wanted <= 0.0, wanted >= undecided
    # Everything undecided is out, or in: any shift well past the last logit does.
    past = tl.log(tl.maximum(undecided, 1.0)) + 2.0
    weight = tl.zeros_like(x[0])
    for e in tl.static_range(len(x)):
        weight += tl.where(x[e] < INFINITY, exp2((x[e] - along(top, x[e])) * LOG2E, FAST), 0.0)
    s = tl.log(row_sum(weight) / tl.maximum(wanted, 1e-3))
    s = tl.where(none_in, past, tl.where(all_in, bottom - top - past, s))
    s = tl.where(natural, -tilt - top, s)

    settled = (natural | none_in | all_in).to(tl.int32)
    lower, upper, stride = s * 0.0 - INFINITY, s * 0.0 + INFINITY, s * 0.0 + 6.0
    unsettled = tl.max(tl.max(1 - settled, axis=1), axis=0)
    step = 0
    while (unsettled > 0) & (step < MAX_STEPS):
        high, low = two_floats(top, s)
        mean, variance = expected_count(x, high, low, FAST)
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
    return two_floats(top, s)


@triton.jit
def _log2_of_product(x):
    """The log of each lane's product; no entry is below 1/4, and slots are few."""
    return tl.log2(tl.reduce(x, 2, _times) if len(x.shape) == 3 else x)


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def excess(x, high, low, FAST: tl.constexpr):
    """[rows, 1] float64, log normaliser of the coins; see :func:`circuitroute.engines.coins.log_normaliser`."""
    above_sum = tl.zeros_like(x[0]).to(tl.float64)
    above_count, larger = tl.zeros_like(x[0]), tl.zeros_like(x[0]) + 1.0
    for e in tl.static_range(len(x)):
        absent, present = coin(x[e], high, low, FAST)
        above = (present > absent) & (x[e] < INFINITY)
        above_sum += tl.where(above, x[e], 0.0).to(tl.float64)
        above_count += tl.where(above, 1.0, 0.0)
        larger *= tl.maximum(absent, present)
    shift = high.to(tl.float64) + low.to(tl.float64)
    sums = row_sum(above_sum) - shift * row_sum(above_count).to(tl.float64)
    return sums - row_sum(_log2_of_product(larger)).to(tl.float64) * LN2


@triton.jit
def mixed(key):
    """(low, high) words of the row's key, as in :func:`circuitroute.keys.mix64`."""
    x = key.to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def uniform(low, high, number, DTYPE: tl.constexpr):
    """The uniform with this number, in (0, 1), as in :func:`circuitroute.keys.uniform_at`."""
    x = (number.to(tl.uint32) * 0x9E3779B9) ^ low
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ high
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x.to(tl.int32, bitcast=True).to(DTYPE) + 0.5) * 2.3283064365386963e-10 + 0.5
