"""The order in which variables are merged: a binary tree that keeps scopes together.

A scope that is a subtree of its own is forgotten as soon as it is complete; one that is torn apart must be remembered
on both sides. So scopes that nest or are disjoint (groups inside layers inside a network) become subtrees, the smallest
first, and what is left is merged in balance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from circuitroute_compilers.terms import Scope, variables


@dataclass(frozen=True, eq=False)
class Vtree:
    """A tree node: the variables below it, and its two halves unless it is a single variable."""

    scope: Scope
    first: int
    halves: tuple[Vtree, Vtree] | None = None


def natural(n: int) -> Vtree:
    """The balanced tree over 0..n-1 in order."""
    return _balanced([Vtree(1 << v, v) for v in range(n)])


def around(scopes: Iterable[Scope], n: int) -> Vtree:
    """A tree over 0..n-1 in which every scope is a subtree, save those that cut across smaller ones."""
    items = [Vtree(1 << v, v) for v in range(n)]
    everything = (1 << n) - 1
    for scope in sorted(set(scopes) - {0, everything}, key=lambda s: (s.bit_count(), s)):
        inside = [item for item in items if item.scope & scope]
        if any(item.scope & ~scope for item in inside):
            continue
        items = [item for item in items if not item.scope & scope]
        items.append(_balanced(inside))
        items.sort(key=lambda item: item.first)
    return _balanced(items)


def keeps_order(tree: Vtree, scope: Scope) -> bool:
    """Whether the tree meets the variables of ``scope`` in increasing order."""
    met = [v for v in _in_order(tree) if scope >> v & 1]
    return met == variables(scope)


def _in_order(tree: Vtree) -> list[int]:
    if tree.halves is None:
        return [tree.first]
    return _in_order(tree.halves[0]) + _in_order(tree.halves[1])


def _balanced(items: list[Vtree]) -> Vtree:
    if len(items) == 1:
        return items[0]
    middle = (len(items) + 1) // 2
    left, right = _balanced(items[:middle]), _balanced(items[middle:])
    return Vtree(left.scope | right.scope, left.first, (left, right))
