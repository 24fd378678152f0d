"""A few tokens side by side in one vector register: the type the compiled kernels compute with.

``Lanes`` is an LLVM vector of ``WIDTH`` numbers, one per token, with operators that read like those of tensors.
Numba leaves vectorising to LLVM, which has to prove that arrays do not overlap and often cannot; with vectors as
values there is nothing to prove. LLVM splits them where the machine's registers are shorter.

No fast-math flag is set, since infinities carry evidence and comparisons with NaN must be false. The one freedom
taken is fusing a multiplication into an addition (:func:`fma`, where the machine has it).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 16  # two AVX registers of float32, or one of AVX-512: measured 15% faster than 8

Build = Callable[[Any, "Lanes", Any, Any], Any]


class Lanes(types.Type):
    """Numbers (or truth values) of ``WIDTH`` tokens."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes{WIDTH}({dtype})")

    @property
    def is_float(self) -> bool:
        """Whether the numbers are float32 or float64."""
        return isinstance(self.dtype, types.Float)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        element = dmm.lookup(fe_type.dtype).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, WIDTH))


MASK = Lanes(types.boolean)
INT = Lanes(types.int32)


def inlined(function: Callable[..., Any]) -> Any:
    """Compiled as part of the kernels that call it, and of them only."""
    return numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")(function)


# ---------------------------------------------------------------------------------------------- operators


def constant(vector: Any, value: float) -> Any:
    """The LLVM constant with the same number in all lanes."""
    return ir.Constant(vector, [value] * WIDTH)


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, WIDTH)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, constant(ir.VectorType(ir.IntType(32), WIDTH), 0))


def _register(op: Callable[..., Any], result: Callable[[Lanes], Lanes], build: Build) -> None:
    """Make ``op`` work on two Lanes, and on Lanes and a scalar in either order, which is cast to their type."""

    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            lanes = [arg for arg in args if isinstance(arg, Lanes)]
            others = [arg for arg in args if not isinstance(arg, (Lanes, types.Number))]
            if len(args) != 2 or not lanes or others or lanes[0] != lanes[-1]:
                return None
            return signature(result(lanes[0]), *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = next(arg for arg in sig.args if isinstance(arg, Lanes))
        values = [
            value if isinstance(arg, Lanes) else _splat(builder, context.cast(builder, value, arg, kind.dtype))
            for arg, value in zip(sig.args, args, strict=True)
        ]
        return build(builder, kind, *values)

    for kinds in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(op, *kinds)(lower)


def _arithmetic(of_float: str, of_int: str) -> Build:
    return lambda builder, kind, a, b: getattr(builder, of_float if kind.is_float else of_int)(a, b)


def _comparison(symbol: str) -> Build:
    def build(builder: Any, kind: Lanes, a: Any, b: Any) -> Any:
        compare = builder.fcmp_ordered if kind.is_float else builder.icmp_signed
        return compare(symbol, a, b)

    return build


for _op, _inplace, _of_float, _of_int in (
    (operator.add, operator.iadd, "fadd", "add"),
    (operator.sub, operator.isub, "fsub", "sub"),
    (operator.mul, operator.imul, "fmul", "mul"),
    (operator.truediv, operator.itruediv, "fdiv", "sdiv"),
    (operator.and_, operator.iand, "and_", "and_"),
    (operator.or_, operator.ior, "or_", "or_"),
    (operator.xor, operator.ixor, "xor", "xor"),
    (operator.rshift, operator.irshift, "lshr", "lshr"),  # logical: what hashing wants
):
    _register(_op, lambda kind: kind, _arithmetic(_of_float, _of_int))
    _register(_inplace, lambda kind: kind, _arithmetic(_of_float, _of_int))
for _op, _symbol in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    _register(_op, lambda kind: MASK, _comparison(_symbol))


def _register_unary(op: Callable[..., Any], build: Callable[[Any, Lanes, Any], Any]) -> None:
    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            return signature(args[0], args[0]) if isinstance(args[0], Lanes) else None

    lower_builtin(op, Lanes)(lambda context, builder, sig, args: build(builder, sig.args[0], args[0]))


_register_unary(operator.invert, lambda builder, kind, a: builder.not_(a))
_register_unary(operator.neg, lambda builder, kind, a: builder.fneg(a) if kind.is_float else builder.neg(a))


# ---------------------------------------------------------------------------------------------- memory


def pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Address of element ``index`` of a contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def load_at(builder: Any, address: Any) -> Any:
    """The vector at an address that is aligned to its elements only."""
    element = address.type.pointee
    value = builder.load(builder.bitcast(address, ir.VectorType(element, WIDTH).as_pointer()))
    value.align = _size(element)
    return value


def store_at(builder: Any, address: Any, value: Any) -> None:
    """Counterpart of :func:`load_at`."""
    done = builder.store(value, builder.bitcast(address, value.type.as_pointer()))
    done.align = _size(value.type.element)


def _size(element: Any) -> int:
    return element.width // 8 if isinstance(element, ir.IntType) else 8 if _is_wide(element) else 4


def _is_wide(element: Any) -> bool:
    return isinstance(element, ir.DoubleType)


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """Lanes from ``array[index : index + WIDTH]``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        return load_at(builder, pointer(context, builder, sig.args[0], args[0], at))

    return Lanes(array.dtype)(array, index), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Lanes to ``array[index : index + WIDTH]``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        store_at(builder, pointer(context, builder, sig.args[0], args[0], at), args[2])
        return context.get_dummy_value()

    return types.none(array, index, lanes), codegen


@intrinsic
def fill(typingctx: Any, array: Any, value: Any) -> Any:
    """The same number in all lanes, in the dtype of ``array``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, context.cast(builder, args[1], sig.args[1], sig.args[0].dtype))

    return Lanes(array.dtype)(array, value), codegen


