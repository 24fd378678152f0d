"""Which trees are worth considering for scopes that cut across one another.

Where scopes nest or are disjoint the tree around them is right and the only candidate. Where some are torn apart, the
order of variables decides the width: candidates come from the natural order, from a narrow band of the incidence
graph of variables and scopes (reverse Cuthill-McKee 1969), and from a tree decomposition of the graph of variables
that meet in a scope (min-fill; Bodlaender & Koster 2010). A few are made; the predicted cost chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from circuitroute_compilers.terms import Scope, variables
from circuitroute_compilers.vtree import Vtree, around, balanced, leaf, linear, natural, nodes

# Beyond these a tree decomposition takes longer than it is worth.
MAX_DECOMPOSED_VARIABLES = 150
MAX_DECOMPOSED_EDGES = 1_500


def candidates(scopes: Iterable[Scope], n: int) -> Iterator[Vtree]:
    """Trees over 0..n-1, the usual one first; all there are if it keeps every scope together."""
    known = sorted({scope for scope in scopes if scope.bit_count() > 1})
    usual = around(known, range(n))
    yield usual
    whole = {node.scope for node in nodes(usual)}
    torn = [scope for scope in known if scope not in whole]
    if not torn:
        return
    crossing = [scope for scope in known if scope not in whole or any(_cross(scope, other) for other in torn)]
    nested = [scope for scope in known if scope not in set(crossing)]
    band = _narrow_band(crossing, n)
    yield around(nested, band)
    yield linear([leaf(v) for v in band])
    yield natural(n)
    yield linear([leaf(v) for v in range(n)])
    yield from _decomposed(crossing, nested, n)


def _cross(one: Scope, other: Scope) -> bool:
    return bool(one & other and one & ~other and other & ~one)


def _narrow_band(scopes: Sequence[Scope], n: int) -> list[int]:
    """The variables so that each scope spans few others; those in none of the scopes last."""
    import networkx as nx

    graph: Any = nx.Graph()
    for scope, members in enumerate(scopes, start=n):  # numbers, since the order of ties hangs on their hashes
        graph.add_edges_from((scope, v) for v in variables(members))
    ordered = [v for v in nx.utils.reverse_cuthill_mckee_ordering(graph) if v < n]
    return ordered + sorted(set(range(n)) - set(ordered))


def _decomposed(scopes: Sequence[Scope], nested: Sequence[Scope], n: int) -> Iterator[Vtree]:
    """The tree of a tree decomposition, rooted at its middle: each variable stands where it is met first."""
    import networkx as nx

    edges = {(a, b) for scope in scopes for a in variables(scope) for b in variables(scope) if a < b}
    touched = {v for edge in edges for v in edge}
    if len(touched) > MAX_DECOMPOSED_VARIABLES or len(edges) > MAX_DECOMPOSED_EDGES:
        return
    graph: Any = nx.Graph(sorted(edges))
    _, bags = nx.algorithms.approximation.treewidth_min_fill_in(graph)
    middle = min(nx.center(bags), key=sorted)
    rest = [leaf(v) for v in range(n) if v not in touched]
    yield balanced([_hung(bags, middle), *([balanced(rest)] if rest else [])])


def _hung(bags: Any, root: frozenset[int]) -> Vtree:
    """A decomposition's bags, children before parents, as a tree of the variables they are the topmost bag of."""
    import networkx as nx

    parent = dict(nx.bfs_predecessors(bags, root))
    items: dict[frozenset[int], list[Vtree]] = {bag: [] for bag in bags}
    for bag in [*reversed(list(parent)), root]:
        own = [leaf(v) for v in sorted(bag - parent.get(bag, frozenset()))]
        here = items[bag] + own
        if here and bag != root:
            items[parent[bag]].append(balanced(here))
        elif bag == root:
            items[bag] = here
    return balanced(items[root])
