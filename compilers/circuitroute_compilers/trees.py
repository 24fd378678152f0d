"""Trees over the variables, along which states are merged: what they are, and which are worth considering.

A scope that is a subtree is forgotten as soon as it is complete; one that is torn apart must be remembered on both
sides. So scopes that nest or are disjoint (groups inside layers inside a network) become subtrees, the smallest
first, and what is left is merged in balance. That tree is the only candidate where no scopes cut across one another.
Where some do, the order of variables decides the width: candidates come from the natural order, from a narrow band of
the incidence graph of variables and scopes (reverse Cuthill-McKee 1969), and from a tree decomposition of the graph of
variables that share a scope (min-fill; Bodlaender & Koster 2010). The predicted cost chooses (:mod:`.choice`).

Trees may be as deep as they have variables: nothing here recurses.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from circuitroute.deadline import tick
from circuitroute_compilers.terms import Scope, scope_of, variables

# Beyond these a tree decomposition takes longer than it is worth.
MAX_DECOMPOSED_VARIABLES = 150
MAX_DECOMPOSED_EDGES = 1_500
# Nor is a narrow band looked for where the scopes have more variables than this, all together.
MAX_BAND_EDGES = 300_000
# Every node of a tree knows its scope, an eighth of a byte per variable, and two trees are in memory at once.
MAX_VARIABLES = 92_000


@dataclass(frozen=True, eq=False)
class Vtree:
    """A tree node: the variables below it, the first one met, and its two halves unless it is a single variable."""

    scope: Scope
    first: int
    halves: tuple[Vtree, Vtree] | None = None


def leaf(variable: int) -> Vtree:
    """The tree of one variable."""
    return Vtree(1 << variable, variable)


def pair(left: Vtree, right: Vtree) -> Vtree:
    """The tree of two halves."""
    return Vtree(left.scope | right.scope, left.first, (left, right))


def balanced(items: Sequence[Vtree]) -> Vtree:
    """The trees given, in their order, merged in balance."""
    if len(items) == 1:
        return items[0]
    middle = (len(items) + 1) // 2
    return pair(balanced(items[:middle]), balanced(items[middle:]))


def linear(items: Sequence[Vtree]) -> Vtree:
    """The trees given, merged one after the other: every block but the single items begins at the first."""
    tree = items[0]
    for item in items[1:]:
        tree = pair(tree, item)
    return tree


def natural(n: int) -> Vtree:
    """The balanced tree over 0..n-1 in order."""
    return balanced([leaf(v) for v in range(n)])


def around(scopes: Iterable[Scope], order: Sequence[int]) -> Vtree:
    """A tree over the variables of ``order``, kept where possible, in which every scope is a subtree, save those that
    cut across smaller ones."""
    position = {v: i for i, v in enumerate(order)}
    items = [leaf(v) for v in order]
    everything = scope_of(order)
    words = 1 + (everything.bit_length() >> 12)
    for scope in sorted(set(scopes) - {0, everything}, key=lambda s: (s.bit_count(), s)):
        tick(1 + len(items) * words // 16)
        inside = [item for item in items if item.scope & scope]
        if len(inside) == 1 or any(item.scope & ~scope for item in inside):
            continue
        items = [item for item in items if not item.scope & scope]
        items.append(balanced(inside))
        items.sort(key=lambda item: position[item.first])
    return balanced(items)


def nodes(tree: Vtree) -> list[Vtree]:
    """All nodes of a tree, halves before wholes and left before right; the tree itself is the last."""
    found: list[Vtree] = []
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        found.append(here)
        waiting.extend(here.halves or ())
    return found[::-1]


def met(tree: Vtree) -> list[int]:
    """The variables in the order in which a tree meets them."""
    return [node.first for node in nodes(tree) if node.halves is None]


def keeps_order(order: Sequence[int], scope: Scope) -> bool:
    """Whether an order meets the variables of ``scope`` in increasing order."""
    return [v for v in order if scope >> v & 1] == variables(scope)


def depth(tree: Vtree) -> int:
    """The largest number of merges on a way from a variable to the whole."""
    height: dict[int, int] = {}
    for node in nodes(tree):
        height[id(node)] = 1 + max((height[id(half)] for half in node.halves or ()), default=-1)
    return height[id(tree)]


# ---------------------------------------------------------------------------------------------- candidates


def candidates(scopes: Iterable[Scope], n: int) -> Iterator[Vtree]:
    """Trees over 0..n-1, the usual one first; all there are if it keeps every scope together."""
    known = sorted({scope for scope in scopes if scope.bit_count() > 1})
    usual = around(known, range(n))
    yield usual
    whole = {node.scope for node in nodes(usual)}
    torn = [scope for scope in known if scope not in whole]
    if not torn:
        return
    crossing = [scope for scope in known if scope not in whole or _crosses(scope, torn)]
    among = set(crossing)
    nested = [scope for scope in known if scope not in among]
    if sum(scope.bit_count() for scope in crossing) <= MAX_BAND_EDGES:
        band = _narrow_band(crossing, n)
        yield around(nested, band)
        yield linear([leaf(v) for v in band])
    yield natural(n)
    yield linear([leaf(v) for v in range(n)])
    yield from _decomposed(crossing, nested, n)


def _crosses(scope: Scope, others: Sequence[Scope]) -> bool:
    tick(1 + len(others) // 16)
    return any(_cross(scope, other) for other in others)


def _cross(one: Scope, other: Scope) -> bool:
    return bool(one & other and one & ~other and other & ~one)


def _narrow_band(scopes: Sequence[Scope], n: int) -> list[int]:
    """The variables so that each scope spans few others; those in none of the scopes last."""
    import networkx as nx

    graph: Any = nx.Graph()
    for scope, members in enumerate(scopes, start=n):  # numbers, since their hashes break ties
        graph.add_edges_from((scope, v) for v in variables(members))
    ordered = [v for v in nx.utils.reverse_cuthill_mckee_ordering(graph) if v < n]
    return ordered + sorted(set(range(n)) - set(ordered))


def _decomposed(scopes: Sequence[Scope], nested: Sequence[Scope], n: int) -> Iterator[Vtree]:
    """The tree of a tree decomposition, rooted at its middle: each variable stands where it is met first."""
    import networkx as nx

    if functools.reduce(operator.or_, scopes, 0).bit_count() > MAX_DECOMPOSED_VARIABLES:
        return
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

    parent = {child: above for above, child in nx.bfs_edges(bags, root)}
    items: dict[frozenset[int], list[Vtree]] = {bag: [] for bag in bags}
    for bag in [*reversed(list(parent)), root]:
        own = [leaf(v) for v in sorted(bag - parent.get(bag, frozenset()))]
        here = items[bag] + own
        if here and bag != root:
            items[parent[bag]].append(balanced(here))
        elif bag == root:
            items[bag] = here
    return balanced(items[root])
