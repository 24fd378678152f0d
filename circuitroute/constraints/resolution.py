"""Existential quantification of clauses: variables resolved away one after the other (Davis & Putnam 1960)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from circuitroute.deadline import tick
from circuitroute.errors import CircuitTooLargeError

_Clause = frozenset[int]


def eliminated(
    clauses: Iterable[tuple[int, ...]], hidden: Callable[[int], bool], max_clauses: int
) -> list[tuple[int, ...]]:
    """Clauses without the hidden variables that hold exactly where some value of these satisfies those given.

    The variable goes first whose elimination makes the fewest new clauses; clauses that others imply are dropped.

    Raises:
        CircuitTooLargeError: more than ``max_clauses`` clauses.
    """
    at: dict[int, set[_Clause]] = {}  # of literals, the clauses that name them
    kept: set[_Clause] = set()

    def add(clause: _Clause) -> None:
        tick(1 + len(clause))
        names = min(clause, key=lambda literal: len(at.get(literal, ())), default=None)
        if names is None:
            kept.add(clause)
            return
        if any(other <= clause for literal in clause for other in at.get(literal, ())):
            return
        for other in [other for other in at.get(names, ()) if clause < other]:
            drop(other)
        kept.add(clause)
        for literal in clause:
            at.setdefault(literal, set()).add(clause)
        if len(kept) > max_clauses:
            raise CircuitTooLargeError(
                f"quantifying the hidden variables takes more than max_clauses={max_clauses} clauses: show more "
                "variables, raise max_clauses, or use a counter for projected model counting, such as ganak or d4"
            )

    def drop(clause: _Clause) -> None:
        kept.discard(clause)
        for literal in clause:
            at[literal].discard(clause)

    for given in clauses:
        add(frozenset(given))
    waiting = {v for literal in at if hidden(v := abs(literal))}
    while waiting:
        tick(len(waiting))
        v = min(waiting, key=lambda v: (len(at.get(v, ())) * len(at.get(-v, ())), v))
        waiting.discard(v)
        present, absent = sorted(at.get(v, ()), key=sorted), sorted(at.get(-v, ()), key=sorted)
        for clause in (*present, *absent):
            drop(clause)
        for a in present:
            for b in absent:
                tick()
                resolvent = (a - {v}) | (b - {-v})
                if not any(-literal in resolvent for literal in resolvent):
                    add(resolvent)
    if frozenset() in kept:
        return [()]
    return [tuple(sorted(clause, key=abs)) for clause in sorted(kept, key=lambda c: sorted(c, key=abs))]
