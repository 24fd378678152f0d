"""A circuit laid out for batched evaluation: one row per node, and steps that fill the rows in order.

Legend: M nodes, E elements, N variables; a *block* is the sums of one level that share a scope.

Rows 0 to N - 1 are the literals "absent", N to 2 N - 1 "present", row 2 N the constant true; sums follow, and the
root's coefficients come last. Blocks of one level whose tables of products agree are *alike* and laid out side by
side, state by state, so that a step can treat them as one tensor.

The root is kept apart: where every node below it has a definite number of selected variables, its elements are
collected by that number, one *coefficient* per count. That allows the logits of such circuits to be shifted, and makes
the posterior of the count a by-product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from circuitroute.circuit.graph import Graph, Level, NodeKind, count_ranges
from circuitroute.engines.layered.torch.runs import Contraction, IntArray
from circuitroute.engines.layered.torch.steps import Dense, Pairs, Pool, Step, Table
from circuitroute.engines.tables import constant, lasting

# With fewer products per tensor operation, gathering pairs is as good as a dense step.
MIN_PRODUCTS_PER_RUN = 12


@dataclass(frozen=True)
class Elements:
    """Products by row: those of row r are ``first[r]`` to ``first[r + 1]`` of ``left`` and ``right`` (rows too)."""

    first: IntArray
    left: IntArray
    right: IntArray


@dataclass(frozen=True)
class Sums:
    """The sums of one step, for walking down: rows [states, blocks], -1 where a block has fewer states."""

    rows: IntArray
    fan_in: int  # the most elements any of them has

    @property
    def blocks(self) -> int:
        """How many blocks the step has."""
        return int(self.rows.shape[1])


@dataclass
class Plan:
    """The layout of a graph on one device.

    Attributes:
        nodes: M.
        rows: how many rows of values an evaluation holds.
        steps: in order; the last one fills the root's coefficients, unless the root is a literal.
        coefficients: rows of the root's coefficients.
        counts: the count of each coefficient, increasing; None where nodes below the root have no definite counts
            (there is one coefficient then).
        sums: those of every step but the root's.
        elements: of every row but the root's.
        root: the root's elements, and the coefficient each belongs to.
        number: the place of each row in the level order of the graph, which numbers the uniforms of a sample; the
            root's is the last.
        block_of: the block of every row. A variable's literals are one; the constant true has one of its own.
        blocks: how many there are, without the constant's.
    """

    n: int
    nodes: int
    rows: int
    steps: list[Step]
    coefficients: IntArray
    counts: tuple[int, ...] | None
    sums: list[Sums]
    elements: Elements
    root: tuple[IntArray, IntArray, IntArray] | None
    number: IntArray
    block_of: IntArray
    blocks: int
    device: torch.device
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def present(self) -> slice:
        """The rows of the literals "present"."""
        return slice(self.n, 2 * self.n)

    def tensor(self, name: str, array: IntArray) -> torch.Tensor:
        """``array`` on the plan's device, made once, unless it cannot be kept."""
        tensor = self.tensors.get(name)
        if tensor is None:
            tensor = constant(array, self.device)
            if lasting():
                self.tensors[name] = tensor
        return tensor


def lay_out(graph: Graph, device: torch.device) -> Plan:
    """The plan of a smooth, decomposable graph."""
    return _Layout(graph, device).plan()


