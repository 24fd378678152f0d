"""Verification of what makes inference on a circuit exact: smooth, decomposable, deterministic.

- *decomposable*: the two factors of a product share no variable;
- *smooth*: the elements of a sum mention the same variables;
- *deterministic*: no assignment satisfies two elements of a sum.

(Darwiche & Marquis, A Knowledge Compilation Map, 2002.) The first two are read off the scopes. The third is
decided exactly for circuits whose nodes of equal scope split it alike (structured circuits): two elements
overlap if and only if both their factors do, so overlaps are found scope by scope, from the literals up.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.errors import CircuitPropertyError

Scope: TypeAlias = int  # a bit per variable
BoolArray: TypeAlias = npt.NDArray[np.bool_]


def check(graph: Graph) -> None:
    """Raise :class:`CircuitPropertyError`, naming the node, unless all three properties hold."""
    scopes = node_scopes(graph)
    if scopes[-1] != (1 << graph.n) - 1:
        missing = [v for v in range(graph.n) if not scopes[-1] >> v & 1]
        raise CircuitPropertyError(f"not smooth: the root does not mention variables {missing}")
    _check_deterministic(graph, scopes)


def node_scopes(graph: Graph) -> list[Scope]:
    """The variables below each node as bit sets; checks decomposability and smoothness on the way."""
    scopes: list[Scope] = []
    first = graph.first.tolist()
    left, right = graph.left.tolist(), graph.right.tolist()
    for node, kind in enumerate(graph.kind.tolist()):
        if kind == NodeKind.TRUE:
            scopes.append(0)
        elif kind != NodeKind.SUM:
            scopes.append(1 << int(graph.variable[node]))
        else:
            scopes.append(_sum_scope(node, range(first[node], first[node + 1]), left, right, scopes))
    return scopes


def _sum_scope(node: int, span: range, left: list[int], right: list[int], scopes: list[Scope]) -> Scope:
    if not span:
        raise CircuitPropertyError(f"node {node} is a sum without elements")
    found = -1
    for e in span:
        a, b = left[e], right[e]
        if a >= node or b >= node:
            raise CircuitPropertyError(f"node {node} comes before its child {max(a, b)}: not topologically ordered")
        if scopes[a] & scopes[b]:
            shared = _variables(scopes[a] & scopes[b])
            raise CircuitPropertyError(f"not decomposable: node {node} multiplies {a} and {b}, both over {shared}")
        scope = scopes[a] | scopes[b]
        if found not in (-1, scope):
            different = _variables(found ^ scope)
            raise CircuitPropertyError(f"not smooth: elements of node {node} differ in variables {different}")
        found = scope
    return found


def _variables(scope: Scope) -> list[int]:
    return [v for v in range(scope.bit_length()) if scope >> v & 1]


def _check_deterministic(graph: Graph, scopes: list[Scope]) -> None:
    groups: dict[Scope, list[int]] = defaultdict(list)
    for node, scope in enumerate(scopes):
        groups[scope].append(node)
    position = np.zeros(graph.num_nodes, dtype=np.int64)
    for nodes in groups.values():
        position[nodes] = np.arange(len(nodes))
    # overlaps[scope][i, j]: some assignment satisfies both the i-th and the j-th node of that scope.
    # None stands for the identity matrix, by far the usual case.
    overlaps: dict[Scope, BoolArray | None] = {}
    for scope in sorted(groups, key=int.bit_count):
        overlaps[scope] = _group_overlaps(graph, groups[scope], scopes, position, overlaps)


def _group_overlaps(
    graph: Graph,
    nodes: list[int],
    scopes: list[Scope],
    position: npt.NDArray[np.int64],
    overlaps: dict[Scope, BoolArray | None],
) -> BoolArray | None:
    """Overlaps between the nodes of one scope; raises if two elements of one sum overlap."""
    atoms = [node for node in nodes if graph.kind[node] != NodeKind.SUM]
    sums = [node for node in nodes if graph.kind[node] == NodeKind.SUM]
    if not sums:
        return _atom_overlaps(graph, atoms)
    spans = [np.arange(graph.first[node], graph.first[node + 1]) for node in sums]
    elements = np.concatenate(spans)
    owner = np.repeat(np.arange(len(sums)), [len(s) for s in spans])
    left, right = graph.left[elements].astype(np.int64), graph.right[elements].astype(np.int64)
    left, right = _orient(left, right, scopes, sums[0])
    if atoms:
        # A literal beside sums over the same variable: a sum of both literals overlaps either.
        return _literal_sums(graph, nodes, sums, scopes)
    a, b = position[left], position[right]
    lap_a, lap_b = overlaps[scopes[int(left[0])]], overlaps[scopes[int(right[0])]]
    if lap_a is None and lap_b is None:
        return _identity_overlaps(a, b, owner, sums)
    return _dense_overlaps(a, b, owner, sums, lap_a, lap_b)


def _atom_overlaps(graph: Graph, atoms: list[int]) -> BoolArray | None:
    kinds = [(int(graph.kind[node]), int(graph.variable[node])) for node in atoms]
    if len(set(kinds)) == len(kinds):
        return None
    return np.array([[x == y for y in kinds] for x in kinds])


def _orient(
    left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], scopes: list[Scope], node: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Swap factors where needed so that all left factors have one scope; refuse other splits."""
    want = scopes[int(left[0])]
    swap = np.array([scopes[int(x)] != want for x in left])
    left, right = np.where(swap, right, left), np.where(swap, left, right)
    if any(scopes[int(x)] != want for x in left):
        raise CircuitPropertyError(
            f"cannot verify determinism: nodes with the scope of node {node} split it in different ways"
        )
    return left, right


