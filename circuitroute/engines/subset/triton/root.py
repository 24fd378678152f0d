"""Where the way up ends and the way down starts, for kernels; see :mod:`circuitroute.engines.root`.

Shapes: what belongs to a count is a tuple of chunks [rows, lanes], count c G + g in lane g of chunk c. ``known`` is
what :func:`~circuitroute.engines.subset.triton.shift.evidence` found.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from circuitroute.engines import root
from circuitroute.engines.subset.triton.coins import INFINITY, LN2, LOG2E, LOG_ZERO, exp2, row_sum

SMALLEST_COEFFICIENT = tl.constexpr(root.SMALLEST_COEFFICIENT[torch.float32])
LOG2_SMALLEST = tl.constexpr(math.log2(root.SMALLEST_COEFFICIENT[torch.float32]))
LOG2_NEGLIGIBLE = tl.constexpr(root.NEGLIGIBLE[torch.float32] / math.log(2))
WIDE_SMALLEST = tl.constexpr(root.SMALLEST_COEFFICIENT[torch.float64])
WIDE_LOG_SMALLEST = tl.constexpr(math.log(root.SMALLEST_COEFFICIENT[torch.float64]))
WIDE_NEGLIGIBLE = tl.constexpr(root.NEGLIGIBLE[torch.float64])


@triton.jit
def allowed_range(phi, g, G: tl.constexpr):
    """(least, most, tilt) of a row's potential: its smallest and largest allowed count, and its slope between them."""
    least, most = tl.zeros_like(phi[0]) + INFINITY, tl.zeros_like(phi[0]) - INFINITY
    for c in tl.static_range(len(phi)):
        allowed = phi[c] > -INFINITY
        least = tl.minimum(least, tl.where(allowed, c * G + g, INFINITY).to(phi[0].dtype))
        most = tl.maximum(most, tl.where(allowed, c * G + g, -INFINITY).to(phi[0].dtype))
    least, most = tl.min(least, axis=1, keep_dims=True), tl.max(most, axis=1, keep_dims=True)
    none = most < least
    least, most = tl.where(none, 0.0, least), tl.where(none, 0.0, most)
    rise = tl.zeros_like(phi[0])
    for c in tl.static_range(len(phi)):
        rise += tl.where(c * G + g == most, phi[c], 0.0)
        rise -= tl.where(c * G + g == least, phi[c], 0.0)
    tilt = row_sum(rise) / tl.maximum(most - least, 1.0)
    tilt = tl.where((most > least) & (tl.abs(tilt) < INFINITY), tilt, 0.0)
    return least.to(tl.float32), most.to(tl.float32), tilt.to(tl.float32)


@triton.jit
def _power(exponent, FAST: tl.constexpr):
    """2^exponent in float32, of a float64 exponent of at most 127: the whole part is exact."""
    exponent = tl.maximum(exponent, -127.0)
    whole = tl.floor(exponent)
    bits = (whole.to(tl.int32) + 127) << 23
    return exp2((exponent - whole).to(tl.float32), FAST) * bits.to(tl.float32, bitcast=True)


@triton.jit
def weigh(coefficients, phi, g, shift, known, G: tl.constexpr, FAST: tl.constexpr):
    """(adjoint, posterior, log total, underflow) of the root, see :func:`circuitroute.engines.root.weigh`.

    Everything is in powers of two; scores are float64, since potential and shift may be of any size and cancel.
    Counts that evidence excludes have no weight to lose. ``shift`` is float64.
    """
    forced, undecided, _, _ = known
    exponents, scores = (), ()
    largest = tl.zeros_like(phi[0]).to(tl.float64) + LOG_ZERO
    for c in tl.static_range(len(phi)):
        count = (c * G + g).to(tl.float32)
        possible = (phi[c] > -INFINITY) & (count >= forced) & (count <= forced + undecided)
        exponent = (phi[c].to(tl.float64) + shift * (count - forced).to(tl.float64)) * LOG2E
        exponent = tl.where(possible, exponent, LOG_ZERO)
        found = coefficients[c] >= SMALLEST_COEFFICIENT
        log_coefficient = tl.log2(tl.where(found, coefficients[c], 1.0)).to(tl.float64)
        score = tl.where(found, exponent + log_coefficient, LOG_ZERO)
        largest = tl.maximum(largest, score)
        exponents, scores = exponents + (exponent,), scores + (score,)
    largest = tl.floor(tl.max(largest, axis=1, keep_dims=True))
    weights, shares = (), ()
    total = tl.zeros_like(coefficients[0])
    for c in tl.static_range(len(phi)):
        seen = scores[c] > LOG_ZERO
        weight = tl.where(seen, _power(tl.where(seen, exponents[c] - largest, -127.0), FAST), 0.0)
        share = weight * coefficients[c]
        total += share
        weights, shares = weights + (weight,), shares + (share,)
    total = row_sum(total)
    log2_total = largest + tl.log2(total).to(tl.float64)
    adjoint, posterior = (), ()
    hidden = tl.zeros_like(coefficients[0])
    for c in tl.static_range(len(phi)):
        adjoint = adjoint + (weights[c] / total,)
        posterior = posterior + (shares[c] / total,)
        bound = tl.where(coefficients[c] < SMALLEST_COEFFICIENT, exponents[c] + LOG2_SMALLEST, LOG_ZERO)
        hidden += tl.where(bound > log2_total - LOG2_NEGLIGIBLE, 1.0, 0.0)
    underflow = (row_sum(hidden) > 0.0) | (largest <= LOG_ZERO)
    return adjoint, posterior, log2_total * LN2, underflow


