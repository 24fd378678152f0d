"""Temperatures and prices as plain functions of the step: no state, nothing to save; they can be pickled and compared.

A step is a number, as a counter gives it; a schedule raises TypeError or ValueError for anything else, NaN included.

::

    temperature = cr.schedules.geometric(1.0, 0.125, steps=1000)
    for step in range(1000):
        router.temperature = temperature(step)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from circuitroute._validate import as_number, int_at_least

Schedule: TypeAlias = Callable[[float], float]


def constant(value: float) -> Schedule:
    """The same at every step.

    Raises:
        ValueError: a value that is not finite.
    """
    return _Constant(_finite("value", value))


def geometric(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` to ``end`` by equal factors over ``steps`` steps, and ``end`` from then on.

    Raises:
        ValueError: an end that is not positive and finite, or no steps.
    """
    low, high = (_finite(name, value) for name, value in (("start", start), ("end", end)))
    for name, value in (("start", low), ("end", high)):
        if value <= 0:
            raise ValueError(f"{name}={value}: a geometric schedule has positive ends")
    return _Geometric(low, high, int_at_least("steps", steps, 1))


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` to ``end`` along half a cosine over ``steps`` steps, and ``end`` from then on.

    Raises:
        ValueError: an end that is not finite, or no steps.
    """
    low, high = (_finite(name, value) for name, value in (("start", start), ("end", end)))
    return _Cosine(low, high, int_at_least("steps", steps, 1))


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, step: float) -> float:
        return self.value


@dataclass(frozen=True)
class _Geometric:
    start: float
    end: float
    steps: int

    def __call__(self, step: float) -> float:
        # Powers of each, since their ratio may be more than a float can hold.
        progress = _progress(step, self.steps)
        return math.pow(self.start, 1 - progress) * math.pow(self.end, progress)


@dataclass(frozen=True)
class _Cosine:
    start: float
    end: float
    steps: int

    def __call__(self, step: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * _progress(step, self.steps))) / 2


def _progress(step: float, steps: int) -> float:
    number = as_number("step", step)
    if math.isnan(number):
        raise ValueError(f"step={number}: expected the number of the training step")
    return min(max(number / steps, 0.0), 1.0)


def _finite(name: str, value: float) -> float:
    number = as_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={number}: must be finite")
    return number
