"""Term: what a plan becomes once the order of the variables is known, a state machine that knows its scope.

A term's state on a block of variables is FREE while the block holds none of its scope, TRUE or FALSE once the block
holds all of it, and anything hashable in between. Collapsing finished scopes to one of three constants is what
keeps products of many constraints narrow: a group's count is forgotten as soon as the group is whole.
"""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Callable, Generator, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from typing import NamedTuple, Protocol, TypeAlias, cast

from circuitroute.constraints import Constraint, State
from circuitroute.deadline import tick

Scope: TypeAlias = int  # a bit per variable


class Constant(enum.Enum):
    """States without a machine behind them."""

    FREE = enum.auto()
    TRUE = enum.auto()
    FALSE = enum.auto()


FREE, TRUE, FALSE = Constant.FREE, Constant.TRUE, Constant.FALSE


class Term(Protocol):
    """A state machine over part of the variables."""

    @property
    def scope(self) -> Scope:
        """The variables it depends on."""

    def leaf(self, var: int) -> tuple[State, State]:
        """States of a variable when (absent, present)."""

    def merge(self, left: State, right: State) -> State:
        """State of two disjoint blocks together."""

    def settle(self, state: State, block: Scope) -> State:
        """The state on a block, collapsed to a constant if the block decides the term."""

    def signature(self, block: Scope) -> Hashable:
        """What :meth:`settle` depends on besides the state: blocks of equal signature settle alike."""


def settled(left: State, right: State) -> State | None:
    """The merged state where one side needs no machine, else None."""
    if left is FREE or right is TRUE or right is FALSE:
        return right
    if right is FREE or left is TRUE or left is FALSE:
        return left
    return None


@dataclass(frozen=True)
class Machine:
    """A constraint's own state machine on the variables ``indices`` (its variable i is ``indices[i]``)."""

    constraint: Constraint
    indices: tuple[int, ...]

    @cached_property
    def scope(self) -> Scope:
        return scope_of(self.indices)

    @cached_property
    def _position(self) -> dict[int, int]:
        return {v: i for i, v in enumerate(self.indices)}

    def leaf(self, var: int) -> tuple[State, State]:
        if var not in self._position:
            return FREE, FREE
        absent, present = self.constraint.leaf(self._position[var])
        return FALSE if absent is None else absent, FALSE if present is None else present

    def merge(self, left: State, right: State) -> State:
        known = settled(left, right)
        if known is not None:
            return known
        merged = self.constraint.merge(left, right)
        return FALSE if merged is None else merged

    def settle(self, state: State, block: Scope) -> State:
        if isinstance(state, Constant) or self.scope & ~block:
            return state
        return TRUE if self.constraint.accepts(state) else FALSE

    def signature(self, block: Scope) -> Hashable:
        return not self.scope & ~block


@dataclass(frozen=True)
class Complement:
    """The term does not hold."""

    term: Term

    @property
    def scope(self) -> Scope:
        return self.term.scope

    def leaf(self, var: int) -> tuple[State, State]:
        absent, present = self.term.leaf(var)
        return _flip(absent), _flip(present)

    def merge(self, left: State, right: State) -> State:
        return _flip(self.term.merge(_flip(left), _flip(right)))

    def settle(self, state: State, block: Scope) -> State:
        return _flip(self.term.settle(_flip(state), block))

    def signature(self, block: Scope) -> Hashable:
        return self.term.signature(block)


def _flip(state: State) -> State:
    return {TRUE: FALSE, FALSE: TRUE}.get(state, state) if isinstance(state, Constant) else state


class Tally(NamedTuple):
    """The state of :class:`HowMany` on a block that does not decide it."""

    holding: int
    failing: int
    listed: tuple[tuple[int, State], ...]


