"""exp and log of Lanes, written out so that they stay in vector registers: numba alone calls a scalar exp per lane."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from circuitroute.engines.subset.numba.simd.lanes import WIDTH, call_llvm, constant, fused, inlined, load, store

LOG2_E = 1 / math.log(2)
# log 2 as a number with trailing zeros, whose small multiples are exact, and the rest; by the bits of the dtype.
LN2_HIGH = {32: 0.693359375, 64: 6.93145751953125e-1}
LN2_LOW = {32: -2.12194440054690583e-4, 64: 1.42860682030941723212e-6}
# Below the lowest argument the result is zero; above the highest, the argument is cut off.
EXP_LOWEST = {32: -87.0, 64: -708.0}
EXP_HIGHEST = {32: 88.0, 64: 709.0}
# e^r = 1 + r + r^2 P(r) for |r| <= log(2) / 2, highest power first: Cephes' minimax polynomial, and Taylor's.
EXP_POLYNOMIAL = {
    32: (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    64: tuple(1 / math.factorial(k) for k in range(14, 1, -1)),
}


class _Bits:
    """The layout of a vector's floats as integers."""

    def __init__(self, vector: Any) -> None:
        wide = isinstance(vector.element, ir.DoubleType)
        self.integers = ir.VectorType(ir.IntType(64 if wide else 32), WIDTH)
        self.narrow = ir.VectorType(ir.IntType(32), WIDTH)  # what machines convert floats to and from
        self.mantissa = constant(self.integers, 52 if wide else 23)
        self.root_half = constant(self.integers, 0x3FE6A09E667F3BCD if wide else 0x3F3504F3)
        self.wide = wide


def _scaled(builder: Any, value: Any, exponent: Any) -> Any:
    """value 2^exponent, the exponent an integral float and the result in the normal range."""
    bits = _Bits(value.type)
    steps = builder.fptosi(exponent, bits.narrow)
    steps = builder.sext(steps, bits.integers) if bits.wide else steps
    steps = builder.shl(steps, bits.mantissa)
    return builder.bitcast(builder.add(builder.bitcast(value, bits.integers), steps), value.type)


def _split_exponent(builder: Any, x: Any) -> tuple[Any, Any]:
    """(m, e) with x = m 2^e and m in [sqrt(1/2), sqrt(2)), the exponent as a float."""
    bits = _Bits(x.type)
    raw = builder.bitcast(x, bits.integers)
    steps = builder.ashr(builder.sub(raw, bits.root_half), bits.mantissa)
    m = builder.bitcast(builder.sub(raw, builder.shl(steps, bits.mantissa)), x.type)
    return m, builder.sitofp(builder.trunc(steps, bits.narrow) if bits.wide else steps, x.type)


@intrinsic
def exp(typingctx: Any, x: Any) -> Any:
    """e^x with a relative error below 1.5e-7 in float32 and 1e-15 in float64; exactly zero far below zero."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        size, x, vector = sig.args[0].dtype.bitwidth, args[0], args[0].type
        lowest, highest = constant(vector, EXP_LOWEST[size]), constant(vector, EXP_HIGHEST[size])
        vanishes = builder.fcmp_ordered("<", x, lowest)
        x = builder.select(vanishes, lowest, x)
        x = builder.select(builder.fcmp_ordered(">", x, highest), highest, x)
        n = call_llvm(builder, "nearbyint", builder.fmul(x, constant(vector, LOG2_E)))
        r = fused(builder, n, constant(vector, -LN2_HIGH[size]), x)
        r = fused(builder, n, constant(vector, -LN2_LOW[size]), r)
        first, *rest = EXP_POLYNOMIAL[size]
        series = constant(vector, first)
        for coefficient in rest:
            series = fused(builder, series, r, constant(vector, coefficient))
        series = builder.fadd(fused(builder, series, builder.fmul(r, r), r), constant(vector, 1.0))
        return builder.select(vanishes, constant(vector, 0.0), _scaled(builder, series, n))

    return x(x), codegen


@intrinsic
def rough_log(typingctx: Any, x: Any) -> Any:
    """log x to about 1e-7, for x in the normal range (about -88 or -709 for zero): good for a Newton step.

    x = m 2^e with m between sqrt(1/2) and sqrt(2), and log m = 2 artanh((m - 1) / (m + 1)).
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = args[0].type
        m, exponent = _split_exponent(builder, args[0])
        one = constant(vector, 1.0)
        z = builder.fdiv(builder.fsub(m, one), builder.fadd(m, one))
        square = builder.fmul(z, z)
        series = constant(vector, 2 / 9)
        for odd in (7, 5, 3, 1):
            series = fused(builder, series, square, constant(vector, 2 / odd))
        return fused(builder, exponent, constant(vector, math.log(2)), builder.fmul(series, z))

    return x(x), codegen


@intrinsic
def exponent_log(typingctx: Any, x: Any) -> Any:
    """log x to within log 2, that of its power of two."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, exponent = _split_exponent(builder, args[0])
        return builder.fmul(exponent, constant(args[0].type, math.log(2)))

    return x(x), codegen


@inlined
def log(values, spare):
    """Logarithm of float64 lanes to the last digit, one by one in the memory of a lane."""
    store(spare, 0, values)
    for lane in range(WIDTH):
        spare[lane] = math.log(spare[lane])
    return load(spare, 0)
