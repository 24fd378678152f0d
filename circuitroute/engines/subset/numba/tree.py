"""The balanced tree of :mod:`circuitroute.engines.subset.torch.tree` in compiled form, for a few tokens at a time.

Legend: m nodes at a level, d their degree; ``shape`` [levels, 3] int64 tells each level's first coefficient, m and d.

The same nodes and pairs as there: node i is multiplied by node i + m/2, odd levels end in the polynomial 1.
Coefficients are kept until the way down, where adjoints take their place.
"""

from __future__ import annotations

from circuitroute.engines.subset.numba.simd.lanes import WIDTH, fill, inlined, store
from circuitroute.engines.subset.numba.simd.polynomials import adjoints, dual_adjoints, dual_product, product


@inlined
def node(shape, level, i):
    """Where node i of a level begins."""
    return (shape[level, 0] + i * (shape[level, 2] + 1)) * WIDTH


@inlined
def root(shape):
    """Where the root begins."""
    return shape[-1, 0] * WIDTH


@inlined
def fill_padding(tree, shape, n, constant):
    """Every level's padding as a constant polynomial (1 for values, 0 for tangents)."""
    real = n
    for level in range(len(shape)):
        for i in range(real, shape[level, 1]):
            for j in range(shape[level, 2] + 1):
                store(tree, node(shape, level, i) + j * WIDTH, fill(tree, constant if j == 0 else 0.0))
        real = shape[level, 1] // 2


@inlined
def up(tree, shape):
    """All levels from the leaves to the root."""
    for level in range(len(shape) - 1):
        half = shape[level, 1] // 2
        d, D = shape[level, 2], shape[level + 1, 2]
        for i in range(half):
            a, b, parent = node(shape, level, i), node(shape, level, i + half), node(shape, level + 1, i)
            product(tree, a, b, parent, d, D)


@inlined
def down(tree, shape, spare):
    """Adjoints of all nodes in the place of their values, from the root's in the place of its own."""
    for level in range(len(shape) - 2, -1, -1):
        half = shape[level, 1] // 2
        d, D = shape[level, 2], shape[level + 1, 2]
        for i in range(half):
            a, b, parent = node(shape, level, i), node(shape, level, i + half), node(shape, level + 1, i)
            adjoints(tree, a, b, parent, d, D, spare)


@inlined
def dual_up(tree, tangents, shape):
    """:func:`up` on dual numbers."""
    for level in range(len(shape) - 1):
        half = shape[level, 1] // 2
        d, D = shape[level, 2], shape[level + 1, 2]
        for i in range(half):
            a, b, parent = node(shape, level, i), node(shape, level, i + half), node(shape, level + 1, i)
            dual_product(tree, tangents, a, b, parent, d, D)


@inlined
def dual_down(tree, tangents, shape, spare, spare_tangent):
    """:func:`down` on dual numbers."""
    for level in range(len(shape) - 2, -1, -1):
        half = shape[level, 1] // 2
        d, D = shape[level, 2], shape[level + 1, 2]
        for i in range(half):
            a, b, parent = node(shape, level, i), node(shape, level, i + half), node(shape, level + 1, i)
            dual_adjoints(tree, tangents, a, b, parent, d, D, spare, spare_tangent)
