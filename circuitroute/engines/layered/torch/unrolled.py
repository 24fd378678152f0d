"""The mode of any circuit as a fixed list of plain tensor operations, for programs that leave this process.

Legend: T tokens, N variables, R rows (literals, the constant true, nothing, then the sums), F elements of a sum, m sums
of one group, W words of a rank.

Traced programs usually call engines by name, in the process that holds the circuit. The operations here depend on the
circuit alone, so tracing unrolls them, and what is exported runs wherever torch does. Up: every sum's largest element,
and which one it is, by rank among equals (:mod:`circuitroute.engines.layered.precedence`). Down: from the root along
these. The values are the same numbers as on the engine ``naive``, hence so is the mode.

Sums of a level with about the same number of elements are a *group*: one gather on each side, padded with the row
nothing, whose value is log 0.

Words have rows of their own: first the constants, which are few, then one for every sum and every word in which its
elements can differ. Sums of one group that differ in other words, since they stand for other variables, are compared
together, each in its first such word, then each in its second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from circuitroute.circuit.graph import Graph, Level, NodeKind
from circuitroute.engines.layered.precedence import LOWEST, IntArray, Precedence
from circuitroute.engines.layered.torch.sampling import first
from circuitroute.engines.tables import Tables

BoolArray = npt.NDArray[np.bool_]

# Products of one group, with padding, unless a single sum has more: what an operation holds per token.
MAX_PRODUCTS = 1 << 13
# So few padded products are not worth a second group.
FEW_PRODUCTS = 1 << 10
# Circuits with more products make programs too long and their tables too large.
MAX_UNROLLED = 1 << 15


class Group(NamedTuple):
    """Sums in rows ``first`` to ``first + m``, and their elements' children, each [F, m].

    Attributes:
        nodes: [m], the sums' numbers in the graph.
        left, right: the children's rows; padding is the row nothing.
        left_nodes, right_nodes: their numbers in the graph; padding is any.
    """

    first: int
    nodes: IntArray
    left: IntArray
    right: IntArray
    left_nodes: IntArray
    right_nodes: IntArray


class Grouped(NamedTuple):
    """All sums in groups, children first; the row of the root; R."""

    groups: list[Group]
    root: int
    rows: int


class _Word(NamedTuple):
    """One word of every sum of a group: its rows [m], and those of its elements' children, each [F, m]."""

    sums: IntArray
    left: IntArray
    right: IntArray


def can_unroll(graph: Graph) -> bool:
    """Whether the circuit is small enough for a program that leaves this process, see ``MAX_UNROLLED``."""
    return graph.num_edges <= MAX_UNROLLED


def require_small(graph: Graph) -> None:
    """Refuse a circuit that is too large.

    Raises:
        ValueError: it has more than ``MAX_UNROLLED`` products.
    """
    if not can_unroll(graph):
        raise ValueError(f"graph has {graph.num_edges} products: at most {MAX_UNROLLED} are unrolled")


class UnrolledMode(nn.Module):
    """Logits [T, N] to a most probable subset [T, N] bool; all False in rows that nothing satisfies.

    Args:
        graph: a smooth, decomposable circuit. Infinite logits are evidence; there must be no NaN.
        portable: refuse circuits that are too large for a program that leaves this process.

    Attributes:
        tables: which rows are added to which, on any device; they are no buffers, see
            :mod:`circuitroute.engines.tables`.

    Raises:
        ValueError: it is to be portable and the circuit has more than ``MAX_UNROLLED`` products.

    Attributes:
        values_per_token: how many values an evaluation holds at once, about.
    """

    def __init__(self, graph: Graph, *, portable: bool = True) -> None:
        super().__init__()
        if portable:
            require_small(graph)
        groups, self._root, rows = grouped(graph)
        words = _Words(Precedence.of(graph))
        told_apart = [words.of(group.nodes, group.left_nodes, group.right_nodes) for group in groups]
        self._n, self._rows, self._word_rows = graph.n, rows, words.rows
        self._firsts = tuple(group.first for group in groups)
        self._words = tuple(map(len, told_apart))
        self.values_per_token = rows + words.rows + 3 * max((group.left.size for group in groups), default=0)
        tables = {"constants": words.constants}
        for i, group in enumerate(groups):
            tables |= {f"left_{i}": group.left, f"right_{i}": group.right}
            for j, word in enumerate(told_apart[i]):
                sides = zip(("sums", "left", "right"), word, strict=True)
                tables |= {f"{side}_{i}_{j}": table for side, table in sides}
        self.tables = Tables(tables)
        self.tables.prepare(torch.device("cpu"))

    def forward(self, logits: Tensor) -> Tensor:
        """[T, N] floating to [T, N] bool."""
        theta = logits.double().t()
        values = theta.new_full((self._rows, theta.shape[1]), -math.inf)
        # The weights of logspace.log_weights, with -inf for log 0: nothing is ever subtracted here.
        values[: self._n], values[self._n : 2 * self._n], values[2 * self._n] = (
            (-theta).clamp(max=0.0),
            theta.clamp(max=0.0),
            0.0,
        )
        tables = self.tables.on(values.device)
        words = torch.zeros(self._word_rows, theta.shape[1], dtype=torch.int64, device=theta.device)
        constants = tables["constants"]
        words[: len(constants)] = constants[:, None]
        choices = []
        for i, start in enumerate(self._firsts):
            left, right = tables[f"left_{i}"], tables[f"right_{i}"]
            sums = slice(start, start + left.shape[1])
            elements = take(values, left) + take(values, right)
            values[sums] = elements.amax(0)
            best = elements == values[sums]
            for j in range(self._words[i]):
                rows, left, right = (tables[f"{side}_{i}_{j}"] for side in ("sums", "left", "right"))
                ranks = take(words, left) + take(words, right)
                top = torch.where(best, ranks, LOWEST).amax(0)
                words.index_copy_(0, rows, top)
                best = best & (ranks == top)
            choices.append(first(best))
        return self._present(values, choices)

    def _present(self, values: Tensor, choices: list[Tensor]) -> Tensor:
        """Which of the literals "present" lie below the root along the choices."""
        tables = self.tables.on(values.device)
        sides = [(tables[f"left_{i}"], tables[f"right_{i}"]) for i in range(len(choices))]
        return reached_below(values[self._root] > -math.inf, self._root, self._n, self._firsts, sides, choices)


