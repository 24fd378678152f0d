"""The truth, where all subsets can be listed."""

from __future__ import annotations

from torch import Tensor

import circuitroute as cr

from .interface import Loss


class Enumeration:
    """E[loss(z)] as the sum over all subsets that it is: no estimate, and as many evaluations as there are subsets."""

    def __init__(self, circuit: cr.Circuit) -> None:
        self.circuit = circuit

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int = 0) -> Tensor:
        distribution = self.circuit(logits)
        masks = distribution.enumerate_support()
        return (distribution.log_prob(masks).exp() * loss(masks)).sum(0).mean()
