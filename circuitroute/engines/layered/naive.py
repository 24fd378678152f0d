"""The naive engine of arbitrary circuits: float64, log space, level by level, plain autograd.

Legend: T tokens, N variables, M nodes, e elements of one level, m sums of one level.

The value of a node is the log-probability that independent coins with the given logits satisfy it. A sum is the
logsumexp of its elements, an element the sum of its two factors. Marginals are the derivative of log Z, by
autograd. Sampling and the mode walk down from the root and pick one element of every sum they reach. What the mode
picks among equals is told in :mod:`circuitroute.engines.layered.precedence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuitroute.circuit.graph import Graph, NodeKind, count_range
from circuitroute.engines.layered.precedence import LOWEST, Precedence
from circuitroute.engines.logspace import is_zero, log_coins, log_weights, nan_rows
from circuitroute.engines.naive import NaiveEngine
from circuitroute.engines.tables import constant, lasting
from circuitroute.keys import uniform

# Values held at once while walking down, which bounds memory for any circuit.
MAX_VALUES = 1 << 24


@dataclass(frozen=True)
class _Step:
    """One level: children by their place in level order, grouped by sum, and each element's sum."""

    left: Tensor
    right: Tensor
    segment: Tensor
    starts: Tensor
    sums: int
    first: int


