"""Rows of tokens to lanes and back: transpositions of blocks of ``WIDTH`` tokens by ``WIDTH`` columns, in registers.

Legend: T tokens, C columns.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from circuitroute.engines.subset.numba.simd.lanes import WIDTH, inlined, load_at, pointer, store_at


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Row r, column c of the result is row c, column r: the halves of ever larger blocks change places."""
    step = 1
    while step < WIDTH:
        kept = [c if c & step == 0 else WIDTH + c - step for c in range(WIDTH)]
        moved = [c + step if c & step == 0 else WIDTH + c for c in range(WIDTH)]
        result = list(rows)
        for r in range(WIDTH):
            if r & step == 0:
                result[r] = _shuffle(builder, rows[r], rows[r + step], kept)
                result[r + step] = _shuffle(builder, rows[r], rows[r + step], moved)
        rows, step = result, 2 * step
    return rows


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), order))


def _converted(builder: Any, values: Any, element: Any) -> Any:
    """Lanes in the type of an array's elements."""
    to, source = ir.VectorType(element, WIDTH), values.type.element
    if source == element:
        return values
    if isinstance(element, ir.IntType):
        return builder.trunc(values, to) if element.width < source.width else builder.sext(values, to)
    return builder.fpext(values, to) if isinstance(element, ir.DoubleType) else builder.fptrunc(values, to)


def _integer(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


@intrinsic
def _read_block(typingctx: Any, rows_TC: Any, first: Any, last: Any, column: Any, lanes: Any) -> Any:
    """Columns ``column`` to ``column + WIDTH - 1`` of the rows from ``first`` on (past the last, that one again)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, first, last, column, lanes = args
        columns = builder.extract_value(context.make_array(sig.args[0])(context, builder, source).shape, 1)
        block = []
        for lane in range(WIDTH):
            row = builder.add(first, _integer(lane))
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            at = builder.add(builder.mul(row, columns), column)
            block.append(load_at(builder, pointer(context, builder, sig.args[0], source, at)))
        for c, values in enumerate(_transposed(builder, block)):
            at = builder.mul(builder.add(column, _integer(c)), _integer(WIDTH))
            address = pointer(context, builder, sig.args[4], lanes, at)
            store_at(builder, address, _converted(builder, values, address.type.pointee))
        return context.get_dummy_value()

    return types.none(rows_TC, types.int64, types.int64, types.int64, lanes), codegen


@intrinsic
def _write_block(typingctx: Any, lanes: Any, first: Any, column: Any, rows_TC: Any) -> Any:
    """Counterpart of :func:`_read_block` for ``WIDTH`` full rows; counts of 0 and 1 become truth values."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes, first, column, target = args
        columns = builder.extract_value(context.make_array(sig.args[3])(context, builder, target).shape, 1)
        block = []
        for c in range(WIDTH):
            at = builder.mul(builder.add(column, _integer(c)), _integer(WIDTH))
            block.append(load_at(builder, pointer(context, builder, sig.args[0], lanes, at)))
        for lane, values in enumerate(_transposed(builder, block)):
            at = builder.add(builder.mul(builder.add(first, _integer(lane)), columns), column)
            address = pointer(context, builder, sig.args[3], target, at)
            store_at(builder, address, _converted(builder, values, address.type.pointee))
        return context.get_dummy_value()

    return types.none(lanes, types.int64, types.int64, rows_TC), codegen


@inlined
def read(rows_TC, first, last, lanes):
    """Rows ``first`` to ``first + WIDTH - 1`` as lanes; past the ``last`` one, that one again."""
    whole = rows_TC.shape[1] // WIDTH * WIDTH
    for column in range(0, whole, WIDTH):
        _read_block(rows_TC, first, last, column, lanes)
    for column in range(whole, rows_TC.shape[1]):
        for lane in range(WIDTH):
            lanes[column * WIDTH + lane] = rows_TC[min(first + lane, last), column]


@inlined
def write(lanes, first, last, rows_TC):
    """Counterpart of :func:`read`."""
    count = min(WIDTH, last + 1 - first)
    whole = rows_TC.shape[1] // WIDTH * WIDTH if count == WIDTH else 0
    for column in range(0, whole, WIDTH):
        _write_block(lanes, first, column, rows_TC)
    for column in range(whole, rows_TC.shape[1]):
        for lane in range(count):
            rows_TC[first + lane, column] = lanes[column * WIDTH + lane]
