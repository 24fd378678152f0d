"""Balance: a bias that follows the loads, and balance losses over the batch or over parts of it.

Legend: T tokens, E experts, J micro-batches.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import circuitroute as cr

from ..student import Student
from ..task import Batch

BIAS_STEP = 1e-3  # what Wang et al. use
WEIGHT = 1e-2  # Switch Transformer's
MICRO_BATCHES = 8  # of 64 tokens


class LossFreeStudent(Student):
    """Auxiliary-loss-free balancing (Wang et al. 2024, arXiv:2408.15664): a bias on the choice, moved by the sign of
    what an expert lacks of the mean load."""

    def __init__(self, moe: cr.MoE, step: float = BIAS_STEP) -> None:
        super().__init__(moe)
        self._bias, self._step = torch.zeros(moe.num_experts), step

    def options(self) -> dict[str, Any]:
        return {"bias": self._bias}

    def after(self, routing: cr.Routing) -> None:
        load = routing.mask.sum(0).float()
        self._bias = self._bias + self._step * (load.mean() - load).sign()


class BalancedStudent(Student):
    """Switch Transformer's loss (Fedus et al. 2021, eq. 4) over the whole batch, from softmax or exact marginals.

    With the softmax this is the global-batch loss of Qiu et al. (2025, arXiv:2501.11873, eq. 4): their batch is spread
    over processes, which exchange how often each expert was chosen; here there is one.
    """

    def __init__(
        self, moe: cr.MoE, probabilities: Literal["marginal", "softmax"] = "softmax", weight: float = WEIGHT
    ) -> None:
        super().__init__(moe)
        self._probabilities, self._weight = probabilities, weight

    def penalty(self, routing: cr.Routing, batch: Batch) -> Tensor:
        return self._weight * cr.losses.load_balance(routing, self._probabilities)


class MicroBatchStudent(Student):
    """The same loss, with the frequencies of each micro-batch alone (Qiu et al., eq. 3), or ``buffered``: those of the
    micro-batches of this step so far (their algorithm 1, which approaches the global batch's by the last one).

    Micro-batches are packed by domain where there are domains, as theirs are; the loss is the mean over them.
    """

    def __init__(self, moe: cr.MoE, buffered: bool = False, weight: float = WEIGHT) -> None:
        super().__init__(moe)
        self._buffered, self._weight = buffered, weight

    def penalty(self, routing: cr.Routing, batch: Batch) -> Tensor:
        order = torch.arange(len(routing.mask)) if batch.domain is None else batch.domain.argsort(stable=True)
        load = _per_micro_batch(routing.mask[order].float())
        mass = _per_micro_batch(routing.logits[order].softmax(-1))
        return self._weight * cr.losses.balance(load.cumsum(0) if self._buffered else load, mass).mean()


def _per_micro_batch(values: Tensor) -> Tensor:
    """[J, E], the sums of [T, E] over the tokens of each."""
    return values.reshape(MICRO_BATCHES, -1, values.shape[-1]).sum(1)
