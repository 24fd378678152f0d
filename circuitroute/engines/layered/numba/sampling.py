"""The sample of :mod:`circuitroute.engines.layered.torch.sampling` in compiled form: one token of a block at a time.

Legend: as in :mod:`circuitroute.engines.layered.flat`.

A subset is a tree inside the circuit with one element per sum; only its sums are looked at. Uniforms are the same, and
weights are cumulated in float64, whatever the dtype of the values.
"""

from __future__ import annotations

import numpy as np

from circuitroute.engines.layered.numba.tree import merged
from circuitroute.engines.subset.numba.sampling import mixed
from circuitroute.engines.subset.numba.simd.lanes import WIDTH, inlined

_GOLDEN = np.uint32(0x9E3779B9)
_FIRST = np.uint32(0x7FEB352D)
_SECOND = np.uint32(0x846CA68B)


@merged
def _uniform(key, number):
    """:func:`circuitroute.keys.uniform_at` of one mixed key, in float64."""
    low, high = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    x = np.uint32(low ^ np.uint32(np.uint32(number) * _GOLDEN))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * _FIRST)
    x = np.uint32(x ^ high)
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * _SECOND)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    return (np.float64(np.int32(x)) + 0.5) * 2.0**-32 + 0.5


@merged
def _weight(values, left, right, e, lane):
    return np.float64(values[left[e] * WIDTH + lane]) * np.float64(values[right[e] * WIDTH + lane])


@merged
def _element(values, left, right, start, stop, lane, total, u, margin):
    """The element that the uniform picks by inversion, and whether rounding could have decided it."""
    threshold, allowance, reached, e, doubt = u * total, total * margin, 0.0, start, False
    while e < stop - 1:
        reached += _weight(values, left, right, e, lane)
        gap = reached - threshold
        doubt = doubt or (abs(gap) <= allowance)
        if gap > 0.0:
            break
        e += 1
    return e, doubt and total > 0.0


@merged
def _root_element(values, root, adjoint, lane, u, margin):
    """:func:`_element` of the root, whose elements are weighed by d log Z / d coefficient: the total is 1."""
    left, right, count = root
    reached, e, doubt = 0.0, 0, False
    while e < len(left) - 1:
        reached += _weight(values, left, right, e, lane) * adjoint[count[e] * WIDTH + lane]
        gap = reached - u
        doubt = doubt or (abs(gap) <= margin)
        if gap > 0.0:
            break
        e += 1
    return e, doubt


@inlined
def draw(values, elements, number, root, adjoint, key_T, first_token, last, margin, counts, stack, uncertain_T):
    """Fill ``counts`` [N] with the sample, 0 or 1, of the rows' keys, and mark the rows that are uncertain.

    Args:
        number: see :mod:`circuitroute.engines.layered.flat`; the root's comes last.
        root: its elements (left, right, count).
        adjoint: [J] float64, the weights of the coefficients over the total.
        stack: room for the rows that wait, at most one per level.
    """
    first, left, right = elements
    n = len(counts) // WIDTH
    for i in range(len(counts)):
        counts[i] = 0
    for lane in range(min(WIDTH, last + 1 - first_token)):
        key = mixed(np.uint64(key_T[first_token + lane]))
        e, uncertain = _root_element(values, root, adjoint, lane, _uniform(key, number[-1]), margin)
        stack[0], stack[1] = root[0][e], root[1][e]
        waiting = 2
        while waiting > 0:
            waiting -= 1
            r = stack[waiting]
            if r < 2 * n:
                counts[(r >> 1) * WIDTH + lane] = r & 1
            elif r > 2 * n:
                start, stop = first[r], first[r + 1]
                e = start
                if stop - start > 1:
                    total, u = np.float64(values[r * WIDTH + lane]), _uniform(key, number[r])
                    e, doubt = _element(values, left, right, start, stop, lane, total, u, margin)
                    uncertain = uncertain or doubt
                stack[waiting], stack[waiting + 1] = left[e], right[e]
                waiting += 2
        uncertain_T[first_token + lane] = uncertain