class _Layout:
    def __init__(self, graph: Graph, device: torch.device) -> None:
        self.graph = graph
        self.device = device
        self.n = graph.n
        self.row = np.full(graph.num_nodes, -1, dtype=np.int64)
        self.scope = _scope_names(graph)
        self.next_row = 2 * self.n + 1
        self.steps: list[Step] = []
        self.sums: list[Sums] = []

    def plan(self) -> Plan:
        graph, root = self.graph, self.graph.num_nodes - 1
        leaf_row = np.array([2 * self.n, 0, self.n])[np.minimum(graph.kind, 2)]
        is_leaf = graph.kind != NodeKind.SUM
        self.row[is_leaf] = (leaf_row + np.maximum(graph.variable, 0))[is_leaf]
        for level in graph.levels:
            self._level(level, root)
        last = self.next_row
        coefficients, counts, root_elements = self._root(root)
        block_of, blocks = self._blocks(last)
        return Plan(
            n=self.n,
            nodes=graph.num_nodes,
            rows=self.next_row,
            steps=self.steps,
            coefficients=coefficients,
            counts=counts,
            sums=self.sums,
            elements=self._elements(last),
            root=root_elements,
            number=self._numbers(last),
            block_of=block_of,
            blocks=blocks,
            device=self.device,
        )

    def _level(self, level: Level, root: int) -> None:
        """Rows and steps for one level: alike blocks together, the others as pairs."""
        alike: dict[tuple[int, int, bytes], list[_Block]] = defaultdict(list)
        for block in _blocks_of(level, self.scope, root):
            alike[block.signature()].append(block)
        loose: list[_Block] = []
        for blocks in alike.values():
            if blocks[0].is_regular(len(blocks)):
                self._dense(blocks)
            else:
                loose += blocks
        if loose:
            self._pairs(loose)

    def _dense(self, blocks: list[_Block]) -> None:
        blocks.sort(key=lambda b: int(self.row[b.left].min()))
        rows = self._take(len(blocks[0].nodes), len(blocks))
        for j, block in enumerate(blocks):
            self.row[block.nodes] = rows[:, j]
        left = np.stack([self.row[b.left] for b in blocks], axis=1)
        right = np.stack([self.row[b.right] for b in blocks], axis=1)
        self.steps.append(Dense(blocks[0].table, *(Pool(x, self.device) for x in (left, right, rows))))
        self.sums.append(Sums(rows, max(b.fan_in() for b in blocks)))

    def _take(self, states: int, blocks: int) -> IntArray:
        rows = self.next_row + np.arange(states * blocks).reshape(states, blocks)
        self.next_row += rows.size
        return rows

    def _pairs(self, blocks: list[_Block]) -> None:
        sums = np.full((max(len(b.nodes) for b in blocks), len(blocks)), -1, dtype=np.int64)
        for j, block in enumerate(blocks):
            self.row[block.nodes] = sums[: len(block.nodes), j] = self._take(len(block.nodes), 1)[:, 0]
        left = np.concatenate([self.row[b.left[b.table.left]] for b in blocks])
        right = np.concatenate([self.row[b.right[b.table.right]] for b in blocks])
        out = np.concatenate([self.row[b.nodes[b.table.out]] for b in blocks])
        self.steps.append(Pairs(left, right, out, self.device))
        self.sums.append(Sums(sums, max(b.fan_in() for b in blocks)))

    def _root(self, root: int) -> tuple[IntArray, tuple[int, ...] | None, tuple[IntArray, IntArray, IntArray] | None]:
        """The last step, which collects the root's elements by their count."""
        fewest, most = count_ranges(self.graph)
        if self.graph.kind[root] != NodeKind.SUM:
            return self.row[[root]], (int(fewest[root]),), None
        span = slice(int(self.graph.first[root]), int(self.graph.first[root + 1]))
        left, right = self.graph.left[span].astype(np.int64), self.graph.right[span].astype(np.int64)
        low, high = fewest[left] + fewest[right], most[left] + most[right]
        definite = bool((low == high).all())
        counts, slot = np.unique(low if definite else np.zeros_like(low), return_inverse=True)
        block = _Block.of(np.arange(len(counts)), left, right, slot.astype(np.int64))
        rows = self._take(len(counts), 1)
        if block.is_regular(1):
            pools = (
                Pool(x, self.device) for x in (self.row[block.left][:, None], self.row[block.right][:, None], rows)
            )
            self.steps.append(Dense(block.table, *pools))
        else:
            self.steps.append(Pairs(self.row[left], self.row[right], rows[slot, 0], self.device))
        return rows[:, 0], tuple(counts.tolist()) if definite else None, (self.row[left], self.row[right], slot)

    def _blocks(self, last: int) -> tuple[IntArray, int]:
        """The block of every row, and how many blocks there are."""
        block_of = np.concatenate([np.arange(self.n), np.arange(self.n), [-1], np.full(last - 2 * self.n - 1, -1)])
        blocks = self.n
        for sums in self.sums:
            owner = np.broadcast_to(blocks + np.arange(sums.blocks), sums.rows.shape)
            block_of[sums.rows[sums.rows >= 0]] = owner[sums.rows >= 0]
            blocks += sums.blocks
        block_of[2 * self.n] = blocks
        return block_of, blocks

    def _elements(self, last: int) -> Elements:
        """The graph's elements, in row order."""
        graph = self.graph
        node_of = np.full(last, -1, dtype=np.int64)
        inner = np.flatnonzero(graph.kind == NodeKind.SUM)
        inner = inner[self.row[inner] >= 0]
        node_of[self.row[inner]] = inner
        sizes = np.where(node_of >= 0, graph.first[node_of + 1] - graph.first[node_of], 0)
        first = np.concatenate([[0], np.cumsum(sizes)])
        owner = np.repeat(np.arange(last), sizes)
        at = np.arange(len(owner)) - first[owner] + graph.first[node_of[owner]]
        return Elements(first, self.row[graph.left[at]], self.row[graph.right[at]])

    def _numbers(self, last: int) -> IntArray:
        place = np.empty(self.graph.num_nodes, dtype=np.int64)
        place[np.argsort(self.graph.level_of, kind="stable")] = np.arange(self.graph.num_nodes)
        number = np.zeros(last, dtype=np.int64)
        inner = np.flatnonzero((self.graph.kind == NodeKind.SUM) & (self.row >= 0))
        number[self.row[inner]] = place[inner]
        return number


