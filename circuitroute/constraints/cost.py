"""Variables of different cost under a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from circuitroute._validate import as_items, int_at_least
from circuitroute.constraints.base import Constraint, State


@dataclass(frozen=True, repr=False, init=False)
class Cost(Constraint):
    """The costs of the selected variables add up to between ``at_least`` and ``at_most``.

    Args:
        costs: non-negative integers, one per variable of the scope.
        at_most, at_least: limits of the sum; give one or both (``at_least=0`` counts as given).

    Raises:
        ValueError: no or negative costs, no limit, or limits the wrong way round.
        TypeError: a cost or limit that is not an integer.
    """

    costs: tuple[int, ...]
    at_most: int | None
    at_least: int

    def __init__(self, costs: Iterable[int], at_most: int | None = None, at_least: int | None = None) -> None:
        items = as_items("costs", costs, "a sequence of integers, one per variable")
        values = tuple(int_at_least(f"costs[{i}]", c, 0) for i, c in enumerate(items))
        if not values:
            raise ValueError("costs=(): give one cost per variable")
        if at_most is None and at_least is None:
            raise ValueError("at_most=None, at_least=None: give one of them, or both")
        lowest = 0 if at_least is None else int_at_least("at_least", at_least, 0)
        highest = None if at_most is None else int_at_least("at_most", at_most, 0)
        if highest is not None and highest < lowest:
            raise ValueError(f"at_most={highest}: must be at least at_least={lowest}")
        object.__setattr__(self, "costs", values)
        object.__setattr__(self, "at_most", highest)
        object.__setattr__(self, "at_least", lowest)

    def _capped(self, cost: int) -> State | None:
        if self.at_most is None:
            return min(cost, self.at_least)  # all sums beyond the lower limit are equivalent
        return None if cost > self.at_most else cost

    def leaf(self, var: int) -> tuple[State | None, State | None]:
        return 0, self._capped(self.costs[var])

    def merge(self, left: State, right: State) -> State | None:
        return self._capped(int(left) + int(right))  # type: ignore[call-overload]

    def accepts(self, state: State) -> bool:
        return bool(int(state) >= self.at_least)  # type: ignore[call-overload]

    def _known_variables(self) -> int | None:
        return len(self.costs)

    def __repr__(self) -> str:
        return f"Cost({list(self.costs)!r}, at_most={self.at_most!r}, at_least={self.at_least!r})"
