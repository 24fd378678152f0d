"""The coins of :mod:`circuitroute.engines.coins` in compiled form, for a few tokens at a time.

Legend: x [N] lanes of logits; s = high + low the shift; p, q the probabilities of present and absent; all per lane.
"""

from __future__ import annotations

import math

from circuitroute.engines.subset.numba.simd.functions import exp, log
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    as_double,
    as_kind_of,
    fill,
    inlined,
    load,
    magnitude,
    maximum,
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
def coins(x, n, high, low, tree, present):
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
def log_normaliser(x, n, s, tree, spare):
    """float64 lanes: the sum of max(x - s, 0) - log max(p, q) over undecided variables, and that of log max(p, q).

    The first part is summed as the logits above s, less s times their number, for the reason that
    :func:`circuitroute.engines.coins.log_normaliser` gives.

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
    rest = log(product, spare)
    return logits - s * number - log_product - rest, log_product + rest
