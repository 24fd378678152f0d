"""Products of polynomials in compiled form, their adjoints, and both on dual numbers.

Legend: a node's coefficients lie one after the other, each as Lanes; d the degree of two children, D of their parent.

    product      ab,              (ab)_j = sum_i a_i b_{j-i},      truncated at x^D
    adjoints     A* of a parent:  A*_a = corr(A, b),  A*_b = corr(A, a),      corr(A, b)_i = sum_j A_{i+j} b_j
    dual         d(ab) = da b + a db,      d corr(A, b) = corr(dA, b) + corr(A, db)

Each has two forms. For the degrees that trees begin with, Python writes the sums out term by term (``_UNROLLED``), so
that coefficients stay in registers. For all others there are loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    fill,
    fma,
    fused,
    inlined,
    load,
    load_at,
    pointer,
    store,
    store_at,
)

_UNROLLED = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8))  # (d, D)

Vector = Any  # an LLVM value
Polynomial = Sequence[Vector]


# ---------------------------------------------------------------------------------------------- written out


class _Memory:
    """Polynomials in an array of floats, at given offsets."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any) -> None:
        self.builder = builder
        self._address = lambda at: pointer(context, builder, array_type, array, at)

    def _at(self, offset: Any, j: int) -> Any:
        return self._address(self.builder.add(offset, ir.Constant(offset.type, j * WIDTH)))

    def read(self, offset: Any, degree: int) -> list[Vector]:
        return [load_at(self.builder, self._at(offset, j)) for j in range(degree + 1)]

    def write(self, offset: Any, j: int, terms: Sequence[tuple[Vector, Vector]]) -> None:
        """The sum of the products of ``terms`` as coefficient j."""
        (a, b), *rest = terms
        total = self.builder.fmul(a, b)
        for a, b in rest:
            total = fused(self.builder, a, b, total)
        store_at(self.builder, self._at(offset, j), total)


def _times(a: Polynomial, b: Polynomial, j: int) -> list[tuple[Vector, Vector]]:
    """The terms of (ab)_j."""
    return [(a[i], b[j - i]) for i in range(len(a)) if 0 <= j - i < len(b)]


def _against(A: Polynomial, b: Polynomial, i: int) -> list[tuple[Vector, Vector]]:
    """The terms of corr(A, b)_i."""
    return [(A[i + j], b[j]) for j in range(len(b)) if i + j < len(A)]


