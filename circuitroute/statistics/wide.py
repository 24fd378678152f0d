"""Numbers of any size: a float64 beside an exponent of its own.

Probabilities of counts reach far below what a float64 holds, e^-70,000 among 10^5 coins, and log space would lose there
what the logarithm's own size takes of its digits. Here a number is m 2^e, and every operation has the relative error of
plain float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ZERO = -(1 << 40)  # the exponent of 0: below all others, and far from the end of int64
LN2_HIGH = 0.6931471803691238  # its leading 33 bits: exact products with exponents
LN2_LOW = np.log(np.longdouble(2)) - np.longdouble(LN2_HIGH)  # the rest, to as many as a long double has
UNDERFLOW = -1100  # 2 to that is 0


class Wide(NamedTuple):
    """m 2^e, elementwise.

    Attributes:
        m: float64, 0 or in [1/2, 1).
        e: int64.
    """

    m: Array
    e: Array

    @staticmethod
    def of(m: Array, e: Array | int = 0) -> Wide:
        """m 2^e of any float64 m that is finite."""
        fraction, exponent = np.frexp(m)
        return Wide(fraction, np.where(fraction == 0, ZERO, exponent + np.asarray(e, dtype=np.int64)))

    @staticmethod
    def exp(x: Array) -> Wide:
        """e^x."""
        k = np.rint(x / math.log(2))
        rest = np.exp((x - k * LN2_HIGH) - k * LN2_LOW)
        return Wide.of(rest, k.astype(np.int64))

    def at(self, index: Any) -> Wide:
        """Some of the numbers, as arrays are indexed."""
        return Wide(self.m[index], self.e[index])

    def log(self) -> Array:
        """The natural logarithm, -inf of 0."""
        with np.errstate(divide="ignore"):
            return np.where(self.m == 0, -np.inf, np.log(self.m) + self.e * math.log(2))

    def log2(self) -> Array:
        """The logarithm to base 2 of numbers above 0."""
        found: Array = np.log2(self.m) + self.e
        return found


def scaled(m: Array, e: Array) -> Array:
    """m 2^e as float64, 0 where it is too small for one."""
    found: Array = np.ldexp(m, np.maximum(e, UNDERFLOW).astype(np.int32))
    return found
