"""Reduced ordered binary decision diagrams (Bryant 1986), just enough of them to compile a formula.

Nodes are numbers: 0 and 1 are the constants, every other one tests the variable at its ``level`` and goes ``low`` or
``high``. Equal nodes are one node, so equal functions are equal numbers. Not the package ``dd``, which cannot stop at a
given number of nodes and has dependencies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from circuitroute.constraints.formula import Formula
from circuitroute.deadline import tick

ZERO, ONE = 0, 1
# Results of ``ite`` that are remembered before all are forgotten: half a gibibyte of them.
MAX_REMEMBERED = 3_000_000
BEYOND = 1 << 30  # the level of the constants: below every variable


class TooManyNodesError(Exception):
    """The diagrams grew beyond the limit they were given."""


class Bdd:
    """Diagrams over one order of variables; :meth:`allow` limits how many nodes are made."""

    def __init__(self) -> None:
        self.level = [BEYOND, BEYOND]
        self.low = [ZERO, ONE]
        self.high = [ZERO, ONE]
        self._limit = 0
        self._unique: dict[tuple[int, int, int], int] = {}
        self._results: dict[tuple[int, int, int], int] = {}

    @property
    def made(self) -> int:
        """The number of nodes ever made."""
        return len(self.level)

    def allow(self, nodes: int) -> None:
        """Allow this many new nodes from now on; one more raises :class:`TooManyNodesError`."""
        self._limit = len(self.level) + nodes

    def node(self, level: int, low: int, high: int) -> int:
        """The node that tests ``level``, made if it is new; ``low`` itself if the test does not matter."""
        if low == high:
            return low
        known = self._unique.get((level, low, high))
        if known is None:
            known = len(self.level)
            if known >= self._limit:
                raise TooManyNodesError
            self._unique[level, low, high] = known
            self.level.append(level)
            self.low.append(low)
            self.high.append(high)
        return known

    def ite(self, test: int, then: int, otherwise: int) -> int:
        """If ``test`` then ``then`` else ``otherwise``: Bryant's apply, without recursion."""
        results = self._results
        waiting = [(test, then, otherwise)]
        while waiting:
            tick()
            if len(results) > MAX_REMEMBERED:
                results.clear()
            here = waiting[-1]
            if here in results:
                waiting.pop()
                continue
            simple = _simple(*here)
            if simple is not None:
                results[here] = simple
                waiting.pop()
                continue
            level, below_absent, below_present = self._halves(*here)
            low, high = results.get(below_absent), results.get(below_present)
            if low is None:
                waiting.append(below_absent)
            if high is None:
                waiting.append(below_present)
            if low is not None and high is not None:
                results[here] = self.node(level, low, high)
                waiting.pop()
        return results[test, then, otherwise]

    def _halves(self, a: int, b: int, c: int) -> tuple[int, tuple[int, int, int], tuple[int, int, int]]:
        """The first level of three diagrams, and their cofactors there: variable absent, variable present."""
        level, low, high = self.level, self.low, self.high
        top = min(level[a], level[b], level[c])
        at_a, at_b, at_c = level[a] == top, level[b] == top, level[c] == top
        return (
            top,
            (low[a] if at_a else a, low[b] if at_b else b, low[c] if at_c else c),
            (high[a] if at_a else a, high[b] if at_b else b, high[c] if at_c else c),
        )

    def negation(self, some: int) -> int:
        """Not."""
        return self.ite(some, ZERO, ONE)

    def conjunction(self, some: Sequence[int]) -> int:
        """And; from the last variables up, which keeps every step small."""
        result = ONE
        for each in sorted(set(some), key=lambda i: -self.level[i]):
            result = self.ite(each, result, ZERO)
        return result

    def disjunction(self, some: Sequence[int]) -> int:
        """Or."""
        result = ZERO
        for each in sorted(set(some), key=lambda i: -self.level[i]):
            result = self.ite(each, ONE, result)
        return result

    def of(self, formula: Formula, level_of: Callable[[int], int]) -> int:
        """The diagram of a formula whose variable v stands at ``level_of(v)``."""
        values: list[int] = []
        for operator, operands in formula.steps:
            if operator == "var":
                values.append(self.node(level_of(operands[0]), ZERO, ONE))
            else:
                values.append(self._step(operator, [values[i] for i in operands]))
        return values[-1]

    def _step(self, operator: str, some: list[int]) -> int:
        match operator:
            case "true":
                return ONE
            case "false":
                return ZERO
            case "not":
                return self.negation(some[0])
            case "and":
                return self.conjunction(some)
            case "or":
                return self.disjunction(some)
            case "implies":
                return self.ite(some[0], some[1], ONE)
            case "ite":
                return self.ite(some[0], some[1], some[2])
            case "equivalent":
                return self.disjunction([self.conjunction(some), self.negation(self.disjunction(some))])
        result = ZERO  # what is left is "xor"
        for each in some:
            result = self.ite(each, self.negation(result), result)
        return result

    def below(self, root: int) -> list[int]:
        """The nodes of a diagram, constants included, the root first."""
        found = {root: None}
        waiting = [root]
        while waiting:
            tick()
            here = waiting.pop()
            for child in (self.low[here], self.high[here]):
                if child not in found:
                    found[child] = None
                    waiting.append(child)
        return list(found)


def _simple(test: int, then: int, otherwise: int) -> int | None:
    """The result where no node needs to be looked at, else None."""
    if test == ONE or then == otherwise:
        return then
    if test == ZERO:
        return otherwise
    return test if (then, otherwise) == (ONE, ZERO) else None