def _literal_sums(graph: Graph, nodes: list[int], sums: list[int], scopes: list[Scope]) -> BoolArray:
    """Nodes over a single variable: each is a set of literals, so overlaps are intersections."""
    covers: dict[int, set[int]] = {}
    for node in nodes:
        if graph.kind[node] != NodeKind.SUM:
            covers[node] = {int(graph.kind[node])}
            continue
        parts: list[int] = []
        for e in range(int(graph.first[node]), int(graph.first[node + 1])):
            a, b = int(graph.left[e]), int(graph.right[e])
            parts.extend(covers[a if scopes[a] else b])
        if len(set(parts)) != len(parts):
            raise CircuitPropertyError(f"not deterministic: two elements of node {node} can both hold")
        covers[node] = set(parts)
    return np.array([[bool(covers[x] & covers[y]) for y in nodes] for x in nodes])


def _identity_overlaps(
    a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], owner: npt.NDArray[np.int64], sums: list[int]
) -> BoolArray | None:
    """Children of one scope are disjoint: elements overlap only where they are the same pair."""
    pair = a * (int(b.max()) + 1) + b
    order = np.lexsort((owner, pair))
    same = pair[order][1:] == pair[order][:-1]
    first, second = owner[order][:-1][same], owner[order][1:][same]
    clash = np.flatnonzero(first == second)
    if len(clash):
        node = sums[int(first[clash[0]])]
        raise CircuitPropertyError(f"not deterministic: node {node} has the same element twice")
    if not same.any():
        return None
    return _dense_overlaps(a, b, owner, sums, None, None)


def _dense_overlaps(
    a: npt.NDArray[np.int64],
    b: npt.NDArray[np.int64],
    owner: npt.NDArray[np.int64],
    sums: list[int],
    lap_a: BoolArray | None,
    lap_b: BoolArray | None,
) -> BoolArray:
    """Overlaps by comparing every pair of elements, one row of elements at a time."""
    result = np.zeros((len(sums), len(sums)), dtype=np.bool_)
    for e in range(len(owner)):
        hit_a = (a == a[e]) if lap_a is None else lap_a[a[e]][a]
        hit_b = (b == b[e]) if lap_b is None else lap_b[b[e]][b]
        hit = hit_a & hit_b
        hit[e] = False
        if (owner[hit] == owner[e]).any():
            raise CircuitPropertyError(f"not deterministic: two elements of node {sums[owner[e]]} can both hold")
        result[owner[e], owner[hit]] = True
        result[owner[e], owner[e]] = True
    return result
