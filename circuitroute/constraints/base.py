"""The protocol every constraint follows: a small state machine over a tree of variables.

A constraint gives each literal a state (:meth:`Constraint.leaf`), a way to combine the states of two
neighbouring blocks of variables (:meth:`Constraint.merge`) and says which final states are allowed
(:meth:`Constraint.accepts`). Merging along *any* binary tree over the variables, in increasing order, must
give the same answer: ``merge`` is associative on the states it meets. A compiler turns this into a circuit
that is smooth, decomposable and deterministic by construction (Darwiche & Marquis 2002; Choi, Vergari &
Van den Broeck 2020): one sum per (tree node, state), one product per pair of child states.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from circuitroute._validate import index_tuple

State: TypeAlias = Hashable


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
        """States of variable ``var`` when (absent, present); ``None`` forbids that literal."""
        raise NotImplementedError(f"{type(self).__name__} does not define leaf(var)")

    def merge(self, left: State, right: State) -> State | None:
        """State of two neighbouring blocks, ``left`` holding the smaller variables; ``None`` is dead."""
        raise NotImplementedError(f"{type(self).__name__} does not define merge(left, right)")

    def accepts(self, state: State) -> bool:
        """Whether a state that covers all variables is allowed."""
        raise NotImplementedError(f"{type(self).__name__} does not define accepts(state)")

    def __and__(self, other: Constraint) -> Constraint:
        """Both hold."""
        from circuitroute.constraints.algebra import And

        return And.of(self, other) if isinstance(other, Constraint) else NotImplemented

    def __or__(self, other: Constraint) -> Constraint:
        """At least one holds."""
        from circuitroute.constraints.algebra import Or

        return Or.of(self, other) if isinstance(other, Constraint) else NotImplemented

    def __invert__(self) -> Constraint:
        """It does not hold."""
        from circuitroute.constraints.algebra import Not

        return Not.of(self)

    def over(self, indices: Iterable[int]) -> Constraint:
        """The same constraint on the variables ``indices``; the others are left free.

        ``leaf(0)`` becomes the literal states of ``indices[0]``, and so on.

        Raises:
            TypeError: an index is not an integer.
            ValueError: an index is negative or given twice, or there is none.
        """
        return Over(self, index_tuple("indices", indices))


@dataclass(frozen=True, repr=False)
class Over(Constraint):
    """``constraint`` on the variables ``indices`` only; made by :meth:`Constraint.over`.

    Like the other composed constraints it has no machine of its own: compilers take it apart.
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

    def __repr__(self) -> str:
        return f"{self.constraint!r}.over({list(self.indices)!r})"
