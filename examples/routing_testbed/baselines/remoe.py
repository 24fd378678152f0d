"""ReMoE (Wang, Zhu and Chen, ICLR 2025, arXiv:2412.14711): ReLU for a router, with a price on its outputs.

Legend: T tokens, E experts; k the mean number of experts per token that is aimed at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import circuitroute as cr

from ..student import Student
from ..task import Batch

FIRST, FACTOR = 1e-8, 1.2  # the paper's lambda_0 and alpha, in all its experiments


class ReMoERouter(cr.Router):
    """Every expert whose logit is positive, weighted by the logit (eq. 5); none is normalised, and none may be left.

    The same in training and evaluation. The constraint has to allow every subset.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> cr.Routing:
        logits = self.logits(hidden)
        gates = logits.relu()
        return cr.Routing(self.circuit(logits), gates > 0, gates)


class ReMoEStudent(Student):
    """The L1 norm of the gates in the loss, each expert's in proportion to its load (eq. 10 and 11), with a coefficient
    that grows or shrinks by a factor after every step until k experts are used on average (eq. 7 and 8)."""

    def __init__(self, moe: cr.MoE, k: float, first: float = FIRST, factor: float = FACTOR) -> None:
        super().__init__(moe)
        self._share, self.coefficient, self._factor = k / moe.num_experts, first, factor

    def penalty(self, routing: cr.Routing, batch: Batch) -> Tensor:
        load = routing.mask.float().mean(0) / self._share
        return self.coefficient * (load * routing.gates).sum(-1).mean()

    def after(self, routing: cr.Routing) -> None:
        too_many = routing.mask.float().mean().double() - self._share  # the sparsity aimed at, less that found
        self.coefficient *= self._factor ** float(torch.sign(too_many))
