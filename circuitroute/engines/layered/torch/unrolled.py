"""The mode of any circuit as a fixed list of plain tensor operations, for programs that leave this process.

Legend: T tokens, N variables, R rows (literals, the constant true, nothing, then the sums), F elements of a sum, m sums
of one group.

Traced programs usually call engines by name, in the process that holds the circuit. The operations here depend on the
circuit alone, so tracing unrolls them, and what is exported runs wherever torch does. Up: every sum's largest element,
and which one it is, the first among equals. Down: from the root along these. The values are the same numbers as on the
engine ``naive``, hence so is the mode.

Sums of a level with about the same number of elements are a *group*: one gather on each side, padded with the row
nothing, whose value is log 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from circuitroute.circuit.graph import Graph, Level, NodeKind
from circuitroute.engines.tables import Tables

IntArray = npt.NDArray[np.int64]

# Products of one group, with padding, unless a single sum has more: what an operation holds per token.
MAX_PRODUCTS = 1 << 13
# So few padded products are not worth a second group.
FEW_PRODUCTS = 1 << 10
# Circuits with more products make programs too long and their tables too large.
MAX_UNROLLED = 1 << 15


class _Group(NamedTuple):
    """Sums in rows ``first`` to ``first + m``, and the rows of their elements' children, each [F, m]."""

    first: int
    left: IntArray
    right: IntArray


def can_unroll(graph: Graph) -> bool:
    """Whether the circuit is small enough, see ``MAX_UNROLLED``."""
    return graph.num_edges <= MAX_UNROLLED


class UnrolledMode(nn.Module):
    """Logits [T, N] to a most probable subset [T, N] bool; all False in rows that nothing satisfies.

    Args:
        graph: a smooth, decomposable circuit. Infinite logits are evidence; there must be no NaN.

    Attributes:
        tables: which rows are added to which, on any device; they are no buffers, see
            :mod:`circuitroute.engines.tables`.

    Raises:
        ValueError: the circuit has more than ``MAX_UNROLLED`` products.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        if not can_unroll(graph):
            raise ValueError(f"graph has {graph.num_edges} products: at most {MAX_UNROLLED} are unrolled")
        groups, root, rows = _groups(graph)
        self._n, self._rows = graph.n, rows
        self._firsts = tuple(group.first for group in groups)
        self._root = root
        sides = {f"left_{i}": group.left for i, group in enumerate(groups)}
        self.tables = Tables(sides | {f"right_{i}": group.right for i, group in enumerate(groups)})
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
        choices, tables = [], self.tables.on(values.device)
        for i, first in enumerate(self._firsts):
            left, right = tables[f"left_{i}"], tables[f"right_{i}"]
            elements = _take(values, left) + _take(values, right)
            best = elements.amax(0)
            choices.append(_first(elements == best))
            values[first : first + len(best)] = best
        return self._present(values, choices)

    def _present(self, values: Tensor, choices: list[Tensor]) -> Tensor:
        """Which of the literals "present" lie below the root along the choices."""
        tables = self.tables.on(values.device)
        reached = torch.zeros_like(values, dtype=torch.bool)
        reached[self._root] = values[self._root] > -math.inf
        for i in reversed(range(len(self._firsts))):
            first, choice = self._firsts[i], choices[i]
            live = reached[first : first + len(choice)]
            for table in (tables[f"left_{i}"], tables[f"right_{i}"]):
                # The row nothing is never read.
                child = torch.where(live, table.t().gather(1, choice.long()), 2 * self._n + 1)
                reached.scatter_(0, child, True)
        return reached[self._n : 2 * self._n].t()


def _take(values: Tensor, at: Tensor) -> Tensor:
    """[F, m, T] values[at]."""
    return values.index_select(0, at.reshape(-1)).view(*at.shape, values.shape[1])


def _first(candidates: Tensor) -> Tensor:
    """[m, T] the index of the first that holds, of [F, m, T] bool; argmax is many times slower along dim 0."""
    F = candidates.shape[0]
    dtype = torch.uint8 if F < 256 else torch.int32
    falling = torch.arange(F, 0, -1, dtype=dtype, device=candidates.device)
    return F - (candidates.to(dtype) * falling[:, None, None]).amax(0)


def _groups(graph: Graph) -> tuple[list[_Group], int, int]:
    """All sums in groups, children first; the row of the root; and R."""
    kind = np.asarray(graph.kind)
    row = np.full(graph.num_nodes, -1, dtype=np.int64)
    literal = np.maximum(np.asarray(graph.variable), 0)
    row[kind == NodeKind.ABSENT] = literal[kind == NodeKind.ABSENT]
    row[kind == NodeKind.PRESENT] = graph.n + literal[kind == NodeKind.PRESENT]
    row[kind == NodeKind.TRUE] = 2 * graph.n
    nothing = 2 * graph.n + 1
    groups: list[_Group] = []
    next_row = nothing + 1
    for level in graph.levels:
        sizes = np.diff(np.append(level.starts, len(level.left)))
        for members in _alike(sizes):
            left, right = _padded(level, row, members, sizes[members], nothing)
            row[level.nodes[members]] = next_row + np.arange(len(members))
            groups.append(_Group(next_row, left, right))
            next_row += len(members)
    return groups, int(row[-1]), next_row


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


def _padded(level: Level, row: IntArray, members: IntArray, sizes: IntArray, nothing: int) -> tuple[IntArray, IntArray]:
    """The rows of the members' left and right children, [F, m] each, in the order of the elements."""
    place = np.arange(int(sizes.max()))[:, None]
    at = np.minimum(level.starts[members] + place, len(level.left) - 1)
    inside = place < sizes
    return np.where(inside, row[level.left[at]], nothing), np.where(inside, row[level.right[at]], nothing)
