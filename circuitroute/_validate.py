"""Argument checks shared by several modules; messages name argument, value and remedy."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def present(value: T | None, why: str) -> T:
    """``value``, which cannot be None, for the reason given; to say so where types cannot."""
    if value is None:
        raise RuntimeError(f"{why}: this is an error in circuitroute, please report it")
    return value


def as_int(name: str, value: object) -> int:
    """``value`` as a Python int; bools and non-integers are refused."""
    if isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected an integer, got a bool")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r}: expected an integer, got {type(value).__name__}") from None


def int_at_least(name: str, value: object, lowest: int) -> int:
    """``value`` as an int that is at least ``lowest``."""
    number = as_int(name, value)
    if number < lowest:
        raise ValueError(f"{name}={number}: must be at least {lowest}")
    return number


def one_of(name: str, value: T, known: tuple[object, ...]) -> T:
    """``value``, which must be one of the known options."""
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")
    return value


def as_number(name: str, value: object) -> float:
    """``value`` as a float; bools, texts and anything that is not a real number are refused."""
    if isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected a number, got a bool")
    if isinstance(value, (str, bytes)):  # float() would read "0.5"
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}") from None


def as_mask(name: str, mask: Tensor, n: int) -> Tensor:
    """``mask`` as bool [..., n]; values other than 0 and 1 are refused."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}={mask!r}: expected a tensor, got {type(mask).__name__}")
    if mask.dim() == 0 or mask.shape[-1] != n:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: its last dimension must be n={n}")
    if mask.dtype == torch.bool:
        return mask
    selected = mask == 1
    wrong = ~(selected | (mask == 0))
    if bool(wrong.any()):
        raise ValueError(f"{name} holds {mask[wrong][0].item()}: every value must be 0 or 1")
    return selected


def index_tuple(name: str, indices: Iterable[object]) -> tuple[int, ...]:
    """Distinct, non-negative integers, at least one, in the order given."""
    if isinstance(indices, (str, bytes)) or not isinstance(indices, Iterable):
        raise TypeError(f"{name}={indices!r}: expected a sequence of variable indices")
    result = tuple(int_at_least(f"{name}[{i}]", v, 0) for i, v in enumerate(indices))
    if not result:
        raise ValueError(f"{name}={list(result)}: give at least one variable index")
    seen: set[int] = set()
    for v in result:
        if v in seen:
            raise ValueError(f"{name}={list(result)}: variable {v} is given twice")
        seen.add(v)
    return result
