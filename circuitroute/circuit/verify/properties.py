"""Verification of what makes inference on a circuit exact: smooth, decomposable, deterministic.

- *decomposable*: the two factors of a product share no variable;
- *smooth*: the elements of a sum mention the same variables;
- *deterministic*: no assignment satisfies two elements of a sum.

(Darwiche & Marquis, A Knowledge Compilation Map, 2002.) The first two are read off the scopes. The third is decided
exactly for structured circuits (:mod:`.overlaps`), and in the rest by the literals that elements imply or by
enumeration (:mod:`.conflicts`); a sum that neither can decide is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.circuit.verify import conflicts, overlaps
from circuitroute.circuit.verify.bitsets import Pool, listed, members
from circuitroute.deadline import tick
from circuitroute.errors import CircuitPropertyError

Scope: TypeAlias = int  # a bit per variable
Name: TypeAlias = Callable[[int], str]


def check(graph: Graph, name: Name | None = None, deterministic: bool = False) -> None:
    """Raise :class:`CircuitPropertyError` unless all three properties hold.

    Args:
        graph: the circuit.
        name: what to call a node in messages; "node 7" by default.
        deterministic: whether the third is known already, and only the other two are looked at.

    Raises:
        UnverifiedError: no fault was found, but the node named could not be verified to be deterministic.
        CircuitPropertyError: a property does not hold; names the node.
        CircuitTooLargeError: the scopes of the nodes do not fit in memory.
    """
    name = name or default_name
    scopes = node_scopes(graph, name)
    if scopes[-1] != (1 << graph.n) - 1:
        missing = listed(members((1 << graph.n) - 1 & ~scopes[-1]))
        raise CircuitPropertyError(f"not smooth: the root does not mention variables {missing}")
    if deterministic:
        return
    try:
        if overlaps.check_structured(graph, scopes, name):
            return
    except overlaps.TooManyPairsError as limit:
        _check_conflicts_after(limit, graph, name)
        return
    conflicts.check_conflicts(graph, name)


def _check_conflicts_after(limit: overlaps.TooManyPairsError, graph: Graph, name: Name) -> None:
    """The second way to decide determinism, for a circuit that is too large for the first."""
    try:
        conflicts.check_conflicts(graph, name)
    except conflicts.UnverifiedError as error:
        raise conflicts.UnverifiedError(f"{error}. The circuit is structured, but {limit}") from None


def default_name(node: int) -> str:
    """What a node is called unless a name is given."""
    return f"node {node}"


def node_scopes(graph: Graph, name: Name | None = None) -> list[Scope]:
    """The variables below each node as bit sets; checks decomposability and smoothness on the way."""
    name = name or default_name
    pool = Pool()
    scopes: list[Scope] = []
    first = graph.first.tolist()
    left, right, variable = graph.left.tolist(), graph.right.tolist(), graph.variable.tolist()
    for node, kind in enumerate(graph.kind.tolist()):
        if kind == NodeKind.TRUE:
            scopes.append(0)
        elif kind != NodeKind.SUM:
            scopes.append(pool.shared(1 << variable[node]))
        else:
            span = range(first[node], first[node + 1])
            scopes.append(pool.shared(_sum_scope(node, span, left, right, scopes, name)))
    return scopes


def _sum_scope(node: int, span: range, left: list[int], right: list[int], scopes: list[Scope], name: Name) -> Scope:
    if not span:
        raise CircuitPropertyError(f"{name(node)} is a sum without elements")
    found = -1
    for e in span:
        tick()
        a, b = left[e], right[e]
        if a >= node or b >= node:
            raise CircuitPropertyError(f"{name(node)} comes before its child {max(a, b)}: not topologically ordered")
        if scopes[a] & scopes[b]:
            shared = listed(members(scopes[a] & scopes[b]))
            raise CircuitPropertyError(
                f"not decomposable: {name(node)} multiplies {name(a)} and {name(b)}, both over {shared}"
            )
        scope = scopes[a] | scopes[b]
        if found not in (-1, scope):
            different = listed(members(found ^ scope))
            raise CircuitPropertyError(f"not smooth: elements of {name(node)} differ in variables {different}")
        found = scope
    return found


def widest(graph: Graph) -> int:
    """The most nodes that share one scope."""
    return max(Counter(node_scopes(graph)).values())
