"""Products of polynomials whose coefficients are log-concave and of any size, to the relative precision of float64.

Legend: a, b coefficients 0..n, 0..l; c_j = sum_i a_i b_{j-i}; everything in bits, the logarithm to base 2.

The coefficients of products of coins are log-concave, so that log a_i + log b_{j-i} is concave in i: it has its maximum
where the two slopes are one, i*(j), the number of a's slopes among the j largest of both. Terms that are ``BITS`` below
it are left out, those beyond all of them: what is left is a band. By Efron's theorem (1965) the law of i given j is
stochastically increasing in j, so a block of outputs needs the i from the band's lower end at its first to the upper
end at its last. In a block a straight line, of the common slope at its middle, is taken off log a and log b; it comes
out of the sum as one factor, and what is left are float64 that neither overflow nor, where it matters, underflow. So a
block is a plain convolution of positive numbers, in which nothing cancels.

All together take O(n^1.5) for n coins that are not nearly certain, where the plain product takes O(n^2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from circuitroute.deadline import tick
from circuitroute.statistics.wide import Array, Wide, scaled

BITS = 64.0  # what is smaller than the largest term by this many is left out
RANGE = 1400.0  # slope at the first less that at the last output of a block, times outputs: twice what it drops at most
SNUG = 24.0  # the same for blocks that waste no work on what is beyond the band
FEW = 256  # outputs up to which a block is not worth splitting
FRACTION = 16  # bits of a slope after the point


class Block(NamedTuple):
    """Outputs ``first`` to ``last``, which take a_i for i from ``low`` to ``high``.

    Attributes:
        a, b: float64, a_i and b_l without the line; b from l = first - high on, 0 where there is none.
        exponents, factors: [outputs] what the line is there: int64 and float64; c_j = plain c_j * factor * 2^exponent.
    """

    first: int
    last: int
    low: int
    high: int
    a: Array
    b: Array
    exponents: Array
    factors: Array


def multiply(a: Wide, b: Wide) -> Wide:
    """All coefficients of the product; those of a and b are above 0."""
    size = len(a.m) + len(b.m) - 1
    m, e = np.empty(size), np.empty(size, dtype=np.int64)
    for block in _blocks(a, b):
        part = slice(block.first, block.last + 1)
        found = Wide.of(np.convolve(block.b, block.a, "valid") * block.factors, block.exponents)
        m[part], e[part] = found
    return Wide(m, e)


def shares(a: Wide, b: Wide, c: Wide, upstream: Array) -> tuple[Array, Array]:
    """The derivative of log c, times an upstream gradient, by log a and by log b.

    d log c_j / d log a_i = a_i b_{j-i} / c_j, the probability of i given j: sums to one over i, and overflows nowhere.
    """
    by_a, by_b = np.zeros(len(a.m)), np.zeros(len(b.m))
    for block in _blocks(a, b):
        part = slice(block.first, block.last + 1)
        plain = scaled(c.m[part] / block.factors, c.e[part] - block.exponents)
        weight = upstream[part] / plain
        by_a[block.low : block.high + 1] += block.a * np.correlate(block.b, weight, "valid")[::-1]
        start = block.first - block.high
        inside = slice(max(0, start), min(len(b.m), start + len(block.b)))
        gathered = block.b * np.convolve(weight, block.a[::-1])
        by_b[inside] += gathered[inside.start - start : inside.stop - start]
    return by_a, by_b


def _blocks(a: Wide, b: Wide) -> Iterator[Block]:
    log_a, log_b = a.log2(), b.log2()
    slopes, best = _merged(log_a, log_b)
    edges = _edges(slopes)
    firsts, lasts = edges[:-1], edges[1:] - 1
    lows = _band_end(log_a, log_b, firsts, best[firsts], -1)
    highs = _band_end(log_a, log_b, lasts, best[lasts], 1)
    for first, last, low, high in zip(*(x.tolist() for x in (firsts, lasts, lows, highs)), strict=True):
        tick(1 + (high - low) * (last - first) // 1000)
        middle = (first + last) // 2
        at_a = int(best[middle])
        near = slopes[max(0, middle - 1) : middle + 1]
        slope = round(float(near.mean()) * (1 << FRACTION)) if len(near) else 0
        at_b = middle - at_a
        lines = _lines(slope, np.arange(first - middle, last - middle + 1), 1)
        yield Block(
            first,
            last,
            low,
            high,
            _levelled(a, low, high, at_a, slope),
            _levelled(b, first - high, last - low, at_b, slope),
            lines[0] + a.e[at_a] + b.e[at_b],
            lines[1],
        )


def _merged(log_a: Array, log_b: Array) -> tuple[Array, Array]:
    """The slopes of both, falling; and i*(j) for every output j."""
    slopes = np.concatenate([np.diff(log_a), np.diff(log_b)])
    order = np.argsort(-slopes, kind="stable")
    best = np.concatenate([[0], np.cumsum(order < len(log_a) - 1)])
    return slopes[order], best


def _edges(slopes: Array) -> Array:
    """Where blocks of outputs 0..len(slopes) begin, and the end."""
    outputs, edges, size = len(slopes) + 1, [0], FEW
    while edges[-1] < outputs:
        start = edges[-1]
        size = min(2 * size, outputs - start)
        while size > 1:
            drop = size * float(slopes[start] - slopes[start + size - 2])
            if drop <= SNUG or (size <= FEW and drop <= RANGE):
                break
            size //= 2
        edges.append(start + size)
    return np.array(edges)


def _band_end(log_a: Array, log_b: Array, j: Array, best: Array, side: int) -> Array:
    """The last i on one side of i*(j) whose term is within ``BITS`` of the largest: by bisection, for all j at once."""
    limit = np.maximum(0, j - len(log_b) + 1) if side < 0 else np.minimum(len(log_a) - 1, j)
    floor = log_a[best] + log_b[j - best] - BITS
    inside, outside = best, limit + side
    while bool((np.abs(outside - inside) > 1).any()):
        middle = (inside + outside) // 2
        middle = np.where(np.abs(outside - inside) > 1, middle, inside)
        within = log_a[middle] + log_b[j - middle] >= floor
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
        outside = np.where(inside == outside, inside + side, outside)
    return inside


def _levelled(x: Wide, start: int, stop: int, reference: int, slope: int) -> Array:
    """x from start to stop, 0 beyond its ends, without the line of a slope through a reference."""
    inside = slice(max(0, start), min(len(x.m) - 1, stop) + 1)
    exponents, factors = _lines(slope, np.arange(inside.start - reference, inside.stop - reference), -1)
    found = np.zeros(stop - start + 1)
    found[inside.start - start : inside.stop - start] = scaled(
        x.m[inside] * factors, x.e[inside] - x.e[reference] + exponents
    )
    return found


def _lines(slope: int, steps: Array, sign: int) -> tuple[Array, Array]:
    """2^(sign slope steps) as exponents and factors in [1, 2); the slope is in units of 2^-FRACTION, so all is exact
    but for the factor's rounding."""
    rise = sign * slope * steps.astype(np.int64)
    whole = rise >> FRACTION
    return whole, np.exp2((rise - (whole << FRACTION)) * 2.0**-FRACTION)
