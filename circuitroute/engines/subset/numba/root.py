"""The rule of :mod:`circuitroute.engines.root` in compiled form, for a few tokens at a time.

Legend: J counts; all per lane. Weights are float64 whatever the dtype of the tree.
"""

from __future__ import annotations

import math

from circuitroute.engines.subset.numba.simd.functions import exp, exponent_log, log
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    any_lane,
    as_double,
    fill,
    inlined,
    load,
    magnitude,
    maximum,
    store,
    where,
)


@inlined
def weigh(tree, root, degree, phi, s, forced, floor, negligible, adjoint, probs, spare):
    """Weigh count j by exp(phi_j + s (j - forced)); fill in its share of Z and d log Z / d coefficient.

    Scores are taken relative to the power of two of the largest, so that only the total needs a logarithm.

    Args:
        adjoint, probs: [J] float64, filled with d log Z / d coefficient and with the shares.
        spare: float64, room for one lane.

    Returns:
        (log_total, whether a count that matters may have lost its coefficient).
    """
    J = len(phi) // WIDTH
    nothing, zero = fill(phi, -math.inf), fill(phi, 0.0)
    largest = nothing
    for j in range(J):
        log_weight = load(phi, j * WIDTH) + s * (fill(phi, j) - forced)
        c = _coefficient(tree, root, degree, j)
        store(adjoint, j * WIDTH, log_weight)
        store(probs, j * WIDTH, c)
        largest = maximum(largest, where(c < floor, nothing, log_weight + exponent_log(c)))
    total, hidden = zero, nothing
    for j in range(J):
        log_weight, c = load(adjoint, j * WIDTH), load(probs, j * WIDTH)
        lost, weight = c < floor, zero
        if any_lane(log_weight > -math.inf):
            weight = where(lost, zero, exp(log_weight - largest))
            hidden = maximum(hidden, where(lost, log_weight, nothing))
        store(adjoint, j * WIDTH, weight)
        total += weight * c
    log_total = largest + log(total, spare)
    for j in range(J):
        weight = load(adjoint, j * WIDTH) / total
        store(adjoint, j * WIDTH, weight)
        store(probs, j * WIDTH, weight * load(probs, j * WIDTH))
    underflow = ~(magnitude(log_total) < math.inf) | (hidden + math.log(floor) > log_total - negligible)
    return log_total, underflow


@inlined
def _coefficient(tree, root, degree, j):
    return as_double(load(tree, root + j * WIDTH)) if j <= degree else as_double(fill(tree, 0.0))
