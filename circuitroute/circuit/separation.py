"""Which vtree a circuit respects, found from what its products separate.

A product of a structured circuit separates the variables of its two factors: they lie in the two halves of one vtree
node. Factors that are true whatever their variables are (circuits made smooth are full of them) separate nothing, and
variables that a node mentions only in such factors are not *essential* to it. What is left are demands "all of A on one
side, all of B on the other", and the tree that meets them, if there is one, is built from the root down: what a demand
keeps together is joined, and there must remain two parts at least (Aho, Sagiv, Szymanski & Ullman, Inferring a tree
from lowest common ancestors, 1981).
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np

from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.circuit.verify.bitsets import listed, members
from circuitroute.circuit.verify.properties import node_scopes
from circuitroute.deadline import tick, within
from circuitroute.errors import CircuitPropertyError

# The two halves of every inner node of a vtree; leaves are numbered first.
Halves: TypeAlias = tuple[tuple[int, int], ...]
Scope: TypeAlias = int  # a bit per variable


class Demand(NamedTuple):
    """Two sets of variables that one vtree node must separate, and the circuit's node that multiplies them."""

    left: Scope
    right: Scope
    node: int

    @property
    def scope(self) -> Scope:
        """Both sets together."""
        return self.left | self.right

    def text(self) -> str:
        """What the circuit's node does, for messages."""
        return f"node {self.node} multiplies factors over {names(self.left)} and over {names(self.right)}"


def names(scope: Scope) -> str:
    """A set of variables, for messages."""
    return listed(members(scope))


def essential(graph: Graph) -> list[Scope]:
    """The variables that matter to each node; none to one that is true on all its worlds."""
    scopes = node_scopes(graph)
    counts = graph.fold(np.ones(graph.num_nodes, dtype=object), np.multiply, np.add)
    first, left, right = graph.first.tolist(), graph.left.tolist(), graph.right.tolist()
    found: list[Scope] = []
    for node, (kind, scope) in enumerate(zip(graph.kind.tolist(), scopes, strict=True)):
        tick(1 + first[node + 1] - first[node])
        if int(counts[node]) == 1 << scope.bit_count():
            found.append(0)
        elif kind != NodeKind.SUM:
            found.append(scope)
        else:
            mattering = 0
            for e in range(first[node], first[node + 1]):
                mattering |= found[left[e]] | found[right[e]]
            found.append(mattering)
    return found


def demands(graph: Graph, scopes: list[Scope]) -> list[Demand]:
    """What the products of a circuit separate, each pair of sets once; ``scopes`` are the essential ones."""
    seen: dict[tuple[Scope, Scope], Demand] = {}
    owner = np.repeat(np.arange(graph.num_nodes), np.diff(graph.first)).tolist()
    for node, a, b in zip(owner, graph.left.tolist(), graph.right.tolist(), strict=True):
        tick()
        pair = scopes[a], scopes[b]
        if pair[0] and pair[1] and pair not in seen and pair[::-1] not in seen:
            seen[pair] = Demand(*pair, node)
    return list(seen.values())


def recovered(graph: Graph) -> Halves:
    """The halves of a vtree that a circuit respects.

    Raises:
        CircuitPropertyError: there is none.
        CircuitTooLargeError: it takes more than the default budget of CPU seconds.
    """
    with within(doing=lambda: f"finding the vtree of {graph.num_nodes} nodes", remedy="give a smaller circuit"):
        return _built(graph.n, demands(graph, essential(graph)))


def _built(n: int, wanted: list[Demand]) -> Halves:
    """From the root down; inner nodes are numbered the other way round."""
    node_of = {1 << v: v for v in range(n)}
    splits: list[tuple[Scope, Scope, Scope]] = []
    waiting = [((1 << n) - 1, wanted)]
    while waiting:
        whole, inside = waiting.pop()
        if whole.bit_count() < 2:
            continue
        left, right = _halves(whole, inside)
        splits.append((whole, left, right))
        waiting += [(half, [demand for demand in inside if not demand.scope & ~half]) for half in (left, right)]
    halves = []
    for i, (whole, left, right) in enumerate(reversed(splits)):
        halves.append((node_of[left], node_of[right]))
        node_of[whole] = n + i
    return tuple(halves)


def _halves(whole: Scope, inside: list[Demand]) -> tuple[Scope, Scope]:
    """The two halves of one vtree node, which meet all demands about what is below it."""
    full = next((demand for demand in inside if demand.scope == whole), None)
    if full is not None:
        for demand in inside:
            tick()
            if not _meets(demand, full.left, full.right):
                raise CircuitPropertyError(f"the circuit respects no vtree: {full.text()}, but {demand.text()}")
        return full.left, full.right
    parts = _parts(whole, inside)
    if len(parts) == 1:
        worst = max(inside, key=lambda demand: demand.scope.bit_count())
        raise CircuitPropertyError(
            f"the circuit respects no vtree: no two halves of the variables {names(whole)} keep together what its "
            f"products need; {worst.text()}, for one"
        )
    return _in_balance(parts)


def _meets(demand: Demand, left: Scope, right: Scope) -> bool:
    """Whether two halves separate a demand's sets, or leave them together for further down."""
    a, b = demand.left, demand.right
    together = not (a | b) & right or not (a | b) & left
    return together or not (a & right or b & left) or not (a & left or b & right)


def _parts(whole: Scope, inside: list[Demand]) -> list[Scope]:
    """The variables, joined where a demand keeps them on one side; by their lowest variable."""
    parts = [1 << v for v in members(whole)]
    for demand in inside:
        for kept in (demand.left, demand.right):
            tick(1 + len(parts) // 8)
            joined = kept
            apart = []
            for part in parts:
                if part & kept:
                    joined |= part
                else:
                    apart.append(part)
            parts = [*apart, joined]
    return sorted(parts, key=lambda part: part & -part)


def _in_balance(parts: list[Scope]) -> tuple[Scope, Scope]:
    """The parts in two halves, neighbours together, sizes as equal as may be."""
    before = list(accumulate(part.bit_count() for part in parts))
    middle = min(range(1, len(parts)), key=lambda i: abs(2 * before[i - 1] - before[-1]))
    return sum(parts[:middle]), sum(parts[middle:])
