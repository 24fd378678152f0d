"""A circuit as arrays for loops: one row per node, its elements upward, its uses downward.

Legend: N variables, R rows, E elements, U uses, J counts.

Rows 2 i and 2 i + 1 are variable i absent and present, row 2 N is the constant true; the sums follow in the order of
the graph, children before parents, and the last J rows are the root's coefficients, one per count. Where nodes below
the root have no definite numbers of selected variables, there is one coefficient for all counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from circuitroute.circuit.graph import Graph, NodeKind, count_ranges

Index = npt.NDArray[np.int64]
Row = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Flat:
    """The arrays of a circuit.

    Attributes:
        n: N.
        depth: the levels of sums.
        counts: those that the root tells apart, increasing; None where it does not.
        first: [R + 1] the elements of row r are ``first[r]`` to ``first[r + 1]``.
        left, right: [E] their rows.
        first_use: [R + 1] the uses of row r are ``first_use[r]`` to ``first_use[r + 1]``; those of the literals
            "absent" and of the constant are left out, since nothing is asked about them.
        parent, sibling: [U] the sum that has a row for a factor of an element, and the other factor.
        number: [R] the place of each sum in the level order of the graph, which numbers the uniforms of a sample; the
            root's comes last.
        root_left, root_right, root_count: the root's elements in the order of the graph, and the place of the
            coefficient each belongs to.
        log_weights: [1, J] log of the weight of each coefficient: 0, or -inf where no element has that count.
    """

    n: int
    depth: int
    counts: tuple[int, ...] | None
    first: Index
    left: Row
    right: Row
    first_use: Index
    parent: Row
    sibling: Row
    number: Index
    root_left: Row
    root_right: Row
    root_count: Row
    log_weights: npt.NDArray[np.float64]

    @property
    def rows(self) -> int:
        """R."""
        return len(self.first) - 1

    @property
    def shape(self) -> Index:
        """The root as the only level of a tree: where its coefficients begin, one node, its degree, and N."""
        J = self.log_weights.shape[1]
        return np.array([[self.rows - J, 1, J - 1, self.n]], dtype=np.int64)


def flatten(graph: Graph, K: int) -> Flat:
    """The arrays of a smooth, decomposable graph whose largest count is K."""
    n, root = graph.n, graph.num_nodes - 1
    row, sums = _rows(graph, root)
    root_left, root_right, count, counts = _root(graph, root, row)
    J = 1 if counts is None else max(K, counts[-1]) + 1
    log_weights = np.full((1, J), -np.inf)
    log_weights[0, [0] if counts is None else list(counts)] = 0.0
    sizes = graph.first[sums + 1] - graph.first[sums]
    at = np.repeat(graph.first[sums] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    by_count = np.argsort(count, kind="stable")
    left = np.concatenate([row[graph.left[at]], root_left[by_count]])
    right = np.concatenate([row[graph.right[at]], root_right[by_count]])
    fan_in = np.concatenate([np.zeros(2 * n + 1, dtype=np.int64), sizes, np.bincount(count, minlength=J)])
    first = np.concatenate([[0], np.cumsum(fan_in)])
    first_use, parent, sibling = _uses(n, left, right, np.repeat(np.arange(len(fan_in)), fan_in), len(fan_in))
    place = np.empty(graph.num_nodes, dtype=np.int64)
    place[np.argsort(graph.level_of, kind="stable")] = np.arange(graph.num_nodes)
    number = np.zeros(len(fan_in), dtype=np.int64)
    number[row[sums]], number[-1] = place[sums], graph.num_nodes - 1
    return Flat(
        n=n,
        depth=len(graph.levels),
        counts=counts,
        first=first,
        left=left.astype(np.int32),
        right=right.astype(np.int32),
        first_use=first_use,
        parent=parent.astype(np.int32),
        sibling=sibling.astype(np.int32),
        number=number,
        root_left=root_left.astype(np.int32),
        root_right=root_right.astype(np.int32),
        root_count=count.astype(np.int32),
        log_weights=log_weights,
    )


def _rows(graph: Graph, root: int) -> tuple[Index, Index]:
    """The row of every node (-1 for the root), and the sums but the root."""
    variable = graph.variable.astype(np.int64)
    row = np.where(graph.kind == NodeKind.TRUE, 2 * graph.n, 2 * variable + (graph.kind == NodeKind.PRESENT))
    sums = np.flatnonzero(graph.kind == NodeKind.SUM)
    sums = sums[sums != root]
    row[sums] = 2 * graph.n + 1 + np.arange(len(sums))
    return row, sums


def _root(graph: Graph, root: int, row: Index) -> tuple[Index, Index, Index, tuple[int, ...] | None]:
    """The root's elements as rows, the coefficient of each, and the counts, if there are definite ones."""
    fewest, most = count_ranges(graph)
    if graph.kind[root] != NodeKind.SUM:
        return row[[root]], np.array([2 * graph.n]), fewest[[root]].astype(np.int64), (int(fewest[root]),)
    span = slice(int(graph.first[root]), int(graph.first[root + 1]))
    left, right = graph.left[span].astype(np.int64), graph.right[span].astype(np.int64)
    low, high = fewest[left] + fewest[right], most[left] + most[right]
    if (low == high).all():
        return row[left], row[right], low.astype(np.int64), tuple(np.unique(low).tolist())
    return row[left], row[right], np.zeros(len(left), dtype=np.int64), None


def _uses(n: int, left: Index, right: Index, owner: Index, rows: int) -> tuple[Index, Index, Index]:
    """(first_use, parent, sibling): the elements by the rows that are their factors."""
    child, parent, sibling = (np.concatenate(pair) for pair in ((left, right), (owner, owner), (right, left)))
    wanted = (child > 2 * n) | ((child < 2 * n) & (child % 2 == 1))
    child, parent, sibling = child[wanted], parent[wanted], sibling[wanted]
    order = np.argsort(child, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(child, minlength=rows))])
    return first, parent[order], sibling[order]
