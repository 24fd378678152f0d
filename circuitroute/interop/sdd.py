"""Sentential decision diagrams in libsdd's text formats (Darwiche, SDD: A New Canonical Representation, 2011).

An SDD file has a node per line, children first, the last one being the root; its vtree is another file::

    sdd 5                           vtree 3
    L 1 0 1     id vtree literal    L 0 1       id variable
    L 2 2 -2                        L 2 2
    L 3 0 -1                        I 1 0 2     id left right
    F 4         id
    D 0 1 2 1 2 3 4                 id vtree count (prime sub)...

Lines that start with ``c`` are comments, ``T id`` is true. Variables are counted from 1 in files, from 0 here.

Which vtree node is meant by a number in an SDD file: libsdd numbers the nodes of a vtree anew when it reads one, from
left to right (an inner node between its halves), and writes these positions, whatever ids the vtree's file uses; other
tools write the ids themselves. Both are tried, libsdd's first. Which one it is decides only what is refused as not
fitting: the meaning of an SDD depends on its literals alone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TypeAlias

from circuitroute._validate import int_at_least
from circuitroute.circuit import Graph, Parts
from circuitroute.circuit.verify.properties import check
from circuitroute.deadline import tick
from circuitroute.errors import CircuitFileError, InfeasibleError
from circuitroute.interop.building import TRUE, Builder
from circuitroute.interop.imported import Imported
from circuitroute.interop.partitions import Partitions
from circuitroute.interop.text import Line, TextFile

_SDD = "F id, T id, L id vtree literal, or D id vtree count and that many pairs prime sub"
_VTREE = "L id variable, or I id left right"
# A node and the place in the vtree it belongs to (None: true, which fits everywhere); None for false.
_Value: TypeAlias = tuple[int, int | None] | None


def read(path: str | os.PathLike[str], vtree: str | os.PathLike[str], max_nodes: int) -> Parts:
    """The parts of the circuit in an SDD, made smooth and verified; see :func:`circuitroute.read_sdd`."""
    max_nodes = int_at_least("max_nodes", max_nodes, 1)
    file, tree_file = TextFile(path), TextFile(vtree, "vtree")
    graph, origin, partitioned = _smooth(file, tree_file, max_nodes, str(file.path))
    check(graph, lambda i: f"node {origin[i]} of {file.path}", deterministic=partitioned)
    return Parts(graph, Imported("sdd", _digest(file, tree_file).hex()))


def graph(path: str | os.PathLike[str], vtree: str | os.PathLike[str], max_nodes: int, source: str) -> Graph:
    """The graph of an SDD that a compiler just made, smooth; not verified, since compilers' own are not either.

    ``source`` is what messages call it.
    """
    return _smooth(TextFile(path), TextFile(vtree, "vtree"), max_nodes, source)[0]


def _digest(file: TextFile, tree_file: TextFile) -> bytes:
    return hashlib.sha256(file.data + tree_file.data).digest()


def _smooth(file: TextFile, tree_file: TextFile, max_nodes: int, source: str) -> tuple[Graph, list[int], bool]:
    """The graph of an SDD, smooth along its vtree, and the number that each of its nodes has in the file.

    At last, whether the primes of all decisions are partitions, which makes the graph deterministic.
    """
    reader, value = _read_nodes(file, _read_vtree(tree_file), max_nodes, source, _digest(file, tree_file))
    if value is None:
        raise InfeasibleError(f"{source}: the circuit is false, no subset satisfies it")
    return *reader.builder.finish(reader.lifted(value, reader.tree.root), -1), reader.partitions.all


# ---------------------------------------------------------------------------------------------- the vtree


@dataclass
class _Vtree:
    """Nodes by id: the variable (counted from 0) of a leaf, the halves of an inner node, and the parent."""

    path: str
    variable: dict[int, int]
    halves: dict[int, tuple[int, int]]
    parent: dict[int, int]
    root: int
    span: dict[int, tuple[int, int]]  # the first leaf below a node and the one after its last, from left to right

    @property
    def variables(self) -> int:
        return len(self.variable)

    def contains(self, node: int, other: int) -> bool:
        """Whether ``other`` is ``node`` or lies below it."""
        start, stop = self.span[node]
        return start <= self.span[other][0] and self.span[other][1] <= stop

    def in_order(self) -> _Vtree:
        """The same tree, its nodes numbered from left to right, an inner node between its halves."""
        # Leaves are at 0, 2, 4, ..., and an inner node is just before the first leaf of its right half.
        number = {node: 2 * self.span[node][0] for node in self.variable}
        number |= {node: 2 * self.span[right][0] - 1 for node, (_, right) in self.halves.items()}
        return _Vtree(
            self.path,
            {number[node]: variable for node, variable in self.variable.items()},
            {number[node]: (number[left], number[right]) for node, (left, right) in self.halves.items()},
            {number[node]: number[parent] for node, parent in self.parent.items()},
            number[self.root],
            {number[node]: span for node, span in self.span.items()},
        )


def _sized(file: TextFile, kind: str) -> tuple[list[Line], Line]:
    """The lines after the header, and the header."""
    lines = file.lines()
    header = next(lines, None)
    if header is None or header.words[0] != kind.encode():
        raise file.wrong("an SDD" if kind == "sdd" else "a vtree")
    numbers = file.numbers(header, f"{kind} and the number of nodes")
    rest = list(lines)
    if len(numbers) != 1 or numbers[0] != len(rest) or not rest:
        expected = f"{kind} {max(len(rest), 1)}, the number of nodes (is the file complete?)"
        raise file.error(header.number, b" ".join(header.words), expected)
    return rest, header


def _read_vtree(file: TextFile) -> _Vtree:
    lines, header = _sized(file, "vtree")
    variable: dict[int, int] = {}
    halves: dict[int, tuple[int, int]] = {}
    parent: dict[int, int] = {}
    span: dict[int, tuple[int, int]] = {}
    for line in lines:
        match line.words[0], file.numbers(line, _VTREE):
            case b"L", [node, v] if node not in variable and node not in halves and 1 <= v <= len(lines):
                variable[node] = v - 1
            case b"I", [node, left, right] if node not in variable and node not in halves and left != right:
                for half in (left, right):
                    if half in parent or not (half in variable or half in halves):
                        raise file.error(line.number, f"half {half}", "a node before it that is not half of another")
                    parent[half] = node
                halves[node] = left, right
            case _:
                raise file.error(line.number, b" ".join(line.words), f"{_VTREE}; ids and variables used once")
    roots = [node for node in (*variable, *halves) if node not in parent]
    if len(roots) != 1 or sorted(variable.values()) != list(range(len(variable))):
        found = f"{len(roots)} roots and the variables {sorted(v + 1 for v in variable.values())[:10]}"
        raise file.error(header.number, found, f"one root, and each of the variables 1 to {len(variable)} once")
    tree = _Vtree(str(file.path), variable, halves, parent, roots[0], span)
    _number_leaves(tree)
    return tree


def _number_leaves(tree: _Vtree) -> None:
    leaves = 0
    waiting = [(tree.root, False)]
    while waiting:
        node, done = waiting.pop()
        if node in tree.variable:
            tree.span[node] = leaves, leaves + 1
            leaves += 1
        elif done:
            left, right = tree.halves[node]
            tree.span[node] = tree.span[left][0], tree.span[right][1]
        else:
            left, right = tree.halves[node]
            waiting += [(node, True), (right, False), (left, False)]


# ---------------------------------------------------------------------------------------------- the diagram


def _read_nodes(file: TextFile, tree: _Vtree, max_nodes: int, source: str, digest: bytes) -> tuple[_Reader, _Value]:
    """The value of the last node, by the numbering of vtree nodes that fits; see the head of this file."""
    positions = tree.in_order()
    refused: list[CircuitFileError] = []
    for numbered in (positions,) if positions == tree else (positions, tree):
        reader = _Reader(file, numbered, Builder(tree.variables, max_nodes, source), Partitions(digest))
        try:
            return reader, reader.read()
        except CircuitFileError as error:
            refused.append(error)
    if len(set(map(str, refused))) == 1:  # whatever the numbering
        raise refused[0]
    raise CircuitFileError(
        f"{file.path} does not fit {tree.path} (is it this SDD's vtree?), neither with nodes numbered from left to "
        f"right, as libsdd writes them ({refused[0]}), nor with the ids of that file ({refused[1]})"
    )


class _Reader:
    """Reads nodes in the order of the file; every node is made smooth over its place in the vtree."""

    def __init__(self, file: TextFile, tree: _Vtree, builder: Builder, partitions: Partitions) -> None:
        self.builder = builder
        self.partitions = partitions
        self._file = file
        self.tree = tree
        self._values: dict[int, _Value] = {}
        self._free: dict[int, int] = {}
        self._lifted: dict[tuple[int, int], int] = {}

    def read(self) -> _Value:
        """The value of the last node."""
        value: _Value = None
        for line in _sized(self._file, "sdd")[0]:
            node, value = self._node(line)
            if node in self._values:
                raise self._file.error(line.number, f"node {node} a second time", "every id once")
            self._values[node] = value
        return value

    def _node(self, line: Line) -> tuple[int, _Value]:
        match line.words[0], self._file.numbers(line, _SDD):
            case b"F", [node]:
                self.partitions.constant(node, False)
                return node, None
            case b"T", [node]:
                self.partitions.constant(node, True)
                return node, (TRUE, None)
            case b"L", [node, place, literal]:
                return node, self._literal(line, node, place, literal)
            case b"D", [node, place, count, *parts] if count >= 1 and len(parts) == 2 * count:
                return node, self._decision(line, node, place, parts)
        raise self._file.error(line.number, b" ".join(line.words), _SDD)

    def _literal(self, line: Line, node: int, place: int, literal: int) -> _Value:
        variable = self.tree.variable.get(place)
        if variable != abs(literal) - 1 or literal == 0:
            expected = f"a literal of vtree node {place}" + (
                f", {variable + 1} or -{variable + 1}" if variable is not None else f", a leaf of {self.tree.path}"
            )
            raise self._file.error(line.number, f"literal {literal}", expected)
        self.partitions.literal(node, variable, literal > 0)
        return self.builder.literal(variable, literal > 0), place

    def _decision(self, line: Line, node: int, place: int, parts: list[int]) -> _Value:
        if place not in self.tree.halves:
            expected = f"an inner node of {self.tree.path} (is it this SDD's vtree?)"
            raise self._file.error(line.number, f"vtree node {place}", expected)
        left, right = self.tree.halves[place]
        elements = []
        for prime, sub in zip(parts[::2], parts[1::2], strict=True):
            a, b = self._child(line, prime, left), self._child(line, sub, right)
            if a is not None and b is not None:
                elements.append((self.lifted(a, left), self.lifted(b, right)))
        self.partitions.decision(node, parts)
        return (self.builder.sum(elements, node), place) if elements else None

    def _child(self, line: Line, child: int, half: int) -> _Value:
        """The value of a prime or sub, which must belong below its half of the vtree."""
        if child not in self._values:
            raise self._file.error(line.number, f"node {child}", "a node before it")
        value = self._values[child]
        if value is not None and value[1] is not None and not self.tree.contains(half, value[1]):
            expected = f"a node at or below vtree node {half} of {self.tree.path} (is it this SDD's vtree?)"
            raise self._file.error(line.number, f"node {child}, at vtree node {value[1]}", expected)
        return value

    def lifted(self, value: tuple[int, int | None], target: int) -> int:
        """A value made smooth over the variables of a vtree node at or above its own."""
        node, place = value
        if place is None:
            return self._all_free(target)
        while place != target:
            tick()
            parent = self.tree.parent[place]
            if (node, parent) not in self._lifted:
                left, right = self.tree.halves[parent]
                pair = (node, self._all_free(right)) if place == left else (self._all_free(left), node)
                self._lifted[node, parent] = self.builder.product(*pair, self.builder.origin[node])
            node, place = self._lifted[node, parent], parent
        return node

    def _all_free(self, target: int) -> int:
        """The product of (x or not x) over the variables of a vtree node, factored like the vtree."""
        waiting = [] if target in self._free else [target]
        while waiting:
            place = waiting[-1]
            if place in self.tree.variable:
                self._free[place] = self.builder.free(1 << self.tree.variable[place])
            halves = self.tree.halves.get(place, ())
            missing = [half for half in halves if half not in self._free]
            waiting += missing
            if not missing:
                waiting.pop()
                if halves:
                    self._free[place] = self.builder.product(self._free[halves[0]], self._free[halves[1]], -1)
        return self._free[target]
