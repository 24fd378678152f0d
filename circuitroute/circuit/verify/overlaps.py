"""Determinism of structured circuits, decided exactly.

A circuit is structured when all nodes of one scope split it in the same two halves (Pipatsrisawat & Darwiche, New
compilation languages based on structured decomposability, 2008). There, two products over the same scope can both hold
if and only if both their left factors can and both their right factors can; and two sums can, if and only if some two
of their elements can. So the question whether two nodes *overlap* is passed down from scope to scope, left halves
first, and right halves only for what overlaps on the left: the primes of a sentential decision diagram exclude one
another, and its subs are never compared.

Where all nodes of a scope exclude one another, as the states of a machine do, there is nothing to ask: such scopes are
recognised from the literals up by sorting their elements. Where a sum has very many left factors, these are compared by
their models instead (:mod:`.worlds`).

Legend: E elements of one scope, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

import numpy as np

from circuitroute.circuit.graph import Graph, IntArray, NodeKind
from circuitroute.circuit.verify.worlds import BoolArray, Split, Worlds, count_up
from circuitroute.deadline import tick
from circuitroute.errors import CircuitPropertyError

# Asks for pairs of nodes of a scope; is answered with which of them overlap.
Question: TypeAlias = tuple[int, IntArray, IntArray]
Inquiry: TypeAlias = Generator[Question, BoolArray, BoolArray]

# How many pairs of elements are compared before giving up, in one scope and altogether.
MAX_PAIRS = 1 << 22
MAX_ALL_PAIRS = 1 << 26
# From how many pairs inside the sums of one scope on another way is tried first.
MANY_PAIRS = 1 << 12


class TooManyPairsError(Exception):
    """Comparing pairs would take longer than it may."""


def check_structured(graph: Graph, scopes: list[int], name: Callable[[int], str]) -> bool:
    """True if the circuit is structured and deterministic, False if it is not structured.

    Raises:
        CircuitPropertyError: two elements of one sum can both hold; names the sum.
        TooManyPairsError: the circuit is structured, but deciding takes too long.
    """
    numbers: dict[int, int] = {0: 0}
    scope_of = np.zeros(len(scopes), dtype=np.int64)
    for node, scope in enumerate(scopes):
        tick(1 + (scope.bit_length() >> 10))
        scope_of[node] = numbers.setdefault(scope, len(numbers))
    narrow = np.array([scope.bit_count() <= 1 for scope in numbers], dtype=np.bool_)
    splits = _splits(graph, scope_of, narrow)
    if splits is None:
        return False
    covers = _covers(graph, narrow[scope_of], name)
    root = int(scope_of[-1])
    upward = _upward(splits, root)
    worlds = Worlds(splits, upward, covers, [scope.bit_count() for scope in numbers])
    _Judge(splits, covers, _exclusive(splits, upward, covers, scope_of, narrow), worlds, name).judge(root)
    return True


def _splits(graph: Graph, scope_of: IntArray, narrow: BoolArray) -> dict[int, Split] | None:
    """The elements by scope, or None if nodes of one scope split it in different ways."""
    sizes = np.diff(graph.first)
    owner = np.repeat(np.arange(graph.num_nodes), sizes)
    wide = ~narrow[scope_of[owner]]
    owner = owner[wide]
    left, right = graph.left[wide].astype(np.int64), graph.right[wide].astype(np.int64)
    _, begin, which = np.unique(scope_of[owner], return_index=True, return_inverse=True)
    expected = scope_of[left[begin]][which]  # the scope of the left factor of the first element
    swap = scope_of[left] != expected
    left, right = np.where(swap, right, left), np.where(swap, left, right)
    if (scope_of[left] != expected).any() or (scope_of[left] == 0).any() or (scope_of[right] == 0).any():
        return None
    order = np.argsort(which, kind="stable")
    bounds = np.searchsorted(which[order], np.arange(len(begin) + 1))
    splits = {}
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        mine = order[start:stop]
        first = int(mine[0])
        halves = int(scope_of[left[first]]), int(scope_of[right[first]])
        splits[int(scope_of[owner[first]])] = Split(owner[mine], left[mine], right[mine], *halves)
    return splits


def _covers(graph: Graph, narrow: BoolArray, name: Callable[[int], str]) -> IntArray:
    """[M] which literals of its variable (1 absent, 2 present) a node over at most one variable allows."""
    covers = np.zeros(graph.num_nodes, dtype=np.int64)
    covers[graph.kind == NodeKind.TRUE] = 3
    covers[graph.kind == NodeKind.ABSENT] = 1
    covers[graph.kind == NodeKind.PRESENT] = 2
    for node in np.flatnonzero(narrow & (graph.kind == NodeKind.SUM)).tolist():
        for e in range(int(graph.first[node]), int(graph.first[node + 1])):
            tick()
            part = covers[graph.left[e]] & covers[graph.right[e]]
            if covers[node] & part:
                raise CircuitPropertyError(f"not deterministic: two elements of {name(node)} can both hold")
            covers[node] |= part
    return covers


def _upward(splits: dict[int, Split], root: int) -> list[int]:
    """The scopes that are split, halves before wholes."""
    order, waiting = [], [root]
    while waiting:
        scope = waiting.pop()
        if scope in splits:
            order.append(scope)
            waiting += [half for _, half in splits[scope].halves]
    return order[::-1]


def _exclusive(
    splits: dict[int, Split], upward: list[int], covers: IntArray, scope_of: IntArray, narrow: BoolArray
) -> dict[int, bool]:
    """For every scope whether all its nodes are seen to exclude one another.

    Over one variable, no literal belongs to two nodes; over more, the halves' nodes do and no product occurs twice.
    """
    absent = np.bincount(scope_of, weights=covers & 1, minlength=len(narrow))
    present = np.bincount(scope_of, weights=covers >> 1, minlength=len(narrow))
    found = {scope: bool(absent[scope] <= 1 and present[scope] <= 1) for scope in np.flatnonzero(narrow).tolist()}
    for scope in upward:
        tick(1 + len(splits[scope].owner) // 10)
        split = splits[scope]
        found[scope] = found[split.left_scope] and found[split.right_scope] and not _occurs_twice(split)
    return found


def _occurs_twice(split: Split) -> bool:
    order = np.lexsort((split.right, split.left))
    left, right = split.left[order], split.right[order]
    return bool(((left[1:] == left[:-1]) & (right[1:] == right[:-1])).any())


# ---------------------------------------------------------------------------------------------- pairs of elements


class _Pairs(NamedTuple):
    """[P] elements x and y that may both hold, and which pair of nodes was asked about (WITHIN: both of one sum)."""

    x: IntArray
    y: IntArray
    asked: IntArray

    def where(self, keep: BoolArray) -> _Pairs:
        return _Pairs(self.x[keep], self.y[keep], self.asked[keep])


WITHIN = -1


class _Comparisons:
    """Lists pairs of elements, as long as there are not too many."""

    def __init__(self) -> None:
        self._listed = 0

    def _allow(self, pairs: int) -> None:
        self._listed += pairs
        tick(1 + pairs // 10)
        if pairs > MAX_PAIRS or self._listed > MAX_ALL_PAIRS:
            raise TooManyPairsError(f"comparing the factors of its sums takes more than {MAX_PAIRS} pairs")

    def within(self, keys: list[IntArray], chosen: BoolArray) -> _Pairs:
        """All pairs of chosen elements that agree in all keys."""
        order = np.lexsort(keys[::-1])
        order = order[chosen[order]]
        change = np.zeros(len(order), dtype=np.bool_)
        for key in keys:
            change[1:] |= key[order][1:] != key[order][:-1]
        bucket = np.cumsum(change)
        place = np.arange(len(order)) - np.searchsorted(bucket, bucket)  # how many of its bucket come before it
        self._allow(int(place.sum()))
        second = np.repeat(np.arange(len(order)), place)
        first = second - 1 - count_up(place)
        return _Pairs(order[first], order[second], np.full(len(first), WITHIN, dtype=np.int64))

    def between(self, owner: IntArray, a: IntArray, b: IntArray) -> _Pairs:
        """All pairs of an element of node a[i] and one of b[i]."""
        start_a, start_b = np.searchsorted(owner, a), np.searchsorted(owner, b)
        size_a, size_b = np.searchsorted(owner, a, "right") - start_a, np.searchsorted(owner, b, "right") - start_b
        self._allow(int((size_a * size_b).sum()))
        asked = np.repeat(np.arange(len(a)), size_a * size_b)
        position = count_up(size_a * size_b)
        return _Pairs(start_a[asked] + position // size_b[asked], start_b[asked] + position % size_b[asked], asked)


# ---------------------------------------------------------------------------------------------- the judge


class _Judge:
    """Answers which nodes of a scope overlap, and refuses every sum of it in which two elements do."""

    def __init__(
        self,
        splits: dict[int, Split],
        covers: IntArray,
        exclusive: dict[int, bool],
        worlds: Worlds,
        name: Callable[[int], str],
    ) -> None:
        self._splits, self._covers, self._exclusive, self._worlds, self._name = splits, covers, exclusive, worlds, name
        self._comparisons = _Comparisons()

    def judge(self, root: int) -> None:
        """Look into all sums; inquiries wait on a stack, since scopes nest deeper than Python calls functions."""
        nothing = np.zeros(0, dtype=np.int64)
        waiting: list[Inquiry] = [self._overlap(root, nothing, nothing)]
        answer: BoolArray | None = None
        while waiting:
            tick(10)
            try:
                question = next(waiting[-1]) if answer is None else waiting[-1].send(answer)
            except StopIteration as done:
                waiting.pop()
                answer = done.value
            else:
                waiting.append(self._overlap(*question))
                answer = None

    def _overlap(self, scope: int, a: IntArray, b: IntArray) -> Inquiry:
        """Which of the pairs (a[i], b[i]) of different nodes of a scope overlap."""
        if self._exclusive[scope]:
            return np.zeros(len(a), dtype=np.bool_)
        if scope not in self._splits:
            return np.asarray((self._covers[a] & self._covers[b]) != 0)
        split = self._splits[scope]
        pairs = self._candidates(split, a, b)
        for factor, half in split.halves:
            pairs = pairs.where((yield from _meet(half, factor[pairs.x], factor[pairs.y])))
        if (pairs.asked == WITHIN).any():
            worst = split.owner[pairs.x[pairs.asked == WITHIN][0]]
            raise CircuitPropertyError(f"not deterministic: two elements of {self._name(int(worst))} can both hold")
        result = np.zeros(len(a), dtype=np.bool_)
        result[pairs.asked] = True
        return result

    def _candidates(self, split: Split, a: IntArray, b: IntArray) -> _Pairs:
        """Pairs of elements, of one sum or of the nodes a[i] and b[i], that share every factor of a half in which all
        nodes exclude one another."""
        shared = [factor for factor, half in split.halves if self._exclusive[half]]
        within = self._comparisons.within([split.owner, *shared], self._doubtful(split))
        between = self._comparisons.between(split.owner, a, b)
        for factor in shared:
            between = between.where(factor[between.x] == factor[between.y])
        return _Pairs(*(np.concatenate(both) for both in zip(within, between, strict=True)))

    def _doubtful(self, split: Split) -> BoolArray:
        """[E] all elements but those of sums whose left factors are many and seen to exclude one another."""
        _, begin, family = np.unique(split.owner, return_index=True, return_inverse=True)
        sizes = np.diff([*begin, len(family)])
        if self._exclusive[split.left_scope] or int((sizes * (sizes - 1) // 2).sum()) <= MANY_PAIRS:
            return np.ones(len(family), dtype=np.bool_)
        return ~self._worlds.exclusive(split.left_scope, family, split.left)[family]


def _meet(scope: int, p: IntArray, q: IntArray) -> Inquiry:
    """Which of the pairs (p[i], q[i]) are the same node or overlap; asks once about each pair of nodes."""
    result: BoolArray = np.asarray(p == q)
    different = np.flatnonzero(~result)
    low, high = np.minimum(p, q)[different], np.maximum(p, q)[different]
    stride = int(high.max(initial=0)) + 1
    keys, which = np.unique(low * stride + high, return_inverse=True)
    answer = yield scope, keys // stride, keys % stride
    result[different] = answer[which]
    return result
