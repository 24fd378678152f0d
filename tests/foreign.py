"""What the tests of the readers share: circuits in other compilers' formats, written and evaluated independently.

The evaluators go straight from the text to truth tables over all worlds, sharing nothing with the readers they judge.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.truth import enumerate_worlds

Mask = NDArray[Any]
Clause = tuple[int, ...]


def literal_mask(literal: int, worlds: Mask) -> Mask:
    column: Mask = worlds[:, abs(literal) - 1]
    return column if literal > 0 else ~column


def accept_c2d(text: str, n: int) -> Mask:
    """Which worlds satisfy a circuit in c2d's format."""
    worlds = enumerate_worlds(n)
    values: list[Mask] = []
    for line in text.splitlines():
        kind, *rest = line.split() or [""]
        numbers = [int(x) for x in rest] if kind in "LAO" else []
        if kind == "L":
            values.append(literal_mask(numbers[0], worlds))
        elif kind == "A":
            values.append(_all([values[i] for i in numbers[1:]], worlds))
        elif kind == "O":
            values.append(_any([values[i] for i in numbers[2:]], worlds))
    return values[-1]


def accept_d4(text: str, n: int) -> Mask:
    """Which worlds satisfy a circuit in d4's format."""
    worlds = enumerate_worlds(n)
    kinds: dict[int, str] = {}
    edges: dict[int, list[tuple[int, list[int]]]] = {}
    for line in text.splitlines():
        words = line.split() or ["c"]
        if words[0] == "c":
            continue
        if words[0] in ("o", "a", "t", "f"):
            kinds[int(words[1])] = words[0]
        else:
            source, target, *literals = (int(x) for x in words[:-1])
            edges.setdefault(source, []).append((target, literals))

    def value(node: int) -> Mask:
        parts = [
            _all([value(target), *(literal_mask(x, worlds) for x in literals)], worlds)
            for target, literals in edges.get(node, [])
        ]
        return _all(parts, worlds) if kinds[node] in "at" else _any(parts, worlds)

    return value(next(iter(kinds)))


def accept_sdd(text: str, n: int) -> Mask:
    """Which worlds satisfy an SDD."""
    worlds = enumerate_worlds(n)
    values: dict[int, Mask] = {}
    last = 0
    for line in text.splitlines():
        kind, *rest = line.split() or [""]
        if kind not in ("T", "F", "L", "D"):
            continue
        last, *numbers = (int(x) for x in rest)
        if kind == "L":
            values[last] = literal_mask(numbers[1], worlds)
        elif kind == "D":
            pairs = zip(numbers[2::2], numbers[3::2], strict=True)
            values[last] = _any([values[p] & values[s] for p, s in pairs], worlds)
        else:
            values[last] = np.full(len(worlds), kind == "T")
    return values[last]


def _all(parts: list[Mask], worlds: Mask) -> Mask:
    return np.logical_and.reduce([np.ones(len(worlds), dtype=bool), *parts])


def _any(parts: list[Mask], worlds: Mask) -> Mask:
    return np.logical_or.reduce([np.zeros(len(worlds), dtype=bool), *parts])


# ---------------------------------------------------------------------------------------------- CNFs


def random_cnf(seed: int, n: int, clauses: int, shortest: int = 1) -> list[Clause]:
    """Clauses of ``shortest`` to three literals."""
    rng = random.Random(seed)
    chosen = [rng.sample(range(1, n + 1), min(n, rng.randint(shortest, 3))) for _ in range(clauses)]
    return [tuple(v if rng.random() < 0.5 else -v for v in clause) for clause in chosen]


def accept_cnf(cnf: list[Clause], n: int) -> Mask:
    worlds = enumerate_worlds(n)
    return _all([_any([literal_mask(x, worlds) for x in clause], worlds) for clause in cnf], worlds)


# ---------------------------------------------------------------------------------------------- decision-DNNFs