@dataclass(frozen=True)
class HowMany:
    """``allows`` the number of ``terms`` that hold; And and Or are the cases "all" and "at least one".

    The state tallies the terms that hold and fail, and lists the states of the others by index. Only terms whose
    scope is complete are counted; one that is decided early stays listed, since other blocks may share its scope.
    The state becomes a constant as soon as no outcome of the undecided ones can change the verdict.
    """

    terms: tuple[Term, ...]
    allows: Callable[[int], bool]

    @cached_property
    def scope(self) -> Scope:
        return functools.reduce(operator.or_, (term.scope for term in self.terms))

    @cached_property
    def verdicts(self) -> tuple[bool, ...]:
        """Whether 0, 1, ... terms that hold are allowed."""
        return tuple(self.allows(j) for j in range(len(self.terms) + 1))

    @cached_property
    def all_must(self) -> bool:
        """Whether one term that fails decides: this is a conjunction."""
        return not any(self.verdicts[:-1])

    @cached_property
    def one_suffices(self) -> bool:
        """Whether one term that holds decides: this is a disjunction."""
        return all(self.verdicts[1:])

    @cached_property
    def _of_variable(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        for i, term in enumerate(self.terms):
            for v in variables(term.scope):
                found.setdefault(v, []).append(i)
        return {v: tuple(some) for v, some in found.items()}

    def leaf(self, var: int) -> tuple[State, State]:
        touched = self._of_variable.get(var)
        if touched is None:
            return FREE, FREE
        leaves = [(i, self.terms[i].leaf(var)) for i in touched]
        absent, present = ({i: states[side] for i, states in leaves} for side in (0, 1))
        return self._state(0, 0, absent), self._state(0, 0, present)

    def _state(self, holding: int, failing: int, listed: dict[int, State]) -> State:
        least = holding + sum(s is TRUE for s in listed.values())
        most = len(self.terms) - failing - sum(s is FALSE for s in listed.values())
        possible = self.verdicts[least : most + 1]
        if all(possible):
            return TRUE
        if not any(possible):
            return FALSE
        return Tally(holding, failing, tuple(sorted(listed.items(), key=lambda item: item[0])))

    def merge(self, left: State, right: State) -> State:
        known = settled(left, right)
        if known is not None:
            return known
        a, b = cast(Tally, left), cast(Tally, right)
        listed = dict(a.listed)
        for i, state in b.listed:
            listed[i] = self.terms[i].merge(listed[i], state) if i in listed else state
        return self._state(a.holding + b.holding, a.failing + b.failing, listed)

    def settle(self, state: State, block: Scope) -> State:
        if isinstance(state, Constant):
            return state
        holding, failing, before_settling = cast(Tally, state)
        listed: dict[int, State] = {}
        for i, before in before_settling:
            after = self.terms[i].settle(before, block)
            if self.terms[i].scope & ~block:
                listed[i] = after
            elif after is TRUE:
                holding += 1
            else:
                failing += 1
        return self._state(holding, failing, listed)

    def signature(self, block: Scope) -> Hashable:
        return tuple(term.signature(block) for term in self.terms if term.scope & block)


def variables(scope: Scope) -> list[int]:
    """The variables of a scope, increasing."""
    return [v for v, bit in enumerate(reversed(f"{scope:b}")) if bit == "1"]


def scope_of(indices: Iterable[int]) -> Scope:
    """The scope of some variables; in linear time, unlike a sum of powers of two."""
    some = list(indices)
    bits = bytearray(max(some, default=0) // 8 + 1)
    for v in some:
        bits[v // 8] |= 1 << v % 8
    return int.from_bytes(bits, "little")


# ---------------------------------------------------------------------------------------------- a check of machines

# States kept per block, and how many triples of them are compared.
STATES_KEPT = 5
MAX_CHECKED = 20_000
_States: TypeAlias = list[State]


def check_associative(machine: Machine) -> None:
    """Raise ValueError naming three states that two bracketings merge differently, if any are met.

    Blocks are merged in balance, as circuits are built, with a few of the states met kept per block.
    """
    constraint = machine.constraint
    for a, b, c in islice(_neighbours(constraint, 0, len(machine.indices)), MAX_CHECKED):
        tick()
        one = _merged(constraint, _merged(constraint, a, b), c)
        other = _merged(constraint, a, _merged(constraint, b, c))
        if one != other:
            raise ValueError(
                f"{constraint!r}: merge is not associative: merge(merge({a!r}, {b!r}), {c!r}) is {one!r}, "
                f"but merge({a!r}, merge({b!r}, {c!r})) is {other!r}; the result must not depend on the tree"
            )


def _neighbours(
    constraint: Constraint, low: int, high: int
) -> Generator[tuple[State, ...], None, tuple[_States, tuple[_States, ...]]]:
    """Triples of neighbouring states below variables low to high; returns states of that block, and of its halves."""
    if high - low == 1:
        return [state for state in constraint.leaf(low) if state is not None], ()
    middle = (low + high + 1) // 2
    left, quarters = yield from _neighbours(constraint, low, middle)
    right, _ = yield from _neighbours(constraint, middle, high)
    if quarters:
        yield from product(*quarters, right)
    merged = [_merged(constraint, a, b) for a, b in product(left, right)]
    return [state for state in dict.fromkeys(merged) if state is not None][:STATES_KEPT], (left, right)


def _merged(constraint: Constraint, a: State | None, b: State | None) -> State | None:
    tick()
    return None if a is None or b is None else constraint.merge(a, b)
