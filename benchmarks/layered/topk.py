"""The yardstick of every ratio: softmax, topk, gather, without any distribution.

Shapes: T tokens, N variables, K largest count (8 where the constraint allows more).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.layered.workload import LayeredCase
from benchmarks.registry import Forward, Outputs, provider


@provider("layered", "topk")
def build(case: LayeredCase) -> Forward:
    """The 8 largest logits and their softmax weights, summed."""

    def forward(logits_TN: Tensor) -> Outputs:
        probs_TN = torch.softmax(logits_TN, dim=-1)
        indices_TK = logits_TN.topk(min(8, case.n), dim=-1).indices
        return Outputs(result=probs_TN.gather(-1, indices_TK).sum(-1))

    return forward
