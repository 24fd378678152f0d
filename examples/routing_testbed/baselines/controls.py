"""What a method has to beat: a choice that is not learned, and probes that are not drawn by the marginals.

Legend: T tokens, H hidden size, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import circuitroute as cr

from ..student import Student


class RandomRouter(cr.Router):
    """A uniformly random subset that depends on nothing but the bits of the token, the same whenever it returns.

    The weights of the chosen experts are learned, which ones they are is not.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> cr.Routing:
        logits = self.logits(hidden)
        key = cr.random_key(0, *hidden.detach()[:, :4].contiguous().view(torch.int32).long().unbind(-1))
        mask = self.circuit(torch.zeros_like(logits)).sample(key=key) != 0
        return cr.route(logits, self.circuit, combine=self.combine, replay=mask, estimator="none")


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
