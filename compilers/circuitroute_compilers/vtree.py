"""The order in which variables are merged: a binary tree that keeps scopes together.

A scope that is a subtree of its own is forgotten as soon as it is complete; one that is torn apart must be remembered
on both sides. So scopes that nest or are disjoint (groups inside layers inside a network) become subtrees, the smallest
first, and what is left is merged in balance. Trees may be as deep as they have variables: nothing here recurses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from circuitroute_compilers.terms import Scope, variables


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
    everything = sum(1 << v for v in order)
    for scope in sorted(set(scopes) - {0, everything}, key=lambda s: (s.bit_count(), s)):
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
