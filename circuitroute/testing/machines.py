"""The constraint as a state machine: the verdict must be the same along every tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from circuitroute.constraints import Constraint, State
from circuitroute.testing.case import BoolArray, Case, worlds
from circuitroute.testing.suite import Suite, check, has_machine, require

Split: TypeAlias = Callable[[int, int], int]  # the first variable of the right half of a block low..high

TREES: dict[str, Split] = {
    "from the left": lambda low, high: high - 1,
    "from the right": lambda low, high: low + 1,
    "in balance": lambda low, high: (low + high) // 2,
    "in thirds": lambda low, high: low + max(1, (high - low) // 3),
}


class MachineChecks(Suite):
    """``leaf``, ``merge`` and ``accepts``, without a compiler."""

    @check
    def test_machine_along_any_tree(self, any_case: Case) -> None:
        """Merging the literals of a world, however bracketed, accepts it if and only if it is allowed.

        Types that bring a compiler in place of these methods have nothing to check.
        """
        if not has_machine(any_case.constraint):
            return
        for world, allowed in zip(worlds(any_case.n), any_case.allowed, strict=True):
            for name, split in TREES.items():
                verdict = _accepts(any_case.constraint, world, split)
                require(
                    verdict == allowed,
                    f"{any_case}: selecting {np.flatnonzero(world).tolist()}, merged {name}: expected "
                    f"{_words(bool(allowed))}, got {_words(verdict)}",
                )


def _accepts(constraint: Constraint, world: BoolArray, split: Split) -> bool:
    state = _state(constraint, world, 0, len(world), split)
    return state is not None and bool(constraint.accepts(state))


def _state(constraint: Constraint, world: BoolArray, low: int, high: int, split: Split) -> State | None:
    if high - low == 1:
        return constraint.leaf(low)[int(world[low])]
    middle = split(low, high)
    left = _state(constraint, world, low, middle, split)
    right = _state(constraint, world, middle, high, split)
    return None if left is None or right is None else constraint.merge(left, right)


def _words(accepted: bool) -> str:
    return "accepted" if accepted else "refused"
