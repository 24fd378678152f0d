"""What deployed routers do: softmax, topk, gather. The yardstick of every ratio.

Shapes: T tokens, N variables, K largest count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Forward, Outputs, provider
from benchmarks.subset.workload import SubsetCase


@provider("subset", "topk")
def build(case: SubsetCase) -> Forward:
    """The K largest logits and their softmax weights; no distribution, hence nothing to check."""

    def forward(logits_TN: Tensor) -> Outputs:
        probs_TN = torch.softmax(logits_TN, dim=-1)
        indices_TK = logits_TN.topk(case.k, dim=-1).indices
        return Outputs(result=probs_TN.gather(-1, indices_TK))

    return forward
