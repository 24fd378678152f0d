"""GRIN's SparseMixer-v2 (Liu et al. 2024, arXiv:2409.12136, appendix A): sampled experts, Heun's third-order method.

Legend: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import circuitroute as cr

from .gumbel import gumbel_like

SPREAD = 0.01  # r of the paper, the router's jitter in its configuration
WHOLE = 0.25  # how often the output keeps its size, where the expert is not the likeliest


class GrinRouter(cr.Router):
    """k experts, drawn one after the other from the masked softmax of what is left; in evaluation its mode.

    The weight of an expert is its masked softmax p. Where it is not the likeliest, its output counts a third in value
    three times in four, and in full in the gradient of p: f(h) - f(0) is (f'(h) + 3 f'(h / 3)) h / 4 by Heun's method.
    As in the authors' code the experts' own gradient is that of the value.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> cr.Routing:
        logits = self.logits(hidden)
        mask, gates = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits)
        for _draw in range(self.circuit.max_count):
            share = masked_softmax(logits, mask)
            best = share.argmax(-1, keepdim=True)
            chosen = (share.log() + gumbel_like(share)).argmax(-1, keepdim=True) if self.training else best
            weight = share.gather(-1, chosen)
            size = torch.ones_like(weight)
            if self.training:
                size = torch.where((chosen == best) | (torch.rand_like(weight) < WHOLE), 1.0, 1 / 3)
            gates = gates.scatter(-1, chosen, weight + (size * weight - weight).detach())
            mask = mask.scatter(-1, chosen, True)
        return cr.Routing(self.circuit(logits), mask, gates)


def masked_softmax(logits: Tensor, taken: Tensor) -> Tensor:
    """[T, E], over the experts that are not taken and whose logit is close to the largest of those (eq. 2).

    Close: within 2 r of it, relative to the larger of its value and their own size. That is how the authors'
    code reads the paper's r (|z_e| + |z_max|).
    """
    left = logits.detach().masked_fill(taken, -torch.inf)
    largest = left.amax(-1, keepdim=True)
    close = largest - left <= 2 * SPREAD * torch.maximum(logits.detach().abs(), largest)
    return logits.masked_fill(taken | ~close, -torch.inf).softmax(-1)