class DecisionDnnf:
    """A small decision-DNNF compiler: unit propagation, components, a cache; writes c2d's and d4's formats.

    A node is ("true",), ("false",), ("or", (literals, node), (literals, node)) or ("and", nodes).
    """

    def __init__(self, cnf: list[Clause]) -> None:
        self._known: dict[frozenset[Clause], Any] = {}
        self.literals, self.root = self._branch(frozenset(cnf), [])

    def _branch(self, cnf: frozenset[Clause], literals: list[int]) -> tuple[list[int], Any]:
        """What unit propagation finds, and the node of what is left."""
        literals = list(literals)
        waiting = list(literals)
        while True:
            for literal in waiting:
                cnf = frozenset(tuple(x for x in c if x != -literal) for c in cnf if literal not in c)
            if () in cnf:
                return literals, ("false",)
            waiting = sorted({c[0] for c in cnf if len(c) == 1})
            if not waiting:
                return literals, self._node(cnf)
            waiting = waiting[:1]
            literals += waiting

    def _node(self, cnf: frozenset[Clause]) -> Any:
        if not cnf:
            return ("true",)
        if cnf not in self._known:
            parts = _components(cnf)
            if len(parts) > 1:
                self._known[cnf] = ("and", tuple(self._node(part) for part in parts))
            else:
                variable = min(abs(x) for c in cnf for x in c)
                self._known[cnf] = ("or", self._branch(cnf, [variable]), self._branch(cnf, [-variable]))
        return self._known[cnf]

    def c2d(self, n: int) -> str:
        """The circuit in c2d's format."""
        lines: list[str] = []
        place: dict[Any, int] = {}

        def add(line: str) -> int:
            if line not in place:
                place[line] = len(lines)
                lines.append(line)
            return place[line]

        def conjunction(literals: list[int], node: Any) -> int:
            parts = [add(f"L {x}") for x in literals]
            parts += [write(node)] if node != ("true",) or not parts else []
            return parts[0] if len(parts) == 1 else add(f"A {len(parts)} {' '.join(map(str, parts))}")

        def write(node: Any) -> int:
            if node[0] in ("true", "false"):
                return add("A 0" if node[0] == "true" else "O 0 0")
            if node[0] == "and":
                parts = [write(part) for part in node[1]]
                return add(f"A {len(parts)} {' '.join(map(str, parts))}")
            branches = [conjunction(*branch) for branch in node[1:]]
            return add(f"O {abs(node[1][0][0])} 2 {branches[0]} {branches[1]}")

        root = conjunction(self.literals, self.root)
        if root != len(lines) - 1:
            lines.append(f"A 1 {root}")
        edges = sum(int(line.split()[1 if line[0] == "A" else 2]) for line in lines if line[0] != "L")
        return "\n".join([f"nnf {len(lines)} {edges} {n}", *lines]) + "\n"

    def d4(self) -> str:
        """The circuit in d4's format: a node's line, what it is made of, then its edges."""
        lines = ["o 1 0"]
        number: dict[Any, int] = {}

        def write(node: Any) -> int:
            if node not in number:
                number[node] = len(number) + 2
                lines.append(f"{ {'true': 't', 'false': 'f', 'and': 'a', 'or': 'o'}[node[0]] } {number[node]} 0")
                branches = node[1:] if node[0] == "or" else [([], part) for part in (node[1:] or [()])[0]]
                ends = [(write(part), literals) for literals, part in branches]
                lines.extend(edge(number[node], end, literals) for end, literals in ends)
            return number[node]

        def edge(source: int, target: int, literals: list[int]) -> str:
            return " ".join(map(str, [source, target, *literals, 0]))

        root = write(_hashable(self.root))
        lines.append(edge(1, root, self.literals))
        return "\n".join(lines) + "\n"


def _hashable(node: Any) -> Any:
    if node[0] == "and":
        return ("and", tuple(_hashable(part) for part in node[1]))
    if node[0] == "or":
        return ("or", *((tuple(literals), _hashable(part)) for literals, part in node[1:]))
    return node


def _components(cnf: frozenset[Clause]) -> list[frozenset[Clause]]:
    groups: list[tuple[set[int], set[Clause]]] = []
    for clause in sorted(cnf):
        variables, clauses = {abs(x) for x in clause}, {clause}
        for group in [g for g in groups if g[0] & variables]:
            groups.remove(group)
            variables |= group[0]
            clauses |= group[1]
        groups.append((variables, clauses))
    return [frozenset(clauses) for _, clauses in groups]


Evaluator = Callable[[str, int], Mask]
