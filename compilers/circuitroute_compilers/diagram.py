"""Formulas as state machines over a tree: terms made from decision diagrams.

The variables of a decision diagram (Bryant 1986) are ordered as the tree meets them, so every block of the tree is an
interval of that order. The state of a block says, for each node at which the diagram may enter the interval, at which
node it leaves; two neighbouring intervals merge by composition. No machine has fewer states, since different nodes are
different functions of what follows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

from circuitroute import CircuitTooLargeError, Constraint
from circuitroute.compilation import SHOWN
from circuitroute.constraints import State, shown
from circuitroute.constraints.formula import Formula
from circuitroute.deadline import tick
from circuitroute_compilers.bdd import ONE, ZERO, Bdd, TooManyNodesError
from circuitroute_compilers.terms import FALSE, FREE, TRUE, Scope, scope_of, settled

# Formulas that share variables become one diagram of up to this many nodes; beyond, each is a machine by itself.
JOINED_NODES = 2_000
# New nodes that all this joining together may make.
JOINING_NODES = 100_000
# Ways into all intervals of one diagram together: half a gibibyte of them.
MAX_ENTRIES = 5_000_000


class Passage(NamedTuple):
    """The state of an interval that begins at variable number ``start`` of the diagram; entered at the i-th node that
    can be reached there, it is left at node ``leaves[i]``."""

    start: int
    leaves: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Diagram:
    """The formula at ``root``, over ``order``, the variables it depends on as the tree meets them."""

    constraint: Constraint
    bdd: Bdd
    root: int
    order: tuple[int, ...]
    levels: tuple[int, ...]

    @cached_property
    def scope(self) -> Scope:
        return scope_of(self.order)

    @cached_property
    def _number(self) -> dict[int, int]:
        return {v: i for i, v in enumerate(self.order)}

    @cached_property
    def _entries(self) -> list[dict[int, int]]:
        """The nodes reached before each variable, numbered."""
        entries, total = [{self.root: 0}], 1
        for level in self.levels:
            tick(len(entries[-1]))
            reached = sorted({after for node in entries[-1] for after in self._after(node, level)})
            total += len(reached)
            if total > MAX_ENTRIES:
                raise CircuitTooLargeError(
                    f"{shown(self.constraint, SHOWN)}: its decision diagram is wide, with more than {MAX_ENTRIES} ways "
                    "into the intervals of its variables; split the formula into smaller ones"
                )
            entries.append({node: i for i, node in enumerate(reached)})
        return entries

    def _after(self, node: int, level: int) -> tuple[int, int]:
        """Where a node goes when the variable at ``level`` is (absent, present)."""
        return (self.bdd.low[node], self.bdd.high[node]) if self.bdd.level[node] == level else (node, node)

    def leaf(self, var: int) -> tuple[State, State]:
        number = self._number.get(var)
        if number is None:
            return FREE, FREE
        after = [self._after(node, self.levels[number]) for node in self._entries[number]]
        absent, present = zip(*after, strict=True)
        return _passage(number, absent), _passage(number, present)

    def merge(self, left: State, right: State) -> State:
        known = settled(left, right)
        if known is not None:
            return known
        first, second = cast(Passage, left), cast(Passage, right)
        number = self._entries[second.start]
        tick(len(first.leaves) >> 4)
        return _passage(first.start, tuple(second.leaves[number[node]] for node in first.leaves))

    def settle(self, state: State, block: Scope) -> State:
        return state  # on the whole order there is one entry and it leaves to a constant

    def signature(self, block: Scope) -> Hashable:
        return not self.scope & ~block


def _passage(start: int, leaves: tuple[int, ...]) -> State:
    """The state; a constant if the interval decides the formula by itself."""
    if leaves.count(ZERO) == len(leaves):
        return FALSE
    return TRUE if leaves.count(ONE) == len(leaves) else Passage(start, leaves)


def diagrams(constraint: Constraint, formulas: Sequence[Formula], order: Sequence[int], limit: int) -> list[Diagram]:
    """Machines that together require all ``formulas``, for a tree that meets the variables in ``order``.

    Raises:
        CircuitTooLargeError: more than ``limit`` nodes of decision diagrams; names ``constraint``.
    """
    used = {v for formula in formulas for v in formula.variables}
    level_of = {v: i for i, v in enumerate(v for v in order if v in used)}
    bdd = Bdd()
    # From the last variables up, so that joining a formula touches only the top of the diagram.
    first = {formula: min(level_of[v] for v in formula.variables) for formula in formulas}
    joined = _Joined(bdd)
    for formula in sorted(formulas, key=lambda f: -first[f]):
        bdd.allow(limit)
        try:
            root = bdd.of(formula, level_of.__getitem__)
        except TooManyNodesError:
            raise CircuitTooLargeError(
                f"{shown(constraint, SHOWN)}: its decision diagram needs more than {limit} nodes in every order of "
                "variables that was tried; split the formula into smaller ones, or raise max_nodes"
            ) from None
        joined.take(root, set(formula.variables))
    orders = [(root, sorted(names, key=level_of.__getitem__)) for root, names in joined.found]
    return [Diagram(constraint, bdd, root, tuple(order), tuple(level_of[v] for v in order)) for root, order in orders]


class _Joined:
    """Diagrams of several formulas each, with the variables they may depend on."""

    def __init__(self, bdd: Bdd) -> None:
        self.found: list[tuple[int, set[int]]] = []
        self._bdd = bdd
        self._began = bdd.made
        self._work = JOINING_NODES

    def take(self, root: int, names: set[int]) -> None:
        """Add a formula to the last diagram, or begin the next one if that would be too large."""
        if self.found:
            last, known = self.found[-1]
            both = self._conjunction(last, root)
            if both is not None:
                self.found[-1] = (both, known | names)
                return
        self._began = self._bdd.made
        self.found.append((root, names))

    def _conjunction(self, last: int, root: int) -> int | None:
        before = self._bdd.made
        self._bdd.allow(min(self._work, 2 * JOINED_NODES))
        try:
            both = self._bdd.conjunction([last, root])
        except TooManyNodesError:
            return None
        finally:
            self._work -= self._bdd.made - before
        small = self._bdd.made - self._began <= JOINED_NODES or len(self._bdd.below(both)) <= JOINED_NODES
        return both if small else None
