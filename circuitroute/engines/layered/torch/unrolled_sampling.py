"""A sample of any circuit as a fixed list of plain tensor operations, for programs that leave this process.

Legend: T tokens, N variables, R rows (literals, the constant true, nothing, then the sums), F elements of a sum, m sums
of one group.

The arithmetic is that of the engine ``naive``: float64 log-probabilities of independent coins up, then an element of
every sum by inversion at the uniform that belongs to the sum, its place in the level order of the graph. So the sample
is the one that ``naive`` draws, and with it every engine; :mod:`circuitroute.engines.layered.torch.unrolled` says what
unrolling is. An element is drawn for every sum, whether the walk down reaches it or not: what is computed depends on
the circuit alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from circuitroute.circuit.graph import Graph
from circuitroute.engines.layered.torch.sampling import first
from circuitroute.engines.layered.torch.unrolled import grouped, reached_below, require_small, take
from circuitroute.engines.logspace import is_zero, log_coins
from circuitroute.engines.tables import Tables
from circuitroute.keys import uniform_at


class UnrolledSample(nn.Module):
    """Logits [T, N] and keys [T] to a sample [T, N] bool; all False in rows that nothing satisfies.

    Args:
        graph: a smooth, decomposable, deterministic circuit. Infinite logits are evidence; there must be no NaN.

    Attributes:
        tables: which rows are added to which, and the numbers of the uniforms, on any device; they are no buffers, see
            :mod:`circuitroute.engines.tables`.

    Raises:
        ValueError: the circuit has more than ``MAX_UNROLLED`` products.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        require_small(graph)
        groups, self._root, self._rows = grouped(graph)
        self._n = graph.n
        self._firsts = tuple(group.first for group in groups)
        place = np.empty(graph.num_nodes, dtype=np.int64)
        place[np.argsort(graph.level_of, kind="stable")] = np.arange(graph.num_nodes)
        tables = {"number": np.concatenate([np.empty(0, np.int64), *(place[group.nodes] for group in groups)])}
        for i, group in enumerate(groups):
            tables |= {f"left_{i}": group.left, f"right_{i}": group.right}
        self.tables = Tables(tables)
        self.tables.prepare(torch.device("cpu"))

    def forward(self, logits: Tensor, key_T: Tensor) -> Tensor:
        """[T, N] floating and [T] int64 to [T, N] bool."""
        theta = logits.double()
        absent, present = log_coins(theta, torch.zeros_like(theta[:, 0]))
        values = theta.new_full((self._rows, theta.shape[0]), -math.inf)
        values[: self._n], values[self._n : 2 * self._n], values[2 * self._n] = absent, present, 0.0
        tables = self.tables.on(values.device)
        sides = [(tables[f"left_{i}"], tables[f"right_{i}"]) for i in range(len(self._firsts))]
        u = uniform_at(key_T, tables["number"][:, None], torch.float64)
        sums = 2 * self._n + 2  # the first of their rows
        choices = []
        for start, (left, right) in zip(self._firsts, sides, strict=True):
            elements = take(values, left) + take(values, right)
            largest = elements.amax(0)
            total = largest + (elements - largest).exp().sum(0).log()
            stop = start + left.shape[1]
            values[start:stop] = total
            choices.append(_draw((elements - total).exp(), u[start - sums : stop - sums]))
        live = ~is_zero(values[self._root])
        return reached_below(live, self._root, self._n, self._firsts, sides, choices)


def _draw(probs: Tensor, u: Tensor) -> Tensor:
    """[m, T] int64, an element of every sum by inversion at ``u`` [m, T], given their probabilities [F, m, T]."""
    cumulative = probs.cumsum(0)
    below = cumulative <= u * cumulative[-1]
    return first(~below & (probs > 0))