@intrinsic
def whole(typingctx: Any, value: Any) -> Any:
    """The same int32 in all lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, context.cast(builder, args[0], sig.args[0], types.int32))

    return INT(value), codegen


@intrinsic
def lane_numbers(typingctx: Any) -> Any:
    """int32 lanes 0, 1, ..., WIDTH - 1."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), list(range(WIDTH)))

    return INT(), codegen


@intrinsic
def gather(typingctx: Any, array: Any, index: Any) -> Any:
    """Lane l of the result is ``array[index_l]``; ``index`` is int32 lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        result = ir.Constant(ir.VectorType(data.type.pointee, WIDTH), ir.Undefined)
        for lane in range(WIDTH):
            at = ir.Constant(ir.IntType(32), lane)
            index = builder.sext(builder.extract_element(args[1], at), ir.IntType(64))
            result = builder.insert_element(result, builder.load(builder.gep(data, [index])), at)
        return result

    return Lanes(array.dtype)(array, index), codegen


# ---------------------------------------------------------------------------------------------- functions


def call_llvm(builder: Any, name: str, *args: Any) -> Any:
    """An LLVM intrinsic on vectors."""
    vector = args[0].type
    suffix = "f64" if _is_wide(vector.element) else "f32"
    kind = ir.FunctionType(vector, [vector] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}{suffix}"), args)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """LLVM's a b + c, in one instruction where the machine has it."""
    return call_llvm(builder, "fmuladd", a, b, c)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, in one instruction where the machine has it."""
    return a(a, b, c), lambda context, builder, sig, args: fused(builder, *args)


def _choice(symbol: str) -> Any:
    def function(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            compare = builder.fcmp_ordered if sig.args[0].is_float else builder.icmp_signed
            return builder.select(compare(symbol, *args), *args)

        return a(a, b), codegen

    return intrinsic(function)


minimum, maximum = _choice("<"), _choice(">")


@intrinsic
def magnitude(typingctx: Any, a: Any) -> Any:
    """Absolute value."""
    return a(a), lambda context, builder, sig, args: call_llvm(builder, "fabs", args[0])


@intrinsic
def where(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask holds, else b."""
    return a(mask, a, b), lambda context, builder, sig, args: builder.select(*args)


@intrinsic
def any_lane(typingctx: Any, mask: Any) -> Any:
    """Whether the mask holds anywhere."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.IntType(WIDTH)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), ir.Constant(bits, 0))

    return types.boolean(mask), codegen


@intrinsic
def largest_lane(typingctx: Any, a: Any) -> Any:
    """The largest of int32 lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [args[0].type])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.smax.v{WIDTH}i32")
        return builder.sext(builder.call(reduce, args), ir.IntType(64))

    return types.int64(a), codegen


@intrinsic
def as_kind_of(typingctx: Any, array: Any, a: Any) -> Any:
    """Lanes (numbers, or a mask as 0 and 1) in the floating dtype of ``array``."""
    target = Lanes(array.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to, source, value = context.get_value_type(target), sig.args[1], args[1]
        if source == target:
            return value
        if source.is_float:
            return builder.fpext(value, to) if _is_wide(to.element) else builder.fptrunc(value, to)
        if source == MASK:
            value = builder.zext(value, ir.VectorType(ir.IntType(32), WIDTH))
        return builder.sitofp(value, to)

    return target(array, a), codegen


@intrinsic
def as_double(typingctx: Any, a: Any) -> Any:
    """Lanes of floats in float64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.DoubleType(), WIDTH)
        return args[0] if args[0].type == wide else builder.fpext(args[0], wide)

    return Lanes(types.float64)(a), codegen


@intrinsic
def as_int(typingctx: Any, mask: Any) -> Any:
    """A mask as int32 lanes of 0 and 1."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(args[0], ir.VectorType(ir.IntType(32), WIDTH))

    return INT(mask), codegen


# ---------------------------------------------------------------------------------------------- order


def _flipped(builder: Any, bits: Any) -> Any:
    """Bits of a float32 to an int32 that is ordered like it, and back: of negative ones, all but the sign change."""
    vector = bits.type
    negative = builder.ashr(bits, constant(vector, 31))
    return builder.xor(bits, builder.and_(negative, constant(vector, 0x7FFFFFFF)))


@intrinsic
def rank_of(typingctx: Any, a: Any) -> Any:
    """int32 lanes ordered like float32 lanes without NaN, zeros of both signs equal, none the lowest int32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.fadd(args[0], constant(args[0].type, 0.0))
        return _flipped(builder, builder.bitcast(value, ir.VectorType(ir.IntType(32), WIDTH)))

    return INT(a), codegen


@intrinsic
def of_rank(typingctx: Any, a: Any) -> Any:
    """The float32 lanes of :func:`rank_of`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(_flipped(builder, args[0]), ir.VectorType(ir.FloatType(), WIDTH))

    return Lanes(types.float32)(a), codegen
