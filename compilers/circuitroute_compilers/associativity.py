"""A check of users' machines: merging must not depend on the tree.

Blocks are merged in balance, as the builder does, with a few of the states met kept per block; at every node whose left
half has halves itself, both ways to bracket three neighbouring states are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from circuitroute.constraints import State
from circuitroute_compilers.terms import Machine

STATES_KEPT = 5
MAX_CHECKED = 20_000


def check_associative(machine: Machine) -> None:
    """Raise ValueError naming three states that two bracketings merge differently, if any are met."""
    _Check(machine).block(0, len(machine.indices))


@dataclass(frozen=True)
class _Met:
    """Some states met on a block, and on its halves if it has any."""

    states: list[State]
    halves: tuple[list[State], list[State]] | None = None


class _Check:
    def __init__(self, machine: Machine) -> None:
        self._constraint = machine.constraint
        self._checked = 0

    def block(self, low: int, high: int) -> _Met:
        """States met on variables low to high of the machine, after checking the triples below."""
        if high - low == 1:
            return _Met([s for s in self._constraint.leaf(low) if s is not None])
        middle = (low + high + 1) // 2
        left, right = self.block(low, middle), self.block(middle, high)
        if left.halves is not None:
            self._triples(*left.halves, right.states)
        kept: list[State] = []
        for a, b in product(left.states, right.states):
            state = self._merge(a, b)
            if state is not None and state not in kept and len(kept) < STATES_KEPT:
                kept.append(state)
        return _Met(kept, (left.states, right.states))

    def _merge(self, a: State | None, b: State | None) -> State | None:
        return None if a is None or b is None else self._constraint.merge(a, b)

    def _triples(self, first: list[State], second: list[State], third: list[State]) -> None:
        if self._checked > MAX_CHECKED:
            return
        for a, b, c in product(first, second, third):
            self._checked += 1
            one, other = self._merge(self._merge(a, b), c), self._merge(a, self._merge(b, c))
            if one != other:
                raise ValueError(
                    f"{self._constraint!r}: merge is not associative: merge(merge({a!r}, {b!r}), {c!r}) is {one!r}, "
                    f"but merge({a!r}, merge({b!r}, {c!r})) is {other!r}; the result must not depend on the tree"
                )
