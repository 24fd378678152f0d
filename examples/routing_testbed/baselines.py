"""Methods that the library does not have, to compare with.

Legend: T tokens, H hidden size, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import circuitroute as cr

from .student import Student

NOISE = 0.25  # temperature of the Gumbel noise, that of the other methods
BIAS_STEP = 1e-3  # what Wang et al. use


class GumbelTopKRouter(cr.Router):
    """The k largest of logits / temperature + Gumbel noise, with the gradient of a relaxation straight through.

    The relaxation is Xie and Ermon's (Reparameterizable subset sampling via continuous relaxations, IJCAI 2019):
    k successive softmaxes, each over what the ones before have left.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> cr.Routing:
        logits = self.logits(hidden)
        if not self.training:
            return cr.route(logits, self.circuit, combine=self.combine, training=False)
        noisy = logits / NOISE + _gumbel_like(logits)
        k = self.circuit.max_count
        mask = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, noisy.topk(k, -1).indices, True)
        soft = _successive_softmaxes(noisy, k)

        def straight_through(mask: Tensor, distribution: cr.SubsetDistribution) -> Tensor:
            return mask + (soft - soft.detach())

        return cr.route(logits, self.circuit, combine=self.combine, replay=mask, estimator=straight_through)


def _gumbel_like(logits: Tensor) -> Tensor:
    return -torch.empty_like(logits).exponential_().log()


def _successive_softmaxes(scores: Tensor, k: int) -> Tensor:
    """[T, E] that sums to k in every row; in float64, where 1 - share is not rounded to 0 too soon."""
    left, total = scores.double(), torch.zeros_like(scores, dtype=torch.float64)
    for _ in range(k):
        share = left.softmax(-1)
        total = total + share
        left = left + (1 - share).clamp(min=1e-300).log()
    return total.to(scores.dtype)


class RandomRouter(cr.Router):
    """A uniformly random subset that depends on nothing but the bits of the token, the same whenever it returns.

    The weights of the chosen experts are learned, which ones they are is not.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> cr.Routing:
        logits = self.logits(hidden)
        key = cr.random_key(0, *hidden.detach()[:, :4].contiguous().view(torch.int32).long().unbind(-1))
        mask = self.circuit(torch.zeros_like(logits)).sample(key=key) != 0
        return cr.route(logits, self.circuit, combine=self.combine, replay=mask, estimator="none")


class LossFreeStudent(Student):
    """Auxiliary-loss-free balancing (Wang et al. 2024, arXiv:2408.15664): a bias on the choice, moved by the sign of
    what an expert lacks of the mean load."""

    def __init__(self, moe: cr.MoE) -> None:
        super().__init__(moe)
        self._bias = torch.zeros(moe.num_experts)

    def options(self) -> dict[str, Any]:
        return {"bias": self._bias}

    def after(self, routing: cr.Routing) -> None:
        load = routing.mask.sum(0).float()
        self._bias = self._bias + BIAS_STEP * (load.mean() - load).sign()


class UniformProbeStudent(Student):
    """One unchosen expert per token, each as likely as the others, instead of in proportion to the exact marginals.

    Importance weights make it, too, an unbiased estimate of the gradient that sees all experts: they are E - k.
    """

    def forward(self, hidden: Tensor, key: Tensor) -> tuple[Tensor, cr.Routing]:
        output, routing = super().forward(hidden, key)
        if self.training:
            output = output + self._probed(hidden, routing)
        return output, routing

    def _probed(self, hidden: Tensor, routing: cr.Routing) -> Tensor:
        """[T, H] of zeros, with the gradient of the gates."""
        expert = (~routing.mask).double().multinomial(1)[:, 0]
        token = expert.argsort()
        experts = self.moe.experts
        assert isinstance(experts, cr.StackedExperts)
        with torch.no_grad():
            loads = expert.bincount(minlength=self.moe.num_experts).tolist()
            outputs = experts(hidden[token], loads)
        gates = routing.gates[token, expert[token]] * (~routing.mask[token]).sum(-1)
        return torch.zeros_like(hidden).index_add(0, token, outputs * gates[:, None])
