"""Determinism of unstructured circuits: literals that elements imply, and enumeration where few variables decide.

A node *implies* a literal that holds in all its models: a literal implies itself, a product what either factor does,
a sum what all its elements do. Two elements that imply opposite literals exclude one another. That covers decision
nodes, (x and ...) or (not x and ...), which is all that the compilers c2d, dsharp and d4 write (Huang & Darwiche, The
Language of Search, 2007; Lagniez & Marquis, An Improved Decision-DNNF Compiler, 2017).

Elements that this does not settle are compared on all assignments of the variables that they depend on, if those are
at most 16. Otherwise the question is hard (deciding it is coNP-complete) and the node is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import TypeAlias

from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.circuit.verify.bitsets import Pool
from circuitroute.deadline import tick
from circuitroute.errors import CircuitPropertyError

Literals: TypeAlias = int  # bit 2 v: variable v is absent; bit 2 v + 1: it is present
Pair: TypeAlias = tuple[int, int]

# How many variables are enumerated at most, and how many machine words all truth tables may take together.
MAX_ENUMERATED = 16
MAX_TABLE_WORDS = 1 << 29
# How many pairs of elements are compared by their literals, in all sums together.
MAX_PAIRS = 1 << 21


class UnverifiedError(CircuitPropertyError):
    """No fault was found, but the node named could not be verified to be deterministic."""


def check_conflicts(graph: Graph, name: Callable[[int], str]) -> None:
    """Raise unless every sum is verified to be deterministic; needs a smooth and decomposable graph.

    Raises:
        UnverifiedError: the sum named could not be decided.
        CircuitPropertyError: two elements of the sum named can both hold.
    """
    judge = _Judge(graph, name)
    first = graph.first.tolist()
    unverified: UnverifiedError | None = None
    for node, kind in enumerate(graph.kind.tolist()):
        if kind == NodeKind.SUM:
            try:
                judge.judge(node, range(first[node], first[node + 1]))
            except UnverifiedError as error:  # a sum that is known to be wrong would say more
                unverified = unverified or error
    if unverified is not None:
        raise unverified


class _Judge:
    """Decides one sum after the other and keeps what each node implies."""

    def __init__(self, graph: Graph, name: Callable[[int], str]) -> None:
        self._left, self._right = graph.left.tolist(), graph.right.tolist()
        self._name = name
        self._absent = int("01" * graph.n, 2)  # the bits of the absent literals
        self._pool = Pool()
        self._implied: list[Literals] = [0] * graph.num_nodes
        for node, (kind, variable) in enumerate(zip(graph.kind.tolist(), graph.variable.tolist(), strict=True)):
            if kind in (NodeKind.ABSENT, NodeKind.PRESENT):
                self._implied[node] = self._pool.shared(1 << 2 * variable + int(kind == NodeKind.PRESENT))
        self._tables = _Tables(graph)
        self._pairs = 0

    def judge(self, node: int, elements: range) -> None:
        """Decide one sum, and note what it implies; its children come first."""
        tick(len(elements))
        implied = [self._implied[self._left[e]] | self._implied[self._right[e]] for e in elements]
        common = implied[0]
        for literals in implied:
            common &= literals
        self._implied[node] = self._pool.shared(common)
        doubtful = self._doubtful(node, dict(zip(elements, implied, strict=True)))
        if doubtful:
            self._enumerate(node, doubtful)

    def _opposite(self, literals: Literals) -> Literals:
        return (literals & self._absent) << 1 | literals >> 1 & self._absent

    def _doubtful(self, node: int, implied: dict[int, Literals]) -> list[Pair]:
        """Pairs of elements that do not imply opposite literals."""
        found: list[Pair] = []
        waiting = [list(implied)]
        while waiting:
            elements = waiting.pop()
            tick(len(elements))
            if len(elements) < 2:
                continue
            halves = self._halves(elements, implied) if len(elements) > 2 else None
            if halves is not None:
                waiting += halves
                continue
            self._pairs += len(elements) * (len(elements) - 1) // 2
            if self._pairs > MAX_PAIRS:
                raise UnverifiedError(
                    f"cannot verify that {self._name(node)} is deterministic: it has {len(implied)} elements, and "
                    f"comparing all pairs of elements takes more than {MAX_PAIRS} comparisons"
                )
            found += [pair for pair in combinations(elements, 2) if self._may_meet(*pair, implied)]
        return found

    def _may_meet(self, e: int, f: int, implied: dict[int, Literals]) -> bool:
        tick()
        return not self._opposite(implied[e]) & implied[f]

    def _halves(self, elements: list[int], implied: dict[int, Literals]) -> list[list[int]] | None:
        """The elements split on a variable that all of them decide, but not all the same way; None if there is none."""
        decided, agreed = -1, -1
        for e in elements:
            decided &= implied[e] | self._opposite(implied[e])
            agreed &= implied[e]
        split = decided & ~(agreed | self._opposite(agreed))
        if not split:
            return None
        bit = split & -split
        return [[e for e in elements if implied[e] & bit], [e for e in elements if not implied[e] & bit]]

    def _enumerate(self, node: int, pairs: list[Pair]) -> None:
        """Compare pairs of elements on all assignments of what they depend on."""
        for e, f in pairs:
            tick()
            over = self._tables.depends(e) | self._tables.depends(f)
            if over.bit_count() > MAX_ENUMERATED:
                raise UnverifiedError(
                    f"cannot verify that {self._name(node)} is deterministic: two of its elements imply no opposite "
                    f"literals, and they depend on {over.bit_count()} variables, too many to enumerate "
                    f"(at most {MAX_ENUMERATED})"
                )
            if self._tables.table(e, over) & self._tables.table(f, over):
                raise CircuitPropertyError(f"not deterministic: two elements of {self._name(node)} can both hold")
            if self._tables.words > MAX_TABLE_WORDS:
                raise UnverifiedError(
                    f"cannot verify that {self._name(node)} is deterministic: enumerating assignments takes too long"
                )


class _Tables:
    """Truth tables over a few variables, as integers of one bit per assignment."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._first: list[int] = graph.first.tolist()
        self._left: list[int] = graph.left.tolist()
        self._right: list[int] = graph.right.tolist()
        self._kind: list[int] = graph.kind.tolist()
        self._variable: list[int] = graph.variable.tolist()
        self._depends: list[int] | None = None
        self._known: tuple[int, dict[int, int]] = (0, {})
        self.words = 0

    def depends(self, element: int) -> int:
        """The variables that an element depends on: its scope without the variables that are left free below."""
        if self._depends is None:
            self._depends = self._all_depends()
        left, right = self._depends[self._left[element]], self._depends[self._right[element]]
        return left | right

    def _all_depends(self) -> list[int]:
        found: list[int] = []
        for node, kind in enumerate(self._kind):
            bits = 0 if kind in (NodeKind.TRUE, NodeKind.SUM) else 1 << self._variable[node]
            if kind == NodeKind.SUM and not self._is_free(node):
                for e in self._elements(node):
                    tick()
                    bits |= found[self._left[e]] | found[self._right[e]]
            found.append(bits)
        return found

    def _is_free(self, node: int) -> bool:
        """Whether a sum is "x or not x": every assignment satisfies it."""
        if len(self._elements(node)) != 2:
            return False
        factors = [(self._left[e], self._right[e]) for e in self._elements(node)]
        literals = [b if self._kind[a] == NodeKind.TRUE else a for a, b in factors]
        others = [a if self._kind[a] == NodeKind.TRUE else b for a, b in factors]
        return all(self._kind[other] == NodeKind.TRUE for other in others) and {self._kind[x] for x in literals} == {
            NodeKind.ABSENT,
            NodeKind.PRESENT,
        }

    def _elements(self, node: int) -> range:
        return range(self._first[node], self._first[node + 1])

    def table(self, element: int, over: int) -> int:
        """Which of the assignments to the variables ``over`` satisfy an element; bit i of a row is their i-th."""
        if self._known[0] != over:
            self._known = (over, {})
        tables = self._known[1]
        self._fill(self._below(element, tables), over, tables)
        return tables[self._left[element]] & tables[self._right[element]]

    def _below(self, element: int, known: dict[int, int]) -> list[int]:
        """The nodes under an element whose tables are not known, children first."""
        found: set[int] = set()
        waiting = [self._left[element], self._right[element]]
        while waiting:
            node = waiting.pop()
            tick()
            if node not in found and node not in known:
                found.add(node)
                for e in self._elements(node):
                    waiting += [self._left[e], self._right[e]]
        return sorted(found)

    def _fill(self, nodes: list[int], over: int, tables: dict[int, int]) -> None:
        rows = 1 << over.bit_count()
        everything = (1 << rows) - 1
        for node in nodes:
            kind = self._kind[node]
            if kind == NodeKind.SUM and not self._is_free(node):
                table = 0
                for e in self._elements(node):
                    tick(1 + rows // 10_000)
                    table |= tables[self._left[e]] & tables[self._right[e]]
                    self.words += 64 + rows // 64
            elif kind in (NodeKind.TRUE, NodeKind.SUM) or not over >> self._variable[node] & 1:
                table = everything  # free, and literals of variables that are free
            else:
                place = (over & (1 << self._variable[node]) - 1).bit_count()
                table = _literal_table(place, rows) ^ (everything if kind == NodeKind.ABSENT else 0)
            tables[node] = table


def _literal_table(place: int, rows: int) -> int:
    """The assignments, of ``rows``, in which bit ``place`` is set."""
    block = ((1 << (1 << place)) - 1) << (1 << place)
    width = 2 << place
    while width < rows:
        block |= block << width
        width *= 2
    return block
