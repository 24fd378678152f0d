"""The tree of :mod:`circuitroute.engines.layered.torch.tree` in compiled form, for a few tokens at a time.

Legend: R rows, one per node, in the order of :mod:`circuitroute.engines.layered.flat`; ``elements`` = (first, left,
right) are the products of every row, ``uses`` = (first, parent, sibling) where it is a factor. Values, tangents and
adjoints are [R] lanes.

Every row is written once: a value is the sum over its elements of left times right, an adjoint the sum over its uses of
the parent's adjoint times the sibling's value. So nothing is cleared, and nothing is added to in memory.

Added one after the other, thousands of float32 terms would lose two digits. So sums are taken in runs of ``RUN`` terms,
four at a time, and runs in runs of runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from circuitroute.engines.subset.numba.simd.lanes import WIDTH, fill, fma, inlined, load, store

RUN = 32
RUN_OF_RUNS = RUN * RUN


def merged(function: Callable[..., Any]) -> Any:
    """Compiled into its callers: a call of few additions would take longer than these, its arguments being arrays."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy", "forceinline": True}
    return numba.njit(**options)(function)


@merged
def _run(x, a, y, b, start, stop):
    """Sum of x[a[e]] y[b[e]] over a few elements."""
    total = fill(x, 0.0)
    e = start
    if stop - start >= 8:
        one, two, three = total, total, total
        while e + 4 <= stop:
            total = fma(load(x, a[e] * WIDTH), load(y, b[e] * WIDTH), total)
            one = fma(load(x, a[e + 1] * WIDTH), load(y, b[e + 1] * WIDTH), one)
            two = fma(load(x, a[e + 2] * WIDTH), load(y, b[e + 2] * WIDTH), two)
            three = fma(load(x, a[e + 3] * WIDTH), load(y, b[e + 3] * WIDTH), three)
            e += 4
        total = (total + one) + (two + three)
    while e < stop:
        total = fma(load(x, a[e] * WIDTH), load(y, b[e] * WIDTH), total)
        e += 1
    return total


@merged
def _sum(x, a, y, b, start, stop):
    """Sum of x[a[e]] y[b[e]] over any number of elements."""
    if stop - start <= RUN:
        return _run(x, a, y, b, start, stop)
    total = fill(x, 0.0)
    for outer in range(start, stop, RUN_OF_RUNS):
        last, part = min(outer + RUN_OF_RUNS, stop), fill(x, 0.0)
        for inner in range(outer, last, RUN):
            part += _run(x, a, y, b, inner, min(inner + RUN, last))
        total += part
    return total


@merged
def _dual_run(x, dx, a, y, dy, b, start, stop):
    """The tangent of :func:`_run`, whose factors move by dx and dy."""
    one, two = fill(x, 0.0), fill(x, 0.0)
    for e in range(start, stop):
        i, j = a[e] * WIDTH, b[e] * WIDTH
        one = fma(load(dx, i), load(y, j), one)
        two = fma(load(x, i), load(dy, j), two)
    return one + two


@merged
def _dual_sum(x, dx, a, y, dy, b, start, stop):
    """The tangent of :func:`_sum`."""
    if stop - start <= RUN:
        return _dual_run(x, dx, a, y, dy, b, start, stop)
    total = fill(x, 0.0)
    for outer in range(start, stop, RUN_OF_RUNS):
        last, part = min(outer + RUN_OF_RUNS, stop), fill(x, 0.0)
        for inner in range(outer, last, RUN):
            part += _dual_run(x, dx, a, y, dy, b, inner, min(inner + RUN, last))
        total += part
    return total


@inlined
def up(elements, values, n):
    """Fill the sums' values, given those of the literals."""
    first, left, right = elements
    store(values, 2 * n * WIDTH, fill(values, 1.0))
    for r in range(2 * n + 1, len(first) - 1):
        store(values, r * WIDTH, _sum(values, left, values, right, first[r], first[r + 1]))


@inlined
def dual_up(elements, values, tangents, n):
    """:func:`up` on dual numbers."""
    first, left, right = elements
    store(values, 2 * n * WIDTH, fill(values, 1.0))
    store(tangents, 2 * n * WIDTH, fill(values, 0.0))
    for r in range(2 * n + 1, len(first) - 1):
        start, stop = first[r], first[r + 1]
        store(values, r * WIDTH, _sum(values, left, values, right, start, stop))
        store(tangents, r * WIDTH, _dual_sum(values, tangents, left, values, tangents, right, start, stop))


@merged
def _before(i, n, top):
    """Row number i of the way down: the sums below the root, last to first, then the literals "present"."""
    sums = top - (2 * n + 1)
    return top - 1 - i if i < sums else 2 * (i - sums) + 1


@inlined
def down(uses, values, adjoints, n, top):
    """Fill the adjoints of all sums and literals "present", given those of the root's coefficients, rows ``top`` on."""
    first, parent, sibling = uses
    for i in range(top - n - 1):
        r = _before(i, n, top)
        store(adjoints, r * WIDTH, _sum(adjoints, parent, values, sibling, first[r], first[r + 1]))


@inlined
def dual_down(uses, values, tangents, adjoints, moved, n, top):
    """:func:`down` on dual numbers; ``moved`` are the tangents of the adjoints."""
    first, parent, sibling = uses
    for i in range(top - n - 1):
        r = _before(i, n, top)
        start, stop = first[r], first[r + 1]
        store(adjoints, r * WIDTH, _sum(adjoints, parent, values, sibling, start, stop))
        change = _dual_sum(adjoints, moved, parent, values, tangents, sibling, start, stop)
        store(moved, r * WIDTH, change)