@triton.jit
def is_possible(phi, known, ONLY: tl.constexpr):
    """Whether evidence and potential, [rows, 1], leave the count ONLY."""
    forced, undecided, _, _ = known
    return (phi > -INFINITY) & (forced <= ONLY) & (forced + undecided >= ONLY)


@triton.jit
def weigh_one(coefficient, phi, shift, known, ONLY: tl.constexpr):
    """(adjoint, log total, underflow) where ONLY is the one allowed count: its posterior is 1.

    ``coefficient`` is its own, the same in all lanes of a row, ``phi`` [rows, 1] its potential.
    """
    forced = known[0]
    coefficient = tl.max(coefficient, axis=1, keep_dims=True)
    found = coefficient >= SMALLEST_COEFFICIENT
    coefficient = tl.where(found, coefficient, 1.0)
    log_total = phi.to(tl.float64) + shift * (ONLY - forced).to(tl.float64) + tl.log2(coefficient).to(tl.float64) * LN2
    return 1.0 / coefficient, log_total, (found & is_possible(phi, known, ONLY)) == 0


@triton.jit
def dual_weigh_one(coefficient, d_coefficient):
    """(adjoint, its tangent) likewise; the posterior does not move."""
    found = coefficient >= SMALLEST_COEFFICIENT
    adjoint = tl.where(found, 1.0 / tl.where(found, coefficient, 1.0), 0.0)
    return adjoint, 0.0 - adjoint * (adjoint * d_coefficient)  # the adjoint's square would overflow


@triton.jit
def dual_weigh(coefficients, d_coefficients, posterior, v):
    """(adjoint, its tangent, the posterior's tangent) of the root along v, from the posterior of the forward sweep.

    The adjoint is the posterior over the coefficients, and its slope is v_j - d log Z. No v stands for zeros.
    """
    adjoint, gain = (), ()
    mean = tl.zeros_like(posterior[0])
    for c in tl.static_range(len(posterior)):
        found = coefficients[c] >= SMALLEST_COEFFICIENT
        weight = tl.where(found, posterior[c] / coefficients[c], 0.0)
        adjoint = adjoint + (weight,)
        gain = gain + (weight * d_coefficients[c],)
        mean += gain[c]
    for c in tl.static_range(len(v)):
        mean += posterior[c] * v[c]
    mean = row_sum(mean)
    d_adjoint, d_posterior = (), ()
    for c in tl.static_range(len(posterior)):
        slope = v[c] - mean if len(v) > 0 else 0.0 - mean
        d_adjoint = d_adjoint + (adjoint[c] * slope,)
        d_posterior = d_posterior + (gain[c] + posterior[c] * slope,)
    return adjoint, d_adjoint, d_posterior


@triton.jit
def log_adjoint(phi, count, shift, forced, log_total):
    """The root's adjoint in logarithms, float64."""
    base = phi.to(tl.float64) + shift * (count - forced).to(tl.float64)
    return tl.where(phi > -INFINITY, base - log_total, LOG_ZERO)


@triton.jit
def wide_weigh(coefficients, phi, count, shift, known):
    """(adjoint, posterior, log total, underflow) of the root, as :func:`circuitroute.engines.root.weigh`, float64."""
    forced, undecided, _, _ = known
    weights = log_adjoint(phi, count, shift, forced, 0.0)
    found = coefficients >= WIDE_SMALLEST
    coefficients = tl.where(found, coefficients, 1.0)
    scores = tl.where(found, weights + tl.log(coefficients), LOG_ZERO)
    top = tl.max(scores, axis=1, keep_dims=True)
    log_total = top + tl.log(tl.sum(tl.exp(scores - top), axis=1, keep_dims=True))
    posterior = tl.exp(scores - log_total)
    possible = (phi > -INFINITY) & (count >= forced) & (count <= forced + undecided)
    hidden = possible & (found == 0) & (weights + WIDE_LOG_SMALLEST > log_total - WIDE_NEGLIGIBLE)
    hidden = tl.max(tl.where(hidden, 1, 0), axis=1, keep_dims=True)
    return tl.where(found, posterior / coefficients, 0.0), posterior, log_total, (hidden > 0) | (top < 0.5 * LOG_ZERO)


@triton.jit
def log_weigh(coefficients, phi, count, shift, forced):
    """(log adjoint, posterior, log total) of the root, as the naive engine has it; NaN where nothing is left."""
    weights = log_adjoint(phi, count, shift, forced, 0.0) + coefficients
    weights = tl.where(coefficients < 0.5 * LOG_ZERO, LOG_ZERO, weights)
    top = tl.max(weights, axis=1, keep_dims=True)
    total = tl.sum(tl.exp(weights - top), axis=1, keep_dims=True)
    log_total = tl.where(top < 0.5 * LOG_ZERO, float("nan"), top + tl.log(total))
    return log_adjoint(phi, count, shift, forced, log_total), tl.exp(weights - log_total), log_total
