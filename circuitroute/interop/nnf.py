"""Circuits that c2d, dsharp, d4 and their like write: deterministic decomposable negation normal form (d-DNNF).

c2d's format (Darwiche, New advances in compiling CNF to decomposable negation normal form, 2004; dsharp and miniC2D
write it too) has a node per line, children first, numbered from 0, the last one being the root::

    nnf 3 2 1           nodes, edges, variables
    L -1                a literal
    A 2 0 1             and, of two nodes; "A 0" is true
    O 1 2 0 1           or, which decides variable 1 (0: not said), of two nodes; "O 0 0" is false

d4's format (Lagniez & Marquis, An Improved Decision-DNNF Compiler, 2017) has nodes and edges, with numbers of
their own, and literals on the edges; nodes may be used before they are declared. The first node is the root::

    o 1 0               or; "a" is and, "t" true, "f" false
    1 2 -1 3 0          from node 1 to node 2, with the literals -1 and 3

Variables are counted from 1 in both, from 0 here.

The parts of an and-node should share no variables. d4's first version writes a literal again below the and-node that
has it, which is correct and changes nothing: such parts are taken apart (:meth:`Builder.separated`). A node that names
both literals of a variable, or a part twice, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from circuitroute._validate import int_at_least
from circuitroute.circuit import Parts
from circuitroute.circuit.verify.bitsets import listed, members
from circuitroute.circuit.verify.properties import check
from circuitroute.errors import CircuitPropertyError, InfeasibleError
from circuitroute.interop.building import Builder, Value
from circuitroute.interop.imported import Imported
from circuitroute.interop.text import Line, TextFile

_C2D = "L literal, A count children..., or O variable count children..."
_D4 = '"o", "a", "t" or "f" with an id and 0, or an edge: source, target, literals, 0'
_HEADER = "the header: nnf nodes edges variables"
_NAMES = {b"o": "or", b"a": "and", b"t": "true", b"f": "false"}


@dataclass
class _Node:
    """An and, or an or, of parts: another node (None: true) with some literals. So are literals and constants."""

    number: int
    line: int
    is_or: bool
    is_constant: bool = False
    parts: list[tuple[int | None, Sequence[int]]] = field(default_factory=list)


@dataclass
class _Nnf:
    """The nodes of a file by their place, the place of the root, and how many variables there are."""

    format: str
    nodes: list[_Node]
    root: int
    variables: int


def read(path: str | os.PathLike[str], n: int | None, max_nodes: int) -> Parts:
    """The parts of a circuit in c2d's or d4's format, made smooth and verified; see :func:`circuitroute.read_nnf`."""
    max_nodes = int_at_least("max_nodes", max_nodes, 1)
    file = TextFile(path)
    nnf = _parse(file)
    builder = Builder(_variables(file, nnf, n), max_nodes, str(file.path))
    order = _topological(file, nnf)
    value = _build(file, nnf, order, builder)
    if value is None:
        raise InfeasibleError(f"{file.path}: the circuit is false, no subset satisfies it")
    graph, origin = builder.finish(value, nnf.root)
    check(graph, lambda i: _label(file, nnf.nodes[origin[i]]))
    return Parts(graph, Imported(nnf.format, file.digest))


def _label(file: TextFile, node: _Node) -> str:
    return f"node {node.number} of {file.path} (line {node.line})"


def _variables(file: TextFile, nnf: _Nnf, n: int | None) -> int:
    if n is None:
        if nnf.variables == 0:
            raise ValueError(f"n=None: {file.path} mentions no variables; give their number n")
        return nnf.variables
    n = int_at_least("n", n, 1)
    if n < nnf.variables:
        raise ValueError(f"n={n}: {file.path} has {nnf.variables} variables; leave out n or give a larger one")
    return n


def _parse(file: TextFile) -> _Nnf:
    first = next(file.lines(), None)
    if first is not None and first.words[0] == b"nnf":
        return _parse_c2d(file)
    if first is not None and first.words[0] in _NAMES:
        return _parse_d4(file)
    raise file.wrong("a circuit in the format of c2d (nnf ...) or d4 (o 1 0 ...)")


# ---------------------------------------------------------------------------------------------- c2d


def _parse_c2d(file: TextFile) -> _Nnf:
    lines = file.lines()
    header = next(lines)
    sizes = file.numbers(header, _HEADER)
    if len(sizes) != 3 or min(sizes) < 0:
        raise file.error(header.number, b" ".join(header.words), _HEADER)
    nodes: list[_Node] = []
    for line in lines:
        nodes.append(_c2d_node(file, line, len(nodes), sizes[2]))
    if len(nodes) != sizes[0] or not nodes:
        expected = f"as many nodes as there are, {len(nodes)} (is the file complete?)" if nodes else "at least one node"
        raise file.error(header.number, f"{sizes[0]} nodes", expected)
    return _Nnf("c2d", nodes, len(nodes) - 1, sizes[2])


def _c2d_node(file: TextFile, line: Line, number: int, variables: int) -> _Node:
    numbers = file.numbers(line, _C2D)
    match line.words[0], numbers:
        case b"L", [literal]:
            if not 1 <= abs(literal) <= variables:
                expected = f"1 to {variables} or its negative, as the header says"
                raise file.error(line.number, f"literal {literal}", expected)
            return _Node(number, line.number, False, parts=[(None, (literal,))])
        case b"A", [count, *children] if len(children) == count:
            pass
        case b"O", [_, count, *children] if len(children) == count:
            pass
        case _:
            raise file.error(line.number, b" ".join(line.words), _C2D)
    for child in children:
        if not 0 <= child < number:
            raise file.error(line.number, f"child {child} of node {number}", f"a node before it, 0 to {number - 1}")
    return _Node(number, line.number, line.words[0] == b"O", parts=[(child, ()) for child in children])


# ---------------------------------------------------------------------------------------------- d4


def _parse_d4(file: TextFile) -> _Nnf:
    nodes: list[_Node] = []
    place: dict[int, int] = {}
    edges: list[tuple[Line, list[int]]] = []
    for line in file.lines():
        if line.words[0] in _NAMES:
            nodes.append(_d4_node(file, line))
            if place.setdefault(nodes[-1].number, len(nodes) - 1) != len(nodes) - 1:
                raise file.error(line.number, f"node {nodes[-1].number} a second time", "every node declared once")
        else:
            numbers = file.numbers(line, _D4, skip=0)
            if len(numbers) < 3 or numbers[-1] != 0 or 0 in numbers[2:-1]:
                raise file.error(line.number, b" ".join(line.words), _D4)
            edges.append((line, numbers[:-1]))
    pointed_at = {_add_edge(file, line, numbers, nodes, place) for line, numbers in edges}
    for node in nodes:
        if node.is_constant == bool(node.parts):
            wanted = "none, since it is a constant" if node.parts else "at least one (is the file complete?)"
            raise file.error(node.line, f"node {node.number} with {len(node.parts)} edges from it", wanted)
    variables = max((abs(literal) for _, numbers in edges for literal in numbers[2:]), default=0)
    return _Nnf("d4", nodes, _d4_root(file, nodes, pointed_at), variables)


def _d4_node(file: TextFile, line: Line) -> _Node:
    numbers = file.numbers(line, _D4)
    # d4 writes its root as "o 1 1 0" in some versions.
    if len(numbers) not in (2, 3) or numbers[-1] != 0 or numbers[0] < 0 or numbers[1:-1] not in ([], [1]):
        raise file.error(line.number, b" ".join(line.words), _D4)
    return _Node(numbers[0], line.number, line.words[0] in (b"o", b"f"), line.words[0] in (b"t", b"f"))


def _add_edge(file: TextFile, line: Line, numbers: list[int], nodes: list[_Node], place: dict[int, int]) -> int:
    """Add an edge to its source; returns the place of its target."""
    source, target, *literals = numbers
    for end in (source, target):
        if end not in place:
            raise file.error(line.number, f"node {end}", "a node that is declared somewhere")
    nodes[place[source]].parts.append((place[target], literals))
    return place[target]


def _d4_root(file: TextFile, nodes: list[_Node], pointed_at: set[int]) -> int:
    """The first node; if edges lead to it, the only one that no edge leads to."""
    roots = [i for i in range(len(nodes)) if i not in pointed_at]
    if not roots or (roots[0] != 0 and len(roots) > 1):
        found = f"{len(roots)} nodes that no edge leads to"
        raise file.error(nodes[0].line, found, "one, the root (the first node declared, as d4 writes it)")
    return roots[0]


# ---------------------------------------------------------------------------------------------- both


def _topological(file: TextFile, nnf: _Nnf) -> list[int]:
    """What the root is made of, children first."""
    order: list[int] = []
    entered, left = {nnf.root}, set()
    waiting = [(nnf.root, iter(nnf.nodes[nnf.root].parts))]
    while waiting:
        node, parts = waiting[-1]
        child = next((c for c, _ in parts if c is not None and c not in left), None)
        if child is None:
            waiting.pop()
            left.add(node)
            order.append(node)
        elif child in entered:
            raise file.error(nnf.nodes[child].line, f"a cycle through node {nnf.nodes[child].number}", "no cycles")
        else:
            entered.add(child)
            waiting.append((child, iter(nnf.nodes[child].parts)))
    return order


def _build(file: TextFile, nnf: _Nnf, order: list[int], builder: Builder) -> Value:
    values: dict[int, Value] = {}
    for i in order:
        node = nnf.nodes[i]
        if node.is_or:
            branches = [_conjunction(file, nnf, i, [part], values, builder) for part in node.parts]
            values[i] = builder.disjunction(branches, i)
        else:
            values[i] = _conjunction(file, nnf, i, node.parts, values, builder)
    return values[nnf.root]


def _conjunction(
    file: TextFile,
    nnf: _Nnf,
    i: int,
    parts: Sequence[tuple[int | None, Sequence[int]]],
    values: dict[int, Value],
    builder: Builder,
) -> Value:
    """The product of the parts, or None if one is false."""
    if len(parts) == 1 and parts[0][0] is not None and not parts[0][1]:
        return values[parts[0][0]]
    children: list[int] = []
    for child, _ in parts:
        if child is not None:
            value = values[child]
            if value is None:
                return None
            children.append(builder.node(value, child))
    on_edges = {builder.literal(abs(literal) - 1, literal > 0) for _, literals in parts for literal in literals}
    factors = [*children, *sorted(on_edges)]
    # Opposite literals of one node, or a part that it has twice, are no habit of a compiler but a mistake.
    shared = builder.overlap([*filter(builder.is_literal, {*children, *on_edges})])
    if len({child for child, _ in parts}) < len(parts) and builder.overlap(children):
        shared |= builder.overlap(children)
    if not shared and builder.overlap(factors):
        separated = builder.separated(factors)
        if separated is None:
            return None
        factors, shared = separated, builder.overlap(separated)
    if shared:
        names = listed(v + 1 for v in members(shared))
        raise CircuitPropertyError(
            f"not decomposable: {_label(file, nnf.nodes[i])} multiplies parts that share the variables {names} "
            "(as the file counts them)"
        )
    return builder.conjunction(factors, i)
