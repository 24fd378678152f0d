"""Which nodes of a structured circuit exclude one another, by listing what satisfies them.

Thousands of primes of one decision exclude one another, and comparing them by pairs takes millions of comparisons. But
together they have no more models than there are assignments to their scope: where that is small, listing the models and
looking for one that occurs twice is faster.

Legend: E elements of one scope. A model of a scope is a number: the bits of the left half, then those of the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from circuitroute.circuit.graph import IntArray
from circuitroute.deadline import tick

BoolArray = npt.NDArray[np.bool_]

# The widest scope whose models are listed, how many are listed at once, and how many altogether.
MAX_VARIABLES = 40
MAX_LISTED = 1 << 22
MAX_ALL_LISTED = 1 << 28


@dataclass(frozen=True)
class Split:
    """The elements of the sums of one scope, their factors oriented alike."""

    owner: IntArray  # [E] the sum, increasing
    left: IntArray  # [E]
    right: IntArray  # [E]
    left_scope: int
    right_scope: int

    @property
    def halves(self) -> tuple[tuple[IntArray, int], tuple[IntArray, int]]:
        """The factors on either side, and the scope they are over."""
        return (self.left, self.left_scope), (self.right, self.right_scope)


def count_up(sizes: IntArray) -> IntArray:
    """0, 1, ..., sizes[0] - 1, 0, 1, ..., sizes[1] - 1, and so on."""
    total = int(sizes.sum())
    return np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)


class Worlds:
    """Lists models of the nodes of small scopes.

    Args:
        splits: the elements of every scope that is split.
        upward: those scopes, halves before wholes.
        covers: [M] which literals (1 absent, 2 present) a node over one variable allows.
        sizes: how many variables each scope has.
    """

    def __init__(self, splits: dict[int, Split], upward: list[int], covers: IntArray, sizes: list[int]) -> None:
        self._splits = splits
        self._covers = covers
        self._sizes = sizes
        self._listed = 0
        self._count = (covers & 1) + (covers >> 1)
        for scope in upward:
            tick()
            if sizes[scope] <= MAX_VARIABLES:
                split = splits[scope]
                # Beyond the limit they are not listed, so the exact number does not matter.
                products = np.minimum(self._count[split.left] * self._count[split.right], MAX_LISTED + 1)
                np.add.at(self._count, split.owner, products)
                self._count[split.owner] = np.minimum(self._count[split.owner], MAX_LISTED + 1)

    def exclusive(self, scope: int, family: IntArray, member: IntArray) -> BoolArray:
        """[number of families] whether the members of each exclude one another; False where it is not known.

        Args:
            scope: what all members are over.
            family, member: families 0, 1, ... in increasing order, and their nodes.
        """
        families = int(family.max(initial=-1)) + 1
        result = np.zeros(families, dtype=np.bool_)
        if self._sizes[scope] > MAX_VARIABLES:
            return result
        totals = np.bincount(family, weights=self._count[member], minlength=families).astype(np.int64)
        possible = totals <= min(1 << self._sizes[scope], MAX_LISTED)
        chunk = np.cumsum(np.where(possible, totals, 0)) // MAX_LISTED
        for number in np.unique(chunk).tolist():
            tick(1_000)
            chosen = possible & (chunk == number)
            self._listed += int(totals[chosen].sum())
            if self._listed > MAX_ALL_LISTED:
                break
            mine = chosen[family]
            twice = self._shared(scope, family[mine], member[mine])
            chosen[twice] = False
            result |= chosen
        return result

    def _shared(self, scope: int, family: IntArray, member: IntArray) -> IntArray:
        """The families in which some model belongs to two members."""
        nodes, which = np.unique(member, return_inverse=True)
        starts, models = self._models(scope, nodes)
        sizes = np.diff(starts)[which]
        listed = models[np.repeat(starts[which], sizes) + count_up(sizes)]
        keys = np.sort(np.repeat(family, sizes) << self._sizes[scope] | listed)
        return np.unique(keys[1:][keys[1:] == keys[:-1]] >> self._sizes[scope])

    def _models(self, scope: int, nodes: IntArray) -> tuple[IntArray, IntArray]:
        """The models of some nodes, one after the other, and where those of each begin."""
        if scope not in self._splits:
            sizes = self._count[nodes]
            present = np.repeat(self._covers[nodes] == 2, sizes)
            return _starts(sizes), np.where(present, 1, count_up(sizes))
        split = self._splits[scope]
        begin, end = np.searchsorted(split.owner, nodes), np.searchsorted(split.owner, nodes, "right")
        elements = np.repeat(begin, end - begin) + count_up(end - begin)
        lefts, left = np.unique(split.left[elements], return_inverse=True)
        rights, right = np.unique(split.right[elements], return_inverse=True)
        left_starts, left_models = self._models(split.left_scope, lefts)
        right_starts, right_models = self._models(split.right_scope, rights)
        left_sizes, right_sizes = np.diff(left_starts)[left], np.diff(right_starts)[right]
        sizes = left_sizes * right_sizes
        place, element = count_up(sizes), np.repeat(np.arange(len(elements)), sizes)
        low = left_models[left_starts[left][element] + place // right_sizes[element]]
        high = right_models[right_starts[right][element] + place % right_sizes[element]]
        per_node = np.bincount(np.repeat(np.arange(len(nodes)), end - begin), weights=sizes, minlength=len(nodes))
        return _starts(per_node.astype(np.int64)), low | high << self._sizes[split.left_scope]


def _starts(sizes: IntArray) -> IntArray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