@dataclass(frozen=True)
class _Block:
    """Sums of one scope, the nodes their elements multiply, and the products in those nodes' local numbers."""

    nodes: IntArray
    left: IntArray
    right: IntArray
    table: Table

    @staticmethod
    def of(nodes: IntArray, left: IntArray, right: IntArray, out: IntArray) -> _Block:
        """From each element's two nodes and its sum's place in ``nodes``."""
        lefts, a = np.unique(left, return_inverse=True)
        rights, b = np.unique(right, return_inverse=True)
        return _Block(nodes, lefts, rights, Table(a.astype(np.int64), b.astype(np.int64), out))

    def fan_in(self) -> int:
        """The most elements of any of its sums."""
        return int(np.bincount(self.table.out).max())

    def is_regular(self, alike: int) -> bool:
        """Whether ``alike`` blocks of this kind are worth a dense step."""
        runs = Contraction.count(self.table.left, self.table.right, self.table.out)
        return len(self.table.out) * alike >= MIN_PRODUCTS_PER_RUN * runs

    def signature(self) -> tuple[int, int, bytes]:
        """Equal for blocks that are alike."""
        table = np.concatenate([self.table.left, self.table.right, self.table.out])
        return len(self.left), len(self.right), table.astype(np.int32).tobytes()


def _blocks_of(level: Level, scope: IntArray, root: int) -> Iterator[_Block]:
    """The level's sums by scope, without the root."""
    order = np.argsort(scope[level.nodes], kind="stable")
    order = order[level.nodes[order] != root]
    cuts = np.flatnonzero(np.diff(scope[level.nodes[order]])) + 1
    ends = np.append(level.starts, len(level.left))
    for members in np.split(order, cuts) if len(order) else []:
        spans = [np.arange(ends[i], ends[i + 1]) for i in members]
        at = np.concatenate(spans)
        out = np.repeat(np.arange(len(members)), [len(s) for s in spans])
        yield _Block.of(level.nodes[members], level.left[at], level.right[at], out)


def _scope_names(graph: Graph) -> IntArray:
    """A 64-bit name per node, equal for equal scopes: the exclusive or of random names of its variables.

    The names have 63 bits: among a million scopes, two share theirs by accident with a chance of 1 in 10 million.
    """
    names = np.random.default_rng(0).integers(1, np.iinfo(np.int64).max, graph.n)
    own = np.where(graph.variable >= 0, names[np.maximum(graph.variable, 0)], 0)
    for level in graph.levels:
        own[level.nodes] = own[level.left[level.starts]] ^ own[level.right[level.starts]]
    return own
