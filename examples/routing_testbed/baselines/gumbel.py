"""Gumbel top-k through a relaxation.

Legend: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import circuitroute as cr

NOISE = 0.25  # temperature of the Gumbel noise, that of the other methods


class GumbelTopKRouter(cr.Router):
    """The k largest of logits / temperature + Gumbel noise, with the gradient of a relaxation straight through.

    The relaxation is Xie and Ermon's (Reparameterizable subset sampling via continuous relaxations, IJCAI 2019):
    k successive softmaxes, each over what the ones before have left.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> cr.Routing:
        logits = self.logits(hidden)
        if not self.training:
            return cr.route(logits, self.circuit, combine=self.combine, training=False)
        noisy = logits / NOISE + gumbel_like(logits)
        k = self.circuit.max_count
        mask = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, noisy.topk(k, -1).indices, True)
        soft = _successive_softmaxes(noisy, k)

        def straight_through(mask: Tensor, distribution: cr.SubsetDistribution) -> Tensor:
            return mask + (soft - soft.detach())

        return cr.route(logits, self.circuit, combine=self.combine, replay=mask, estimator=straight_through)


def gumbel_like(logits: Tensor) -> Tensor:
    return -torch.empty_like(logits).exponential_().log()


def _successive_softmaxes(scores: Tensor, k: int) -> Tensor:
    """[T, E] that sums to k in every row; in float64, where 1 - share is not rounded to 0 too soon."""
    left, total = scores.double(), torch.zeros_like(scores, dtype=torch.float64)
    for _ in range(k):
        share = left.softmax(-1)
        total = total + share
        left = left + (1 - share).clamp(min=1e-300).log()
    return total.to(scores.dtype)
