"""Trees over variables from the primal graph, in which variables are neighbours that some formula has in common.

An order in which variables are eliminated from that graph, each joining its neighbours, gives a tree: below every
variable stand those eliminated before it that it separates from the rest. As a vtree, the variable on the left and what
is below it on the right, diagrams have at most 2^w nodes per variable, w being the width of the order (Darwiche 2001;
Dechter & Mateescu 2007). Small widths come from eliminating the variable that adds the fewest edges (min-fill;
Bodlaender & Koster 2010). Trees from halves that few edges connect (Kernighan & Lin 1970), one inside the other, are
shallow.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from circuitroute.deadline import tick
from circuitroute_compilers.terms import Scope, variables
from circuitroute_compilers.trees import Vtree, balanced, leaf, nodes, pair

# A formula over more variables than these tells little about who belongs together.
MAX_SCOPE = 24
# Beyond so many variables or edges, fewest neighbours take the place of fewest new edges, and halves are not sought.
MAX_FILL_EDGES = 20_000
MAX_HALVED_VARIABLES, MAX_HALVED_EDGES = 200, 4_000
# Equally good variables are chosen among at random, by these seeds; the order of the smallest cost is kept.
ORDERS = 6

# Variables, and the neighbours of each.
Graph: TypeAlias = dict[int, set[int]]


def primal_graph(scopes: Iterable[Scope], largest: int | None = None) -> Graph:
    """Variable -> its neighbours, of all variables in scopes; those of more than ``largest`` make no neighbours."""
    graph: Graph = {}
    for scope in scopes:
        names = variables(scope)
        tick(1 + len(names))
        for v in names:
            tick(1 + len(names) // 16)
            graph.setdefault(v, set()).update(names if largest is None or len(names) <= largest else ())
    for v, neighbours in graph.items():
        neighbours.discard(v)
    return dict(sorted(graph.items()))


@dataclass(frozen=True)
class Order:
    """An order of elimination: the variables, and for each but the roots the next one that it was a neighbour of."""

    variables: list[int]
    parent: dict[int, int]
    context: dict[int, int]  # how many neighbours a variable had when it was eliminated


def candidates(scopes: Sequence[Scope]) -> list[Vtree]:
    """Trees over the variables in the scopes: by elimination, and a balanced one, by halves or as they are numbered.

    Of the balanced ones the one is taken whose diagrams are estimated to be smaller.
    """
    graph = primal_graph(scopes, MAX_SCOPE)
    if not graph:
        return []
    trees = [balanced([leaf(v) for v in graph])]
    edges = sum(map(len, graph.values())) // 2
    if len(graph) <= MAX_HALVED_VARIABLES and edges <= MAX_HALVED_EDGES:
        trees.append(halved(graph))
    shallow = min(trees, key=lambda tree: crossings(tree, scopes)) if len(trees) > 1 else trees[0]
    return [shallow, eliminated(graph)]


def crossings(tree: Vtree, scopes: Sequence[Scope]) -> int:
    """An estimate of the elements of diagrams: for each block 2^(what reaches in from outside it + what its left half
    shares with the rest), each in formulas or in variables, whichever are fewer."""
    total = 0
    for node in nodes(tree):
        tick(1 + len(scopes) // 8)
        if node.halves is not None:
            total += 1 << _interface(node.scope, scopes)[1] + min(_interface(node.halves[0].scope, scopes))
    return total


def _interface(block: Scope, scopes: Sequence[Scope]) -> tuple[int, int]:
    """What a block shares with the rest: in variables inside, and in variables outside or formulas."""
    across = [scope for scope in scopes if scope & block and scope & ~block]
    shared = functools.reduce(operator.or_, across, 0)
    return (shared & block).bit_count(), min((shared & ~block).bit_count(), len(across))


# ---------------------------------------------------------------------------------------------- by elimination


def eliminated(graph: Graph) -> Vtree:
    """The tree of the best among a few orders of elimination."""
    order = best_order(graph)
    below: dict[int, list[Vtree]] = {v: [] for v in order.variables}
    roots: list[Vtree] = []
    for v in order.variables:
        children = below.pop(v)
        tree = pair(leaf(v), by_size(children)) if children else leaf(v)
        (below[order.parent[v]] if v in order.parent else roots).append(tree)
    return by_size(roots)


def best_order(graph: Graph) -> Order:
    """The best among a few orders of elimination: of the smallest sum of 2^(neighbours when eliminated)."""
    orders = (_order(graph, seed) for seed in range(ORDERS))
    return min(orders, key=lambda order: sum(1 << context for context in order.context.values()))


def _order(graph: Graph, seed: int) -> Order:
    rest = {v: set(neighbours) for v, neighbours in graph.items()}
    draw = random.Random(seed).random
    fill = sum(map(len, rest.values())) <= 2 * MAX_FILL_EDGES
    luck = {v: draw() for v in rest}
    score = {v: _score(rest, v, fill) for v in rest}
    later: dict[int, set[int]] = {}
    while rest:
        tick(1 + len(rest) // 8)
        v = min(rest, key=lambda v: (score[v], luck[v]))
        neighbours = later[v] = rest.pop(v)
        affected = set(neighbours)
        for a in neighbours:
            rest[a] |= neighbours
            rest[a] -= {a, v}
        if fill:
            affected.update(*(rest[a] for a in neighbours))
        for a in affected:
            score[a] = _score(rest, a, fill)
    place = {v: i for i, v in enumerate(later)}
    parent = {v: min(some, key=place.__getitem__) for v, some in later.items() if some}
    return Order(list(later), parent, {v: len(some) for v, some in later.items()})


def _score(rest: dict[int, set[int]], v: int, fill: bool) -> int:
    """How many edges eliminating a variable would add; how many neighbours it has, where that takes too long."""
    neighbours = rest[v]
    if not fill:
        return len(neighbours)
    tick(1 + len(neighbours) // 2)
    present = sum(len(neighbours & rest[a]) for a in neighbours)
    return (len(neighbours) * (len(neighbours) - 1) - present) // 2


def by_size(trees: Sequence[Vtree]) -> Vtree:
    """The trees merged, the larger ones nearer to the top."""
    some = sorted(trees, key=lambda tree: (tree.scope.bit_count(), tree.first))
    merged = some[0]
    for level in _levels(some[1:]):
        merged = pair(level, merged)
    return merged


def _levels(trees: Sequence[Vtree]) -> Sequence[Vtree]:
    """Trees to be merged one after the other: runs of trees of equal size in balance."""
    found: list[Vtree] = []
    start = 0
    for end in range(1, len(trees) + 1):
        if end == len(trees) or trees[end].scope.bit_count() != trees[start].scope.bit_count():
            found.append(balanced(trees[start:end]))
            start = end
    return found


# ---------------------------------------------------------------------------------------------- by halves


def halved(graph: Graph) -> Vtree:
    """The tree of halves with few edges between them, halved again."""
    import networkx as nx

    whole: Any = nx.Graph()
    whole.add_nodes_from(graph)
    whole.add_edges_from((a, b) for a, neighbours in graph.items() for b in sorted(neighbours) if a < b)
    trees: dict[int, Vtree] = {}
    # Halves wait in front of their wholes, which are put together of them: parts by number, and the numbers of halves.
    parts: list[tuple[list[int], tuple[int, int] | None]] = [(list(graph), None)]
    for number, (names, _) in enumerate(parts):  # grows
        tick(len(names) ** 2)
        if len(names) > 1:
            halves = _halves(nx, whole.subgraph(names), names)
            parts[number] = names, (len(parts), len(parts) + 1)
            parts.extend((half, None) for half in halves)
    for number in reversed(range(len(parts))):
        names, inner = parts[number]
        trees[number] = leaf(names[0]) if inner is None else pair(trees.pop(inner[0]), trees.pop(inner[1]))
    return trees[0]


def _halves(nx: Any, graph: Any, names: list[int]) -> tuple[list[int], list[int]]:
    if len(names) == 2:
        return names[:1], names[1:]
    found = [nx.algorithms.community.kernighan_lin_bisection(graph, seed=seed) for seed in range(3)]
    best = min(found, key=lambda halves: nx.cut_size(graph, *halves))
    left, right = sorted(map(sorted, best))
    return left, right
