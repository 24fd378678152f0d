"""The root of :mod:`circuitroute.engines.root` in compiled form, for a few tokens at a time.

Legend: J counts; all per lane. Weights are float64 whatever the dtype of the tree.
"""

from __future__ import annotations

import math

from circuitroute.engines.subset.numba.simd.functions import exp, exponent_log, log
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    any_lane,
    fill,
    inlined,
    load,
    magnitude,
    maximum,
    store,
    where,
)
from circuitroute.engines.subset.numba.tree import coefficient, root


@inlined
def weigh(tree, shape, phi, s, forced, limits, adjoint, probs, spare):
    """Weigh count j by exp(phi_j + s (j - forced)); fill in its share of Z and d log Z / d coefficient.

    Scores are taken relative to the power of two of the largest, so that only the total needs a logarithm.

    Args:
        limits: (floor, negligible, ...): the smallest coefficient to trust, and -log of a share that does not matter.
        adjoint, probs: [J] float64, filled with d log Z / d coefficient and with the shares.
        spare: float64, room for one lane.

    Returns:
        (log_total, whether a count that matters may have lost its coefficient).
    """
    (start, degree), J, floor, negligible = root(shape), len(phi) // WIDTH, limits[0], limits[1]
    nothing, zero = fill(phi, -math.inf), fill(phi, 0.0)
    largest = nothing
    for j in range(J):
        log_weight = load(phi, j * WIDTH) + s * (fill(phi, j) - forced)
        c = coefficient(tree, start, degree, j)
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
def weigh_tangent(tangents, shape, v, adjoint, probs):
    """With A_j the adjoint, q_j the shares and c_j the coefficients, dc_j their tangents, as ``torch`` derives it:

    d log Z = sum_j A_j dc_j + q_j v_j,    dA_j = A_j (v_j - d log Z),    dq_j = A_j dc_j + q_j (v_j - d log Z).

    Args:
        v: [J] float64, its place is taken by dq.
        probs: likewise by dA.
    """
    (start, degree), J, slope = root(shape), len(v) // WIDTH, fill(v, 0.0)
    for j in range(J):
        A, q = load(adjoint, j * WIDTH), load(probs, j * WIDTH)
        slope += A * coefficient(tangents, start, degree, j) + q * load(v, j * WIDTH)
    for j in range(J):
        A, q, excess = load(adjoint, j * WIDTH), load(probs, j * WIDTH), load(v, j * WIDTH) - slope
        store(v, j * WIDTH, A * coefficient(tangents, start, degree, j) + q * excess)
        store(probs, j * WIDTH, A * excess)