class _Plan:
    """A graph in level order (leaves, then level by level; the root comes last) as index tensors."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        order = np.argsort(graph.level_of, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        leaves = order[: int((graph.level_of == 0).sum())]
        self.nodes = graph.num_nodes
        self.kind = constant(graph.kind[leaves].astype(np.int64), device)
        self.variable = constant(np.maximum(graph.variable[leaves], 0).astype(np.int64), device)
        # [W, M], in level order; those of sums with a choice are filled in per token.
        self.words = constant(Precedence.of(graph).words[:, order], device)
        self.steps: list[_Step] = []
        first = len(leaves)
        for level in graph.levels:
            arrays = (place[level.left], place[level.right], level.segment, level.starts)
            left, right, segment, starts = (constant(a, device) for a in arrays)
            self.steps.append(_Step(left, right, segment, starts, len(level.nodes), first))
            first += len(level.nodes)

    def upward(self, leaves: Tensor, combine: Callable[[_Step, Tensor], Tensor]) -> Tensor:
        """[M, ...] all values in level order; ``combine(step, known)`` gives those of one level."""
        known = leaves
        for step in self.steps:
            known = torch.cat([known, combine(step, known)])
        return known


class NaiveLayered(NaiveEngine):
    """Float64 log-space inference for any smooth, decomposable, deterministic circuit.

    Args:
        graph: the circuit.
        K: the largest count, if the moments shall hold the count posterior.
    """

    def __init__(self, graph: Graph, K: int | None = None) -> None:
        self._graph, self._K = graph, K
        self._plans: dict[torch.device, _Plan] = {}
        self.gives_counts = K is not None

    def _plan(self, device: torch.device) -> _Plan:
        plan = self._plans.get(device)
        if plan is None:
            plan = _Plan(self._graph, device)
            if lasting():
                self._plans[device] = plan
        return plan

    def log_root(self, logits_TN: Tensor, potential_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.naive.NaiveEngine`; the coins are taken as they are."""
        root = self._log_values(logits_TN)[-1]
        return root, torch.zeros_like(root)

    def moments(self, logits_TN: Tensor, potential: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.naive.NaiveEngine`."""
        log_partition, marginals, _ = super().moments(logits_TN, None)
        return log_partition, marginals, None if self._K is None else self.count_probs(logits_TN, self._K)

    def _log_values(self, logits_TN: Tensor) -> Tensor:
        """[M, T] log-probability of every node, in level order."""
        coins = log_coins(logits_TN, logits_TN.new_zeros(len(logits_TN)))
        return self._plan(logits_TN.device).upward(self._leaves(*coins), _log_sums)

    def _leaves(self, absent: Tensor, present: Tensor) -> Tensor:
        """The leaves in level order, from literals [N, T]."""
        plan = self._plan(present.device)
        is_present = (plan.kind == NodeKind.PRESENT)[:, None]
        chosen = torch.where(is_present, present[plan.variable], absent[plan.variable])
        return torch.where((plan.kind == NodeKind.TRUE)[:, None], 0.0, chosen)

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        return self._in_chunks(logits_TN, key_T)

    @torch.no_grad()
    def mode(self, logits_TN: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.LayeredEngine`."""
        return self._in_chunks(logits_TN, None)

    def _in_chunks(self, logits_TN: Tensor, key_T: Tensor | None) -> Tensor:
        words = 0 if key_T is not None else len(self._plan(logits_TN.device).words)
        rows = max(1, MAX_VALUES // ((1 + words) * (self._graph.num_nodes + self._graph.num_edges)))
        parts = [
            self._walk(logits_TN[i : i + rows].double(), None if key_T is None else key_T[i : i + rows])
            for i in range(0, len(logits_TN), rows)
        ]
        return torch.cat(parts) if parts else torch.zeros_like(logits_TN, dtype=torch.bool)

    def _walk(self, logits_TN: Tensor, key_T: Tensor | None) -> Tensor:
        """From the root, pick one element of every sum that is reached: at random, or the best without a key."""
        plan = self._plan(logits_TN.device)
        best: list[Tensor] = []
        if key_T is not None:
            values = self._log_values(logits_TN)
        else:
            values = plan.upward(self._leaves(*log_weights(logits_TN)), _best_elements)
            best = _preferred(plan, values)
        reached = torch.zeros_like(values, dtype=torch.bool)
        reached[-1] = ~is_zero(values[-1])
        for step in reversed(plan.steps):
            chosen = _draw(step, values, key_T) if key_T is not None else best.pop()
            live = chosen & reached[step.first : step.first + step.sums][step.segment]
            for child in (step.left, step.right):
                hits = torch.zeros_like(reached, dtype=torch.int32).index_add_(0, child, live.to(torch.int32))
                reached |= hits > 0
        mask = torch.zeros_like(logits_TN, dtype=torch.bool)
        present = plan.kind == NodeKind.PRESENT
        mask[:, plan.variable[present]] = reached[: len(plan.kind)][present].t()
        return mask

    def counting(self) -> NaiveLayered:
        """See :class:`circuitroute.engines.base.LayeredEngine`: by the roots of unity, see :meth:`count_probs`."""
        return self if self.gives_counts else NaiveLayered(self._graph, count_range(self._graph)[1])

    def count_probs(self, logits_TN: Tensor, K: int) -> Tensor:
        """[T, K + 1] P(|S| = j) in the dtype of the logits, differentiable; K at least the largest count.

        The probability generating function of |S| is evaluated at the (K + 1)-th roots of unity, where every
        present literal counts as x, and transformed back. Elements enter with their probability given the
        sum, so all values stay on the unit disc.
        """
        plan = self._plan(logits_TN.device)
        values = self._log_values(logits_TN.double())
        angles = torch.arange(K + 1, device=logits_TN.device, dtype=torch.float64) * (2 * math.pi / (K + 1))
        points = torch.polar(torch.ones_like(angles), angles)
        leaves = torch.where((plan.kind == NodeKind.PRESENT)[:, None, None], points, torch.ones_like(points))

        def combine(step: _Step, known: Tensor) -> Tensor:
            terms = _given_sum(step, values)[:, :, None] * known[step.left] * known[step.right]
            return terms.new_zeros(step.sums, *terms.shape[1:]).index_add(0, step.segment, terms)

        at_points = plan.upward(leaves.expand(-1, len(logits_TN), -1), combine)[-1]
        # Of no rows there is no transform: on CPUs MKL refuses it.
        back = torch.fft.fft(at_points.contiguous(), dim=-1) if len(logits_TN) else at_points
        probs = back.real / (K + 1)
        return nan_rows(is_zero(values[-1].detach()), probs.clamp(min=0.0)).to(logits_TN.dtype)


def _best_elements(step: _Step, known: Tensor) -> Tensor:
    """[m, T] the largest element of every sum."""
    elements = known[step.left] + known[step.right]
    index = step.segment[:, None].expand_as(elements)
    return elements.new_zeros(step.sums, elements.shape[1]).scatter_reduce(
        0, index, elements, "amax", include_self=False
    )


def _log_sums(step: _Step, known: Tensor) -> Tensor:
    """[m, T] logsumexp over the elements of every sum."""
    elements = known[step.left] + known[step.right]
    with torch.no_grad():
        largest = _best_elements(step, known)
    terms = (elements - largest[step.segment]).exp()
    return largest + terms.new_zeros(step.sums, terms.shape[1]).index_add(0, step.segment, terms).log()


def _given_sum(step: _Step, values: Tensor) -> Tensor:
    """[e, T] probability of every element given its sum."""
    sums = values[step.first : step.first + step.sums]
    return (values[step.left] + values[step.right] - sums[step.segment]).exp()


def _draw(step: _Step, values: Tensor, key_T: Tensor) -> Tensor:
    """[e, T] one element of every sum, by inversion at the uniform that belongs to the sum."""
    probs = _given_sum(step, values)
    running = torch.cat([torch.zeros_like(probs[:1]), probs.cumsum(0)])
    start, stop = running[step.starts], running[step.starts + torch.bincount(step.segment)]
    u = uniform(key_T, step.first, step.sums, torch.float64)
    below = running[1:] - start[step.segment] <= (u * (stop - start))[step.segment]
    return _first(step, ~below & (probs > 0))


def _preferred(plan: _Plan, values: Tensor) -> list[Tensor]:
    """[e, T] of every level: the best element of every sum, by value and then word by word."""
    words = plan.words[:, :, None].repeat(1, 1, values.shape[1])
    found = []
    for step in plan.steps:
        sums = slice(step.first, step.first + step.sums)
        best = values[step.left] + values[step.right] == values[sums][step.segment]
        for word in words:
            elements = word[step.left] + word[step.right]
            index = step.segment[:, None].expand_as(elements)
            word[sums] = torch.full_like(word[sums], LOWEST).scatter_reduce(
                0, index, torch.where(best, elements, LOWEST), "amax"
            )
            best &= elements == word[sums][step.segment]
        found.append(_first(step, best))
    return found


def _first(step: _Step, candidate: Tensor) -> Tensor:
    """The first candidate of every sum."""
    position = torch.arange(len(candidate), device=candidate.device)[:, None]
    index = step.segment[:, None].expand_as(candidate)
    ranked = torch.where(candidate, position, len(candidate))
    first = torch.full((step.sums, candidate.shape[1]), len(candidate), device=candidate.device)
    first = first.scatter_reduce(0, index, ranked, "amin")
    return first[step.segment] == position
