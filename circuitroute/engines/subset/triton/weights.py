"""The weights of a row's chosen variables and their slopes, for kernels; the rules are those of
:mod:`circuitroute.engines.step`.

Shapes as in :mod:`.coins`: theta is one tensor [rows, lanes] or [slots, rows, lanes]; what belongs to a row [rows, 1].
Slots without a variable hold -inf and are not chosen. The marginal rule is the callers': it needs no logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from circuitroute.engines import step
from circuitroute.engines.subset.triton.coins import INFINITY, LN2, LOG2E, along, coin, exp2, row_sum
from circuitroute.engines.subset.triton.decision import row_max

MAX_RELATIVE_LOGIT = tl.constexpr(step.MAX_RELATIVE_LOGIT)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def _power(x, FAST: tl.constexpr):
    """e^x."""
    return exp2(x * LOG2E, FAST)


@triton.jit
def scale(theta, chosen, N: tl.constexpr, COMBINE: tl.constexpr, FAST: tl.constexpr):
    """What the weights of a row are relative to: (top, total).

    Softmax is over all variables: forced ones (+inf) share all of it, and a row of -inf is left uniform. Infinities
    as the largest floats do that by themselves: next to them no other difference is seen.
    """
    if COMBINE == "softmax":
        top = row_max(_bounded(theta))
        total = row_sum(relative(theta, top, COMBINE, FAST))
        return top, tl.where(top == -LARGEST, N, total)  # without the slots of no variable
    elif COMBINE == "normalized":
        top = row_max(tl.where(chosen, tl.minimum(theta, LARGEST), -INFINITY))
        top = tl.where(top == -INFINITY, 0.0, top)
        total = row_sum(tl.where(chosen, relative(theta, top, COMBINE, FAST), 0.0))
        return top, tl.where(total > 0.0, total, 1.0)
    else:
        top = tl.zeros_like(row_max(theta))
        return top, top + 1.0


@triton.jit
def _bounded(theta):
    return tl.maximum(tl.minimum(theta, LARGEST), -LARGEST)


@triton.jit
def relative(theta, top, COMBINE: tl.constexpr, FAST: tl.constexpr):
    """Weights times the row's total."""
    top = along(top, theta)
    if COMBINE == "softmax":
        return _power(_bounded(theta) - top, FAST)
    elif COMBINE == "normalized":
        return _power(tl.minimum(tl.minimum(theta, LARGEST) - top, MAX_RELATIVE_LOGIT), FAST)
    else:
        return 1.0 / (1.0 + _power(-theta, FAST))


@triton.jit
def weights_of(theta, known, COMBINE: tl.constexpr, FAST: tl.constexpr):
    """The weights, of chosen and other variables alike."""
    return relative(theta, known[0], COMBINE, FAST) / along(known[1], theta)


@triton.jit
def slopes_of(theta, chosen, v, known, COMBINE: tl.constexpr, FAST: tl.constexpr):
    """(u, slope) for the gradient v that reaches the gates: what reaches the mask, and what reaches theta."""
    weight = weights_of(theta, known, COMBINE, FAST)
    taken = tl.where(chosen, v * weight, 0.0)
    if COMBINE == "sigmoid":
        return v * weight, taken * (1.0 - weight)
    mean = along(row_sum(taken), theta)
    if COMBINE == "softmax":
        return v * weight, taken - weight * mean
    else:
        away = weight * (v - mean)
        return away, tl.where(chosen, away, 0.0)


# ---------------------------------------------------------------------------------------------- probability


@triton.jit
def log_literals(x, chosen, shift, FAST: tl.constexpr, coins=None):
    """[rows, 1] float64, the log probability that coins around ``shift`` fall as chosen; tuples, as in :mod:`.coins`.

    The likelier sides first, of which none is below 1/2, then what it costs to be elsewhere: |x - s| each.
    """
    high, low = shift
    likelier, away = tl.zeros_like(x[0]) + 1.0, tl.zeros_like(x[0])
    for e in tl.static_range(len(x)):
        absent, present = coin(x[e], shift, FAST) if coins is None else coins[e]
        likelier *= tl.maximum(absent, present)
        distance = tl.abs((along(high, x[e]) - x[e]) + along(low, x[e]))
        apart = (chosen[e] != (present > absent)) & (tl.abs(x[e]) < INFINITY)
        away += tl.where(apart, distance, 0.0)
    product = tl.reduce(likelier, 0, _times) if len(likelier.shape) == 3 else likelier
    logs = row_sum(tl.log2(product)).to(tl.float64) * LN2
    return logs - row_sum(away).to(tl.float64)


@triton.jit
def _times(a, b):
    return a * b


# ---------------------------------------------------------------------------------------------- what needs no sweep


@triton.jit
def direct_slopes(upstream, row, inside):
    """(w0 - c, c): how the gradients of log Z and log p(z) weigh the moments and the decision; [rows, 1]."""
    score = tl.zeros_like(row).to(tl.float32)
    rest = score
    if upstream.log_prob is not None:
        score += tl.load(upstream.log_prob + row, mask=inside, other=0.0)
    if upstream.log_partition is not None:
        rest += tl.load(upstream.log_partition + row, mask=inside, other=0.0)
    return rest - score, score
