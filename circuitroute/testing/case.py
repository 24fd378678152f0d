"""What a contract checks: a constraint, a number of variables and, stated independently, what is allowed.

Legend: N variables, W = 2^N worlds; variable i is bit i of a world's index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from circuitroute import Constraint
from circuitroute._validate import int_at_least

BoolArray: TypeAlias = npt.NDArray[np.bool_]

# All 2^n worlds are enumerated, several times per check.
MAX_N = 12


def worlds(n: int) -> BoolArray:
    """[W, N] bool, all worlds over ``n`` variables."""
    worlds_WN: BoolArray = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1 == 1
    return worlds_WN


@dataclass(frozen=True)
class Case:
    """A constraint, and what it is supposed to mean.

    Attributes:
        constraint: what is compiled.
        n: number of variables, 1 to 12: all 2^n worlds are enumerated.
        allows: the meaning, stated without the constraint's own code: whether a set of selected variables (a
            frozenset of integers below ``n``) is allowed. If it allows nothing, compiling has to raise
            :class:`circuitroute.InfeasibleError`.

    Raises:
        TypeError: ``constraint`` is not a constraint, ``n`` is not an integer, or ``allows`` is not callable.
        ValueError: ``n`` is not within 1 to 12.
    """

    constraint: Constraint
    n: int
    allows: Callable[[frozenset[int]], bool]

    def __post_init__(self) -> None:
        if not isinstance(self.constraint, Constraint):
            raise TypeError(f"constraint={self.constraint!r}: expected a circuitroute Constraint")
        object.__setattr__(self, "n", int_at_least("n", self.n, 1))
        if self.n > MAX_N:
            raise ValueError(f"n={self.n}: must be at most {MAX_N}, since all 2^n worlds are enumerated")
        if not callable(self.allows):
            raise TypeError(f"allows={self.allows!r}: expected a function of the frozenset of selected variables")

    @cached_property
    def allowed(self) -> BoolArray:
        """[W] bool, the worlds that ``allows`` accepts."""
        selected = (frozenset(np.flatnonzero(world).tolist()) for world in worlds(self.n))
        return np.array([bool(self.allows(some)) for some in selected])

    def __str__(self) -> str:
        return f"{self.constraint!r} over {self.n} variables"
