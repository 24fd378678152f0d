"""Default MoE (Panda et al. 2025, arXiv:2504.12463): experts that were not chosen are stood in for by a mean of theirs.

Legend: T tokens, H hidden size, E experts, S chosen (token, expert) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

import circuitroute as cr

from ..student import Student

DECAY = 0.9  # the paper's with 8 experts


class DefaultStudent(Student):
    """y = sum_e p_e (f_e(x) where e is chosen, else m_e), p the softmax over all experts (eq. 11), in value too.

    m_e is an exponential moving average of the mean output of e over the tokens that chose it (eq. 10). It starts at 0,
    is updated by the step's outputs before it is used, keeps its value where no token chose e, and carries no gradient;
    so the experts' gradient is that of top-k, and the router's sees all of them. In evaluation it stays as it is.
    """

    def __init__(self, moe: cr.MoE, decay: float = DECAY) -> None:
        super().__init__(moe)
        self._decay = decay
        self.defaults = torch.zeros(moe.num_experts, self.router.hidden_size)

    def forward(self, hidden: Tensor, key: Tensor) -> tuple[Tensor, cr.Routing]:
        routing = self.router(hidden, key=key)
        token, expert, weight = routing.ragged(by="expert")
        experts = self.moe.experts
        assert isinstance(experts, cr.StackedExperts)
        outputs = experts(hidden[token], routing.mask.sum(0).tolist())
        if self.training:
            self._follow(outputs.detach(), expert)
        unchosen = routing.logits.softmax(-1).masked_fill(routing.mask, 0.0)
        return (unchosen @ self.defaults).index_add(0, token, outputs * weight[:, None]), routing

    def _follow(self, outputs: Tensor, expert: Tensor) -> None:
        """Moves the defaults towards the means of outputs [S, H]."""
        load = expert.bincount(minlength=len(self.defaults))[:, None]
        mean = torch.zeros_like(self.defaults).index_add(0, expert, outputs) / load.clamp(min=1)
        moved = self._decay * self.defaults + (1 - self._decay) * mean
        self.defaults = torch.where(load > 0, moved, self.defaults)
