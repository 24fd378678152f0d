"""Argument checks shared by several modules; messages name argument, value and remedy.

A check returns what is to be kept: the plain Python value, whatever kind of number, flag or word was given. It is what
a ``repr`` shows so that it evaluates back, and what JSON, hashes and pickles of other machines can hold.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

from circuitroute._tensors import batched, plain, traced

T = TypeVar("T")


def _kind(value: object) -> str:
    """What a scalar holds, by NumPy's letters: ``b`` for a bool, ``c`` complex, ``U`` a text; "" where none says so."""
    if isinstance(value, bool):
        return "b"
    if isinstance(value, Tensor):
        return "b" if value.dtype == torch.bool else "c" if value.is_complex() else ""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return "U"
    return str(getattr(getattr(value, "dtype", None), "kind", ""))


def present(value: T | None, why: str) -> T:
    """``value``, which cannot be None, for the reason given; to say so where types cannot."""
    if value is None:
        raise RuntimeError(f"{why}: this is an error in circuitroute, please report it")
    return value


def as_int(name: str, value: object) -> int:
    """``value`` as a Python int; bools and non-integers are refused."""
    if type(value) is int:
        return value
    if _kind(value) == "b":
        raise TypeError(f"{name}={value!r}: expected an integer, got a bool")
    try:
        return int(operator.index(value))  # type: ignore[arg-type]  # of a subclass of int, index() is the same object
    except TypeError:
        raise TypeError(f"{name}={value!r}: expected an integer, got {type(value).__name__}") from None


def int_at_least(name: str, value: object, lowest: int) -> int:
    """``value`` as an int that is at least ``lowest``."""
    number = as_int(name, value)
    if number < lowest:
        raise ValueError(f"{name}={number}: must be at least {lowest}")
    return number


def one_of(name: str, value: T, known: tuple[T, ...]) -> T:
    """The one of the known options that ``value`` is."""
    for option in known:
        if isinstance(value, type(option)) and value == option:  # arrays are equal to nothing
            return option
    raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")


def as_number(name: str, value: object) -> float:
    """``value`` as a float; bools, texts and anything that is not a real number are refused."""
    if type(value) is float:
        return value
    kind = _kind(value)
    if kind == "b":
        raise TypeError(f"{name}={value!r}: expected a number, got a bool")
    if kind in ("c", "S", "U"):  # float() would read "0.5", and drop an imaginary part
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name}: an integer of {int(value).bit_length()} bits is too large") from None  # type: ignore[call-overload]


def as_flag(name: str, value: object) -> bool:
    """``value`` as a Python bool; anything but True and False, NumPy's and torch's included, is refused."""
    if isinstance(value, bool):
        return value
    if _kind(value) == "b" and getattr(value, "ndim", 0) == 0:
        return bool(value)
    raise TypeError(f"{name}={value!r}: expected True or False, got {type(value).__name__}")


def plain_word(value: T) -> T:
    """A text of any subclass of str, such as NumPy's, as a str; anything else as it is."""
    return str.__str__(value) if isinstance(value, str) else value  # type: ignore[return-value]


def plain_option(name: str, value: object) -> str | float | None:
    """A word, or a number as a float, or None: what stands for a rule in some arguments and for a number in others."""
    if value is None or isinstance(value, str):
        return plain_word(value)
    return as_number(name, value)


def as_items(name: str, values: object, expected: str) -> list[object]:
    """The items of a collection; texts, and arrays and tensors of no dimension, are none."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name}={values!r}: expected {expected}")
    return list(values)


def as_real(name: str, value: object, *, floating: bool = False) -> Tensor:
    """``value`` as a plain tensor of real numbers, in floating point where that is asked for."""
    tensor = plain(name, value)
    # Those of 8 bits have no arithmetic.
    odd = floating and not (tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1)
    if tensor.is_complex() or odd:
        expected = "a floating-point dtype of 16 bits at least" if floating else "real numbers"
        raise TypeError(f"{name} has dtype {tensor.dtype}: expected {expected}")
    return tensor


def as_mask(name: str, mask: Tensor, n: int) -> Tensor:
    """``mask`` as bool [..., n]; values other than 0 and 1 are refused."""
    mask = plain(name, mask)
    if mask.is_complex():
        raise TypeError(f"{name} has dtype {mask.dtype}: expected bool, or real numbers that are 0 or 1")
    if mask.dim() == 0 or mask.shape[-1] != n:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: its last dimension must be n={n}")
    if mask.dtype == torch.bool:
        return mask
    selected = mask == 1
    if traced(mask) or batched():  # whose values cannot be looked at
        return selected
    wrong = ~(selected | (mask == 0))
    if bool(wrong.any()):
        raise ValueError(f"{name} holds {mask[wrong][0].item()}: every value must be 0 or 1")
    return selected


def index_tuple(name: str, indices: Iterable[object]) -> tuple[int, ...]:
    """Distinct, non-negative integers, at least one, in the order given."""
    items = as_items(name, indices, "a sequence of variable indices")
    result = tuple(int_at_least(f"{name}[{i}]", v, 0) for i, v in enumerate(items))
    if not result:
        raise ValueError(f"{name}={list(result)}: give at least one variable index")
    seen: set[int] = set()
    for v in result:
        if v in seen:
            raise ValueError(f"{name}={list(result)}: variable {v} is given twice")
        seen.add(v)
    return result