def _switch(build: Callable[[_Memory, Any, Any, int, int], None]) -> Any:
    """An intrinsic (tree, tangents, a, b, parent, d, D) -> bool: ``build`` for the degrees of _UNROLLED, else False.

    For float32 only: float64 sums would not fit the registers anyway, and compiling takes time.
    ``tree`` and ``tangents`` are arrays that hold nodes at the same offsets a, b and parent.
    """

    def function(
        typingctx: Any, tree: Any, tangents: Any, a: Any, b: Any, parent: Any, d: Any, D: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            memories = [_Memory(context, builder, sig.args[i], args[i]) for i in (0, 1)]
            nodes, d, D = args[2:5], args[5], args[6]
            if sig.args[0].dtype != types.float32:
                return ir.Constant(ir.IntType(1), 0)
            key = builder.add(builder.shl(d, ir.Constant(d.type, 32)), D)
            end, before = builder.append_basic_block("end"), builder.block
            choice = builder.switch(key, end)
            handled = []
            for low, high in _UNROLLED:
                block = builder.append_basic_block(f"degrees_{low}_{high}")
                choice.add_case(ir.Constant(key.type, (low << 32) + high), block)
                builder.position_at_end(block)
                build(memories[0], memories[1], nodes, low, high)
                builder.branch(end)
                handled.append(block)
            builder.position_at_end(end)
            result = builder.phi(ir.IntType(1))
            result.add_incoming(ir.Constant(ir.IntType(1), 0), before)
            for block in handled:
                result.add_incoming(ir.Constant(ir.IntType(1), 1), block)
            return result

        i8 = types.int64
        return types.boolean(tree, tangents, i8, i8, i8, i8, i8), codegen

    return intrinsic(function)


def _build_product(tree: _Memory, _: _Memory, nodes: Any, d: int, D: int) -> None:
    a, b = tree.read(nodes[0], d), tree.read(nodes[1], d)
    for j in range(D + 1):
        tree.write(nodes[2], j, _times(a, b, j))


def _build_dual_product(tree: _Memory, tangents: _Memory, nodes: Any, d: int, D: int) -> None:
    a, b = tree.read(nodes[0], d), tree.read(nodes[1], d)
    da, db = tangents.read(nodes[0], d), tangents.read(nodes[1], d)
    for j in range(D + 1):
        tree.write(nodes[2], j, _times(a, b, j))
        tangents.write(nodes[2], j, _times(da, b, j) + _times(a, db, j))


def _wanted(d: int, D: int) -> range:
    """The coefficients whose adjoints matter: of leaves, only the second; they alone double their degree from 1."""
    return range(1, 2) if (d, D) == (1, 2) else range(d + 1)


def _build_adjoints(tree: _Memory, _: _Memory, nodes: Any, d: int, D: int) -> None:
    a, b, A = tree.read(nodes[0], d), tree.read(nodes[1], d), tree.read(nodes[2], D)
    for i in _wanted(d, D):
        tree.write(nodes[0], i, _against(A, b, i))
        tree.write(nodes[1], i, _against(A, a, i))


def _build_dual_adjoints(tree: _Memory, tangents: _Memory, nodes: Any, d: int, D: int) -> None:
    a, b, A = tree.read(nodes[0], d), tree.read(nodes[1], d), tree.read(nodes[2], D)
    da, db, dA = tangents.read(nodes[0], d), tangents.read(nodes[1], d), tangents.read(nodes[2], D)
    for child, other, d_other in ((nodes[0], b, db), (nodes[1], a, da)):
        for i in _wanted(d, D):
            tree.write(child, i, _against(A, other, i))
            tangents.write(child, i, _against(dA, other, i) + _against(A, d_other, i))


_small_product, _small_dual_product = _switch(_build_product), _switch(_build_dual_product)
_small_adjoints, _small_dual_adjoints = _switch(_build_adjoints), _switch(_build_dual_adjoints)


# ---------------------------------------------------------------------------------------------- in loops


@inlined
def _product_term(x, a, y, b, d, j, total):
    """total + (x_a y_b)_j for polynomials of degree d at a and b."""
    for i in range(max(0, j - d), min(j, d) + 1):
        total = fma(load(x, a + i * WIDTH), load(y, b + (j - i) * WIDTH), total)
    return total


@inlined
def _adjoint_term(x, parent, y, b, d, D, i, total):
    """total + corr(x_parent, y_b)_i."""
    for j in range(min(d, D - i) + 1):
        total = fma(load(x, parent + (i + j) * WIDTH), load(y, b + j * WIDTH), total)
    return total


@inlined
def product(tree, a, b, parent, d, D):
    """The parent of two nodes."""
    if _small_product(tree, tree, a, b, parent, d, D):
        return
    zero = fill(tree, 0.0)
    for j in range(D + 1):
        store(tree, parent + j * WIDTH, _product_term(tree, a, tree, b, d, j, zero))


@inlined
def dual_product(tree, tangents, a, b, parent, d, D):
    """The parent of two nodes and its tangent."""
    if _small_dual_product(tree, tangents, a, b, parent, d, D):
        return
    zero = fill(tree, 0.0)
    for j in range(D + 1):
        tangent = _product_term(tangents, a, tree, b, d, j, zero)
        store(tangents, parent + j * WIDTH, _product_term(tree, a, tangents, b, d, j, tangent))
    product(tree, a, b, parent, d, D)


@inlined
def adjoints(tree, spare, a, b, parent, d, D):
    """The children's adjoints in the place of their values, from the parent's in the place of its own."""
    if _small_adjoints(tree, tree, a, b, parent, d, D):
        return
    zero = fill(tree, 0.0)
    for i in range(d + 1):
        store(spare, i * WIDTH, _adjoint_term(tree, parent, tree, b, d, D, i, zero))
    for i in range(d + 1):
        # The value a_i is needed below, so b's adjoint takes b's place first.
        store(tree, b + i * WIDTH, _adjoint_term(tree, parent, tree, a, d, D, i, zero))
    _move(spare, tree, a, d)


@inlined
def dual_adjoints(tree, tangents, spare, a, b, parent, d, D):
    """The same on dual numbers: the tangents first, since they need the values."""
    if _small_dual_adjoints(tree, tangents, a, b, parent, d, D):
        return
    zero = fill(tree, 0.0)
    for i in range(d + 1):
        tangent = _adjoint_term(tangents, parent, tree, b, d, D, i, zero)
        store(spare, i * WIDTH, _adjoint_term(tree, parent, tangents, b, d, D, i, tangent))
    for i in range(d + 1):
        tangent = _adjoint_term(tangents, parent, tree, a, d, D, i, zero)
        store(tangents, b + i * WIDTH, _adjoint_term(tree, parent, tangents, a, d, D, i, tangent))
    _move(spare, tangents, a, d)
    adjoints(tree, spare, a, b, parent, d, D)


@inlined
def _move(source, to, at, d):
    for j in range(d + 1):
        store(to, at + j * WIDTH, load(source, j * WIDTH))
