"""The engine ``torch`` of arbitrary circuits: batched eager tensor operations, any device.

Legend: T tokens, N variables, K the largest allowed count.

Per block of tokens: the literals as independent coins, the circuit's plan upward, the root weighed, the adjoint down
(:mod:`.sweep`). The values are probabilities, sums of products of positive terms without logarithms. Where all nodes
below the root have definite counts the coins are centred by a shift as on the count family's engine, and the posterior
of |S| comes along; other circuits take the coins as they are. The gradient of the marginals is dual numbers through the
same steps.

A block is recomputed when its gradient is asked for. Nothing is kept between, so memory is one value per node and
token of a single block, whatever the batch. For rows that float32 does not settle see
:mod:`circuitroute.engines.sweep`; there is no second centre to sweep around.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from circuitroute._validate import present
from circuitroute.circuit.counting import has_definite_counts, split_by_count
from circuitroute.circuit.graph import Graph
from circuitroute.engines.layered.naive import NaiveLayered
from circuitroute.engines.layered.torch import sweep
from circuitroute.engines.layered.torch.plan import Plan, lay_out
from circuitroute.engines.sweep import Inputs, Sweep, SweepEngine


class TorchLayered(SweepEngine):
    """Eager torch inference for any smooth, decomposable, deterministic circuit; float32 for float32 logits.

    Args:
        graph: the circuit.
        max_count: K, the largest number of variables an allowed subset selects.
    """

    name = "torch"

    def __init__(self, graph: Graph, max_count: int) -> None:
        self._graph = graph
        self._max_count = max_count
        self._plans: dict[torch.device, Plan] = {}
        self.gives_counts = has_definite_counts(graph)
        self.naive = NaiveLayered(graph, max_count if self.gives_counts else None)

    def _plan(self, device: torch.device) -> Plan:
        if device not in self._plans:
            self._plans[device] = lay_out(self._graph, device)
        return self._plans[device]

    def sweep(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        return sweep.forward(self._plan(rows.logits.device), rows.logits, self._max_count + 1, key_T, moments)

    def derivative(self, rows: Inputs, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None) -> tuple[Tensor, None]:
        """See :class:`circuitroute.engines.sweep.SweepEngine`; there is no potential to differentiate by."""
        return sweep.second_derivative(self._plan(rows.logits.device), rows.logits, shift_T, u_TN, v_TJ), None

    @torch.no_grad()
    def mode(self, logits_TN: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.LayeredEngine`."""
        return sweep.mode(self._plan(logits_TN.device), logits_TN)

    def count_probs(self, logits_TN: Tensor, K: int) -> Tensor:
        """[T, K + 1] P(|S| = j), differentiable, for circuits whose nodes have no definite counts.

        From the product of the circuit with a counter, which is made on first use.
        """
        counter = self._counter
        probs = counter.infer(logits_TN.detach(), None)
        if torch.is_grad_enabled() and logits_TN.requires_grad:
            probs = counter.attach(probs, logits_TN, None)
        return present(probs.count_probs, "nodes split by their count have definite counts")

    @cached_property
    def _counter(self) -> TorchLayered:
        return TorchLayered(split_by_count(self._graph), self._max_count)