def reached_below(
    live_T: Tensor,
    root: int,
    n: int,
    firsts: Sequence[int],
    sides: Sequence[tuple[Tensor, Tensor]],
    choices: Sequence[Tensor],
) -> Tensor:
    """[T, N] bool: which of the literals "present" lie below the root of the ``live`` tokens.

    Args:
        firsts, sides: of every group its first row, and the rows of its elements' children, [F, m] each.
        choices: [m, T] of every group, the number of each sum's element.
    """
    rows = firsts[-1] + len(choices[-1]) if choices else max(root, 2 * n + 1) + 1
    reached = torch.zeros(rows, live_T.shape[0], dtype=torch.bool, device=live_T.device)
    reached[root] = live_T
    for start, (left, right), choice in zip(reversed(firsts), reversed(sides), reversed(choices), strict=True):
        live = reached[start : start + len(choice)]
        for table in (left, right):
            # The row nothing is never read.
            child = torch.where(live, table.t().gather(1, choice), 2 * n + 1)
            reached.scatter_(0, child, True)
    return reached[n : 2 * n].t()


def take(values: Tensor, at: Tensor) -> Tensor:
    """[F, m, T] values[at]."""
    return values.index_select(0, at.reshape(-1)).view(*at.shape, values.shape[1])


def grouped(graph: Graph) -> Grouped:
    """The groups of a smooth, decomposable graph."""
    kind = np.asarray(graph.kind)
    row = np.full(graph.num_nodes, -1, dtype=np.int64)
    literal = np.maximum(np.asarray(graph.variable), 0)
    row[kind == NodeKind.ABSENT] = literal[kind == NodeKind.ABSENT]
    row[kind == NodeKind.PRESENT] = graph.n + literal[kind == NodeKind.PRESENT]
    row[kind == NodeKind.TRUE] = 2 * graph.n
    nothing = 2 * graph.n + 1
    groups: list[Group] = []
    next_row = nothing + 1
    for level in graph.levels:
        sizes = np.diff(np.append(level.starts, len(level.left)))
        for members in _alike(sizes):
            left, right, inside = _padded(level, members, sizes[members])
            nodes = level.nodes[members]
            row[nodes] = next_row + np.arange(len(members))
            left_rows, right_rows = (np.where(inside, row[side], nothing) for side in (left, right))
            groups.append(Group(next_row, nodes, left_rows, right_rows, left, right))
            next_row += len(members)
    return Grouped(groups, int(row[-1]), next_row)


class _Words:
    """The rows of all words.

    Attributes:
        constants: [C] int64, what the first rows hold.
        rows: how many there are.
    """

    def __init__(self, precedence: Precedence) -> None:
        self._open = precedence.open
        self.constants, at = np.unique(precedence.words, return_inverse=True)
        self._row = at.reshape(precedence.words.shape)
        self.rows = len(self.constants)
        self._row[self._open] = self.rows + np.arange(int(self._open.sum()))
        self.rows += int(self._open.sum())

    def of(self, nodes: IntArray, left: IntArray, right: IntArray) -> list[_Word]:
        """The words in which the elements (left, right) [F, m] of the sums ``nodes`` [m] can differ.

        A sum that has fewer of them than others repeats its last one, or, without any, its first word, a constant.
        """
        choice = self._open[:, nodes]
        found = []
        for place in range(int(choice.sum(0).max())):
            # The number of the word in that place, per sum.
            last = np.maximum(np.minimum(place, choice.sum(0) - 1), 0)
            word = np.argmax((choice.cumsum(0) == last + 1) & choice, axis=0)
            found.append(_Word(*(self._row[word, side] for side in (nodes, left, right))))
        return found


def _alike(sizes: IntArray) -> list[IntArray]:
    """The sums of a level in groups of at most ``MAX_PRODUCTS``, of sizes within a factor of two where that pays."""
    padded = len(sizes) * int(sizes.max())
    magnitude = np.ceil(np.log2(sizes)).astype(np.int64)
    if padded <= max(2 * int(sizes.sum()), FEW_PRODUCTS):
        magnitude[:] = 0
    groups: list[IntArray] = []
    for each in np.unique(magnitude):
        members = np.flatnonzero(magnitude == each)
        per_group = max(1, MAX_PRODUCTS // int(sizes[members].max()))
        groups += [members[i : i + per_group] for i in range(0, len(members), per_group)]
    return groups


def _padded(level: Level, members: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray, BoolArray]:
    """The members' left and right children, in the order of the elements, and where there are any: [F, m] each."""
    place = np.arange(int(sizes.max()))[:, None]
    at = np.minimum(level.starts[members] + place, len(level.left) - 1)
    return level.left[at], level.right[at], place < sizes
