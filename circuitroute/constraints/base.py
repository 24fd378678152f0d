"""The protocol every constraint follows, a small state machine over a tree of variables, and its algebra: & | ~ over.

A constraint gives each literal a state (:meth:`Constraint.leaf`), a way to combine the states of two
neighbouring blocks of variables (:meth:`Constraint.merge`) and says which final states are allowed
(:meth:`Constraint.accepts`). Merging along *any* binary tree over the variables, in increasing order, must
give the same answer: ``merge`` is associative on the states it meets. A compiler turns this into a circuit
that is smooth, decomposable and deterministic by construction (Darwiche & Marquis 2002; Choi, Vergari &
Van den Broeck 2020): one sum per (tree node, state), one product per pair of child states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from circuitroute._validate import index_tuple
from circuitroute.deadline import tick

State: TypeAlias = Hashable

# Longer texts are cut off: shared parts are written as often as they occur, and sixty rules can occur 2^60 times.
MAX_TEXT = 1 << 22


class Constraint:
    """What is allowed: an immutable, hashable description of a set of subsets.

    Subclass it to say something new. Instances must be hashable and compare by value, since compiled
    circuits are memoised on them; a frozen dataclass is the easy way::

        @dataclass(frozen=True)
        class Even(cr.Constraint):
            def leaf(self, var):
                return 0, 1                      # the state of "absent" and of "present"

            def merge(self, left, right):
                return (left + right) % 2        # None would mean: no completion is allowed

            def accepts(self, state):
                return state == 0
    """

    def leaf(self, var: int) -> tuple[State | None, State | None]:
        """States of variable ``var`` when (absent, present); ``None`` forbids that literal.

        Raises:
            NotImplementedError: the constraint has no machine; likewise for :meth:`merge` and :meth:`accepts`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define leaf(var)")

    def merge(self, left: State, right: State) -> State | None:
        """State of two neighbouring blocks, ``left`` holding the smaller variables; ``None`` is dead."""
        raise NotImplementedError(f"{type(self).__name__} does not define merge(left, right)")

    def accepts(self, state: State) -> bool:
        """Whether a state that covers all variables is allowed."""
        raise NotImplementedError(f"{type(self).__name__} does not define accepts(state)")

    def __and__(self, other: Constraint) -> Constraint:
        """Both hold."""
        return And.of(self, other) if isinstance(other, Constraint) else NotImplemented

    def __or__(self, other: Constraint) -> Constraint:
        """At least one holds."""
        return Or.of(self, other) if isinstance(other, Constraint) else NotImplemented

    def __invert__(self) -> Constraint:
        """It does not hold."""
        return Not.of(self)

    def __bool__(self) -> bool:
        """Always an error: ``a and b`` would silently be ``b``.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self!r} has no truth value: combine constraints with & | ~, not with and, or, not")

    def over(self, indices: Iterable[int]) -> Constraint:
        """The same constraint on the variables ``indices``; the others are left free.

        ``leaf(0)`` becomes the literal states of ``indices[0]``, and so on.

        Raises:
            TypeError: an index is not an integer.
            ValueError: no indices, a negative one, one given twice, or fewer than the constraint names variables.
        """
        return Over(self, index_tuple("indices", indices))

    def _pieces(self) -> Iterable[Constraint | str]:
        """What the ``repr`` consists of: texts, and constraints in the place of theirs."""
        return (repr(self),)

    def _known_variables(self) -> int | None:
        """How many variables it is over, where it says so itself; see :func:`known_variables`."""
        return None


def shown(constraint: Constraint, most: int = MAX_TEXT) -> str:
    """The ``repr`` of a constraint, cut off after so many characters."""
    texts: list[str] = []
    length = 0
    waiting: list[Constraint | str] = [constraint]
    while waiting and length <= most:
        here = waiting.pop()
        if isinstance(here, str):
            texts.append(here)
            length += len(here)
        else:
            waiting.extend(reversed(tuple(here._pieces())))
    text = "".join(texts)
    return text if length <= most else f"{text[:most]}..."


class _OfParts(Constraint):
    """A constraint made of others, which remembers its hash: parts may be shared, and nested deeply."""

    @abstractmethod
    def _fields(self) -> Hashable:
        """What distinguishes it from others of its class."""

    def __hash__(self) -> int:
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = hash(self._fields())
            object.__setattr__(self, "_hash", known)
        return known

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, _OfParts) or type(self) is not type(other):
            return NotImplemented
        tick()  # of parts that are shared, every use is compared
        return hash(self) == hash(other) and self._fields() == other._fields()

    def __getstate__(self) -> dict[str, object]:
        # Hashes of texts differ between processes.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def __repr__(self) -> str:
        return shown(self)


@dataclass(frozen=True, repr=False)
class Over(_OfParts):
    """``constraint`` on the variables ``indices`` only; made by :meth:`Constraint.over`.

    Like the other composed constraints it has no machine: compilers take it apart.
    """

    constraint: Constraint
    indices: tuple[int, ...]

    def over(self, indices: Iterable[int]) -> Constraint:
        outer = index_tuple("indices", indices)
        if max(self.indices) >= len(outer):
            raise ValueError(
                f"indices={list(outer)}: {self!r} uses variable {max(self.indices)}, so at least "
                f"{max(self.indices) + 1} indices are needed"
            )
        return self.constraint.over([outer[i] for i in self.indices])

    __hash__ = _OfParts.__hash__
    __eq__ = _OfParts.__eq__

    def _fields(self) -> Hashable:
        return self.constraint, self.indices

    def _pieces(self) -> Iterable[Constraint | str]:
        return self.constraint, f".over({list(self.indices)!r})"


@dataclass(frozen=True, repr=False, init=False)
class _Composed(_OfParts):
    """Several constraints joined by one operator: nested uses flattened, repetitions dropped, order kept."""

    symbol: ClassVar[str]
    parts: tuple[Constraint, ...]

    def __init__(self, parts: Iterable[Constraint]) -> None:
        flat: list[Constraint] = []
        for i, part in enumerate(parts):
            tick()
            if not isinstance(part, Constraint):
                raise TypeError(f"parts[{i}]={part!r}: expected a circuitroute Constraint, got {type(part).__name__}")
            flat.extend(part.parts if isinstance(part, type(self)) else (part,))
        if not flat:
            raise ValueError("parts=(): give at least one constraint")
        object.__setattr__(self, "parts", tuple(dict.fromkeys(flat)))

    @classmethod
    def of(cls, *parts: Constraint) -> Constraint:
        """The combination, which is the part itself where there is only one."""
        combined = cls(parts)
        return combined.parts[0] if len(combined.parts) == 1 else combined

    def over(self, indices: Iterable[int]) -> Constraint:
        chosen = index_tuple("indices", indices)
        return self.of(*(part.over(chosen) for part in self.parts))

    __hash__ = _OfParts.__hash__
    __eq__ = _OfParts.__eq__

    def _fields(self) -> Hashable:
        return (self.parts,)

    def _pieces(self) -> Iterable[Constraint | str]:
        sign = f" {self.symbol} "
        joined = [piece for part in self.parts for piece in (sign, part)]
        return "(", *joined[1:], ")"


class And(_Composed):
    """All of ``parts`` hold; made by ``a & b``."""

    symbol = "&"


class Or(_Composed):
    """At least one of ``parts`` holds; made by ``a | b``."""

    symbol = "|"


@dataclass(frozen=True, repr=False)
class Not(_OfParts):
    """``part`` does not hold; made by ``~a``.

    Raises:
        TypeError: ``part`` is not a constraint.
    """

    part: Constraint

    def __post_init__(self) -> None:
        if not isinstance(self.part, Constraint):
            raise TypeError(f"part={self.part!r}: expected a circuitroute Constraint, got {type(self.part).__name__}")

    @staticmethod
    def of(part: Constraint) -> Constraint:
        """The negation; of a negation, what it negates."""
        return part.part if isinstance(part, Not) else Not(part)

    def over(self, indices: Iterable[int]) -> Constraint:
        return Not.of(self.part.over(indices))

    __hash__ = _OfParts.__hash__
    __eq__ = _OfParts.__eq__

    def _fields(self) -> Hashable:
        return (self.part,)

    def _pieces(self) -> Iterable[Constraint | str]:
        return "~", self.part


def known_variables(constraint: Constraint) -> int | None:
    """How many variables a constraint is over, where it says so, or a part of it: the most that one says.

    A clause list and a list of costs do; a count, a rule and what was given a scope by ``over`` do not.
    """
    found: list[int] = []
    seen: set[int] = set()
    waiting = [constraint]
    while waiting:
        tick()
        here = waiting.pop()
        if id(here) in seen:  # parts may be shared
            continue
        seen.add(id(here))
        if isinstance(here, _Composed):
            waiting.extend(here.parts)
        elif isinstance(here, Not):
            waiting.append(here.part)
        elif (known := here._known_variables()) is not None:
            found.append(known)
    return max(found, default=None)
