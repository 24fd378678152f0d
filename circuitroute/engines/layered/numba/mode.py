"""The most probable subset of :mod:`circuitroute.engines.layered.torch.sweep` in compiled form.

Legend: as in :mod:`circuitroute.engines.layered.flat`; T tokens.

In float64, where each value is the very number the naive engine computes: a sum of logits, or the largest of a few. So
equals are equals, and the rows that meet some on the way down are marked.
"""

from __future__ import annotations

import numpy as np

from circuitroute.engines.layered.numba.sweep import digest
from circuitroute.engines.layered.numba.tree import merged
from circuitroute.engines.logspace import LOG_ZERO
from circuitroute.engines.subset.numba.simd.lanes import WIDTH, fill, inlined, load, maximum, minimum, store
from circuitroute.engines.subset.numba.simd.rows import read, write
from circuitroute.engines.subset.numba.sweep import kernel, room


@inlined
def _log_weights(x, n, values):
    """:func:`circuitroute.engines.logspace.log_weights` of the literals."""
    zero, nothing = fill(x, 0.0), fill(x, LOG_ZERO)
    for i in range(n):
        logit = load(x, i * WIDTH)
        store(values, 2 * i * WIDTH, maximum(minimum(-logit, zero), nothing))
        store(values, (2 * i + 1) * WIDTH, maximum(minimum(logit, zero), nothing))
    store(values, 2 * n * WIDTH, zero)


@inlined
def _largest_up(elements, values, n, top):
    """Fill the values of the sums below the root: the largest of their elements."""
    first, left, right = elements
    for r in range(2 * n + 1, top):
        best = fill(values, 2 * LOG_ZERO)
        for e in range(first[r], first[r + 1]):
            best = maximum(load(values, left[e] * WIDTH) + load(values, right[e] * WIDTH), best)
        store(values, r * WIDTH, best)


@merged
def _best(values, left, right, start, stop, lane):
    """(the first element with the largest value, whether that is more than log 0, whether others have it too)."""
    chosen, best, many = start, 2 * LOG_ZERO, False
    for e in range(start, stop):
        value = values[left[e] * WIDTH + lane] + values[right[e] * WIDTH + lane]
        many = many or value == best
        if value > best:
            chosen, best, many = e, value, False
    possible = best >= LOG_ZERO / 2
    return chosen, possible, many and possible


@inlined
def _walk(values, elements, root, lane, chosen, stack):
    """Fill the column ``lane`` of ``chosen`` [N] with 0 and 1; returns whether there are equals on the way."""
    first, left, right = elements
    n = len(chosen) // WIDTH
    e, possible, tied = _best(values, root[0], root[1], 0, len(root[0]), lane)
    stack[0], stack[1] = root[0][e], root[1][e]
    waiting = 2 if possible else 0
    while waiting > 0:
        waiting -= 1
        r = stack[waiting]
        if r < 2 * n:
            chosen[(r >> 1) * WIDTH + lane] = r & 1
        elif r > 2 * n:
            e, start, stop = first[r], first[r], first[r + 1]
            if stop - start > 1:
                e, _, many = _best(values, left, right, start, stop, lane)
                tied = tied or many
            stack[waiting], stack[waiting + 1] = left[e], right[e]
            waiting += 2
    return tied


def _mode_kernel(digest):
    """Logits to a most probable subset."""

    @kernel
    def circuit_mode(rows, elements, root, top, logits_TN, mask_TN, tied_T):
        """Fill ``rows`` = (start, stop) of the masks, all False where nothing is possible, and mark those with equals.

        Args:
            elements, root: see :mod:`circuitroute.engines.layered.flat`.
            top: the first row of the root's coefficients.
            logits_TN: float64.
        """
        _ = digest  # part of what the cache on disk knows this function by
        n, kind = logits_TN.shape[1], logits_TN.dtype
        x, values = room(n, kind), room(top, kind)
        chosen, stack = room(n, np.int32), np.empty(top + 2, np.int32)
        last = rows[1] - 1
        for first in range(rows[0], rows[1], WIDTH):
            read(logits_TN, first, last, x)
            _log_weights(x, n, values)
            _largest_up(elements, values, n, top)
            for i in range(len(chosen)):
                chosen[i] = 0
            for lane in range(min(WIDTH, last + 1 - first)):
                tied_T[first + lane] = _walk(values, elements, root, lane, chosen, stack)
            write(chosen, first, last, mask_TN)

    return circuit_mode


mode = _mode_kernel(digest())
