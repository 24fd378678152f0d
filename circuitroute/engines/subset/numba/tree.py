"""The balanced tree of :mod:`circuitroute.engines.subset.torch.tree` in compiled form, for a few tokens at a time.

Legend: m nodes at a level, d their degree; ``shape`` [levels, 4] int64 has each level's first coefficient, m (padded to
pairs), d, and the largest mean for which d is enough (n where nothing is left out, :mod:`.narrow`).

Nodes and pairs are the same: node i is multiplied by node i + m/2, and odd levels end in the polynomial 1.
Coefficients are kept until the way down, where adjoints take their place.
"""

from __future__ import annotations

import math

from circuitroute.engines.subset.numba.simd.lanes import WIDTH, as_double, as_kind_of, fill, inlined, load, store
from circuitroute.engines.subset.numba.simd.polynomials import adjoints, dual_adjoints, dual_product, product


@inlined
def node(shape, level, i):
    """Where node i of a level begins."""
    return (shape[level, 0] + i * (shape[level, 2] + 1)) * WIDTH


@inlined
def root(shape):
    """Where the root begins, and its degree."""
    return shape[-1, 0] * WIDTH, shape[-1, 2]


@inlined
def put_root(tree, shape, values):
    """Float64 ``values``, one per count, in the place of the root's coefficients; 0 where there are fewer."""
    (start, degree), J = root(shape), len(values) // WIDTH
    for j in range(degree + 1):
        value = as_kind_of(tree, load(values, j * WIDTH)) if j < J else fill(tree, 0.0)
        store(tree, start + j * WIDTH, value)


@inlined
def coefficient(tree, start, degree, j):
    """Coefficient j of a node in float64; 0 beyond its degree."""
    return as_double(load(tree, start + j * WIDTH)) if j <= degree else as_double(fill(tree, 0.0))


@inlined
def size(shape):
    """Numbers per lane that the tree takes."""
    return shape[-1, 0] + shape[-1, 1] * (shape[-1, 2] + 1)


@inlined
def _pad(tree, shape, n, constant):
    """Every level's padding as a constant polynomial (1 for values, 0 for tangents)."""
    real = n
    for level in range(len(shape)):
        for i in range(real, shape[level, 1]):
            for j in range(shape[level, 2] + 1):
                store(tree, node(shape, level, i) + j * WIDTH, fill(tree, constant if j == 0 else 0.0))
        real = shape[level, 1] // 2


@inlined
def is_narrow(shape, n):
    """Whether coefficients are left out somewhere."""
    found = False
    for level in range(len(shape)):
        found = found or shape[level, 3] < n
    return found


@inlined
def strayed(tree, shape, present, n, means):
    """Of a narrow tree that is swept up: the lanes that need a whole one, by what :mod:`.narrow` takes for granted.

    Args:
        present: [N] the coins.
        means: room for N lanes.
    """
    for i in range(n):
        store(means, i * WIDTH, load(present, i * WIDTH))
    start, degree = root(shape)
    beyond = load(tree, start + degree * WIDTH) < 0.1 / math.sqrt(degree)
    real = n
    for level in range(1, len(shape) - 1):
        half = shape[level - 1, 1] // 2
        most = fill(tree, shape[level, 3])
        for i in range(half):
            mean = load(means, i * WIDTH)
            if i + half < real:
                mean += load(means, (i + half) * WIDTH)
            store(means, i * WIDTH, mean)
            beyond = beyond | ~(mean <= most)
        real = half
    return beyond


@inlined
def _level(shape, level):
    """How many pairs of children a level has, and the degrees of the children and of their parents."""
    return shape[level, 1] // 2, shape[level, 2], shape[level + 1, 2]


@inlined
def _family(shape, level, i, half):
    """Where two children and their parent begin."""
    return node(shape, level, i), node(shape, level, i + half), node(shape, level + 1, i)


@inlined
def up(tree, shape, n):
    """All levels from the leaves of ``n`` variables to the root."""
    _pad(tree, shape, n, 1.0)
    for level in range(len(shape) - 1):
        half, d, D = _level(shape, level)
        for i in range(half):
            a, b, parent = _family(shape, level, i, half)
            product(tree, a, b, parent, d, D)


@inlined
def down(tree, shape, spare):
    """Adjoints of all nodes in the place of their values, from the root's in the place of its own."""
    for level in range(len(shape) - 2, -1, -1):
        half, d, D = _level(shape, level)
        for i in range(half):
            a, b, parent = _family(shape, level, i, half)
            adjoints(tree, spare, a, b, parent, d, D)


@inlined
def dual_up(tree, tangents, shape, n):
    """:func:`up` on dual numbers."""
    _pad(tree, shape, n, 1.0)
    _pad(tangents, shape, n, 0.0)
    for level in range(len(shape) - 1):
        half, d, D = _level(shape, level)
        for i in range(half):
            a, b, parent = _family(shape, level, i, half)
            dual_product(tree, tangents, a, b, parent, d, D)


@inlined
def dual_down(tree, tangents, shape, spare):
    """:func:`down` on dual numbers."""
    for level in range(len(shape) - 2, -1, -1):
        half, d, D = _level(shape, level)
        for i in range(half):
            a, b, parent = _family(shape, level, i, half)
            dual_adjoints(tree, tangents, spare, a, b, parent, d, D)
