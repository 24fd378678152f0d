"""Literals as independent coins around a shift, for kernels; see :mod:`circuitroute.engines.coins`.

Shapes: x is one tensor [rows, lanes] or [slots, rows, lanes], or a tuple of them that together hold a row's logits;
what belongs to a row is [rows, 1]. Slots without a variable hold -inf. A shift is the pair (high, low) of floats.

FAST uses the approximate instructions of NVIDIA GPUs, right to one or two units in the last place; without it the
same formulas run under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from circuitroute.engines import coins, logspace

INFINITY = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_EXPONENT = tl.constexpr(coins.MAX_EXPONENT[torch.float32])
LOG_ZERO = tl.constexpr(logspace.LOG_ZERO)


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
    return tl.sum(tl.sum(x, axis=0) if len(x.shape) == 3 else x, axis=1, keep_dims=True)


@triton.jit
def along(row, x):
    """What belongs to a row, [rows, 1], in a shape that goes with ``x``."""
    if len(x.shape) == 3:
        return row[None, :, :]
    else:
        return row


@triton.jit
def exact(shift):
    """The shift in float64."""
    high, low = shift
    return high.to(tl.float64) + low.to(tl.float64)


@triton.jit
def from_exact(shift):
    """The pair of floats of a float64 shift."""
    high = shift.to(tl.float32)
    return high, (shift - high.to(tl.float64)).to(tl.float32)


@triton.jit
def coin(x, shift, FAST: tl.constexpr):
    """Probabilities (absent, present) of a coin with logit x - shift, both to full relative accuracy."""
    high, low = shift
    against = exp2(tl.minimum((along(high, x) - x) + along(low, x), MAX_EXPONENT) * LOG2E, FAST)
    present = reciprocal(1.0 + against, FAST)
    return against * present, tl.where(x == -INFINITY, 0.0, present)


@triton.jit
def _log2_of_product(x):
    """The log of each lane's product; no entry is below 1/4, and slots are few."""
    return tl.log2(tl.reduce(x, 0, _times) if len(x.shape) == 3 else x)


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def log_normaliser(x, shift, FAST: tl.constexpr, coins=None):
    """[rows, 1] float64 log normaliser of the coins, which are a pair for each tensor of ``x`` where they are known."""
    above_sum = tl.zeros_like(x[0]).to(tl.float64)
    above_count, larger = tl.zeros_like(x[0]), tl.zeros_like(x[0]) + 1.0
    for e in tl.static_range(len(x)):
        absent, present = coin(x[e], shift, FAST) if coins is None else coins[e]
        above = (present > absent) & (x[e] < INFINITY)
        above_sum += tl.where(above, x[e], 0.0).to(tl.float64)
        above_count += tl.where(above, 1.0, 0.0)
        larger *= tl.maximum(absent, present)
    sums = row_sum(above_sum) - exact(shift) * row_sum(above_count).to(tl.float64)
    return sums - row_sum(_log2_of_product(larger)).to(tl.float64) * LN2


@triton.jit
def log_coins(x, shift):
    """(absent, present, log normaliser) in logarithms, of a float64 shift; see :mod:`circuitroute.engines.logspace`."""
    infinite = tl.abs(x) == INFINITY
    centred = tl.where(infinite, 0.0, x.to(tl.float64)) - shift
    tail = tl.log(1.0 + tl.exp(-tl.abs(centred)))
    absent, present = -tl.maximum(centred, 0.0) - tail, tl.minimum(centred, 0.0) - tail
    absent = tl.where(infinite, tl.where(x == INFINITY, LOG_ZERO, 0.0), absent)
    present = tl.where(infinite, tl.where(x == INFINITY, 0.0, LOG_ZERO), present)
    each = tl.where(infinite, 0.0, tl.maximum(centred, 0.0) + tail)
    return absent, present, tl.sum(each, axis=1, keep_dims=True)
