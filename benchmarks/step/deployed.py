"""What deployed routers do, written in torch: the yardstick.

Shapes: T tokens, N experts, K largest count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Forward, Outputs, provider
from benchmarks.subset.workload import SubsetCase


def top_k(logits_TN: Tensor, k: int) -> Tensor:
    """[T, K] softmax, topk, gather, and the weights over their sum."""
    probs_TN = torch.softmax(logits_TN, dim=-1)
    indices_TK = logits_TN.topk(k, dim=-1).indices
    weights_TK = probs_TN.gather(-1, indices_TK)
    return weights_TK / weights_TK.sum(-1, keepdim=True)


@provider("step", "deployed")
def build(case: SubsetCase) -> Forward:
    """With its gradient."""
    return lambda logits_TN: Outputs(top_k(logits_TN, case.k))


@provider("evaluation", "deployed")
def build_evaluation(case: SubsetCase) -> Forward:
    """Without."""

    @torch.no_grad()
    def forward(logits_TN: Tensor) -> Outputs:
        return Outputs(top_k(logits_TN, case.k))

    return forward
