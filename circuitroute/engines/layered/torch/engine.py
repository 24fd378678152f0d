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

from circuitroute.circuit.counting import has_definite_counts, split_by_count
from circuitroute.circuit.graph import Graph
from circuitroute.engines.layered.naive import NaiveLayered
from circuitroute.engines.layered.torch import sweep
from circuitroute.engines.layered.torch.plan import Plan, lay_out
from circuitroute.engines.layered.torch.unrolled import UnrolledMode
from circuitroute.engines.sweep import Inputs, Sweep, SweepEngine
from circuitroute.engines.tables import lasting


class TorchLayered(SweepEngine):
    """Eager torch inference for any smooth, decomposable, deterministic circuit; float32 for float32 logits.

    Args:
        graph: the circuit.
        max_count: K, the largest number of variables an allowed subset selects.
        drawn: the same circuit in the nodes that number a sample's uniforms, where these are others; see
            :mod:`circuitroute.engines.layered.definite`.
    """

    name = "torch"

    def __init__(self, graph: Graph, max_count: int, drawn: Graph | None = None) -> None:
        self._graph = graph
        self._drawn = graph if drawn is None else drawn
        self._max_count = max_count
        self._plans: dict[tuple[torch.device, bool], Plan] = {}
        self._ranked: dict[torch.device, UnrolledMode] = {}
        self.gives_counts = has_definite_counts(graph)
        self.naive = NaiveLayered(self._drawn, max_count if self.gives_counts else None)

    def _plan(self, device: torch.device, sampling: bool = False) -> Plan:
        at = device, sampling and self._drawn is not self._graph
        plan = self._plans.get(at)
        if plan is None:
            plan = lay_out(self._drawn if sampling else self._graph, device)
            if lasting():
                self._plans[at] = plan
        return plan

    def sweep(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        plan = self._plan(rows.logits.device, sampling=key_T is not None)
        return sweep.forward(plan, rows.logits, self._max_count + 1 if self.gives_counts else None, key_T, moments)

    def derivative(
        self, rows: Inputs, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        plan, J = self._plan(rows.logits.device), self._max_count + 1
        return sweep.second_derivative(plan, rows.logits, J, shift_T, u_TN, v_TJ)

    @torch.no_grad()
    def mode(self, logits_TN: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.LayeredEngine`."""
        device = logits_TN.device
        return sweep.mode(self._plan(device), lambda: self._by_rank(device), logits_TN)

    def _by_rank(self, device: torch.device) -> UnrolledMode:
        """What decides between equals, made when there are some."""
        if device not in self._ranked:
            self._ranked[device] = UnrolledMode(self._graph, portable=False).to(device)
        return self._ranked[device]

    def counting(self) -> TorchLayered:
        """See :class:`circuitroute.engines.base.LayeredEngine`: of the circuit's product with a counter."""
        return self if self.gives_counts else self._counter

    @cached_property
    def _counter(self) -> TorchLayered:
        return TorchLayered(split_by_count(self._drawn), self._max_count)
