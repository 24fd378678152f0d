"""Trees over variables from the primal graph, in which variables are neighbours that some formula has in common.

An order in which variables are eliminated from that graph, each joining its neighbours, gives a tree: below every
variable stand those eliminated before it that it separates from the rest. As a vtree, the variable on the left and what
is below it on the right, diagrams have at most 2^w nodes per variable, w being the width of the order (Darwiche 2001;
Dechter & Mateescu 2007). Small widths come from eliminating the variable that adds the fewest edges (min-fill; Bodlaender
& Koster 2010). Trees from halves that few edges connect (Kernighan & Lin 1970), one inside the other, are shallow.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from circuitroute.deadline import tick
from circuitroute_compilers.terms import Scope, variables
from circuitroute_compilers.trees import Vtree, balanced, leaf, pair

# A formula over more variables than these tells little about who belongs together.
MAX_SCOPE = 24
# Beyond so many variables or edges, fewest neighbours take the place of fewest new edges, and halves are not sought.
MAX_FILL_EDGES = 20_000
MAX_HALVED_VARIABLES, MAX_HALVED_EDGES = 200, 4_000
# Equally good variables are chosen among at random, by these seeds; the order of the smallest cost is kept.
ORDERS = 6

_Graph = dict[int, set[int]]


def primal_graph(scopes: Iterable[Scope]) -> _Graph:
    """Variable -> its neighbours, of all variables in the scopes."""
    graph: _Graph = {}
    for scope in scopes:
        names = variables(scope)
        tick(1 + len(names))
        for v in names:
            graph.setdefault(v, set()).update(names if len(names) <= MAX_SCOPE else ())
    for v, neighbours in graph.items():
        neighbours.discard(v)
    return dict(sorted(graph.items()))


def candidates(scopes: Sequence[Scope]) -> list[Vtree]:
    """Trees over the variables in the scopes: by elimination, by halves, and in the order in which they are numbered."""
    graph = primal_graph(scopes)
    if not graph:
        return []
    found = [eliminated(graph)]
    edges = sum(map(len, graph.values())) // 2
    if len(graph) <= MAX_HALVED_VARIABLES and edges <= MAX_HALVED_EDGES:
        found.append(halved(graph))
    found.append(balanced([leaf(v) for v in graph]))
    return found


# ---------------------------------------------------------------------------------------------- by elimination


def eliminated(graph: _Graph) -> Vtree:
    """The tree of the best among a few orders of elimination: the smallest sum of 2^(neighbours when eliminated)."""
    orders = (_order(graph, seed) for seed in range(ORDERS))
    _, order, parent = min(orders, key=lambda found: found[0])
    return _stacked(order, parent)


def _order(graph: _Graph, seed: int) -> tuple[int, list[int], dict[int, int]]:
    """A cost, an order of elimination, and for each variable the first of its neighbours to be eliminated after it."""
    rest = {v: set(neighbours) for v, neighbours in graph.items()}
    draw = random.Random(seed).random
    fill = sum(map(len, rest.values())) <= 2 * MAX_FILL_EDGES
    luck = {v: draw() for v in rest}
    score = {v: _score(rest, v, fill) for v in rest}
    later: dict[int, set[int]] = {}
    cost = 0
    while rest:
        tick(1 + len(rest) // 8)
        v = min(rest, key=lambda v: (score[v], luck[v]))
        neighbours = later[v] = rest.pop(v)
        cost += 1 << len(neighbours)
        affected = set(neighbours)
        for a in neighbours:
            rest[a] |= neighbours
            rest[a] -= {a, v}
        if fill:
            affected.update(*(rest[a] for a in neighbours))
        for a in affected:
            score[a] = _score(rest, a, fill)
    order = list(later)
    place = {v: i for i, v in enumerate(order)}
    return cost, order, {v: min(some, key=place.__getitem__) for v, some in later.items() if some}


def _score(rest: _Graph, v: int, fill: bool) -> int:
    """How many edges eliminating a variable would add; how many neighbours it has, where that takes too long."""
    neighbours = rest[v]
    if not fill:
        return len(neighbours)
    tick(1 + len(neighbours) // 2)
    present = sum(len(neighbours & rest[a]) for a in neighbours)
    return (len(neighbours) * (len(neighbours) - 1) - present) // 2


def _stacked(order: Sequence[int], parent: dict[int, int]) -> Vtree:
    """The vtree: each variable beside the trees of those that hang below it."""
    below: dict[int, list[Vtree]] = {v: [] for v in order}
    roots: list[Vtree] = []
    for v in order:
        children = below.pop(v)
        tree = pair(leaf(v), by_size(children)) if children else leaf(v)
        (below[parent[v]] if v in parent else roots).append(tree)
    return by_size(roots)


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


def halved(graph: _Graph) -> Vtree:
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
