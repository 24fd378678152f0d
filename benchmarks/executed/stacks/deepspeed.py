"""DeepSpeed's ``MoE`` layer without a capacity factor; a fixed top-k is the stock layer.

Every expert computes as many rows as the one with the largest load. What takes no rows for unused routes is the
converted gate; where every token pays, it routes them to experts that the token did not choose, with weight 0.
"""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.executed.settings import Layer, Setting
from circuitroute.integrations import deepspeed as adapter
from circuitroute.routing.decision import chosen_first

PACKAGES = ("deepspeed",)
WAYS = ("MoE",)


class Expert(nn.Module):
    """Two linear maps, as in ``cr.StackedExperts``."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return output


class PaddedGate(adapter.CircuitGate):
    """All K routes of every token are taken, those that it does not use at weight 0: the next ones by logit."""

    def forward(self, input: Tensor, *args: Any) -> tuple[Any, ...]:
        balance, _, experts, ids_KT, _, weights_KT, load = super().forward(input, *args)
        ids_TK = ids_KT.t().long()
        spare_TE = ids_TK.new_zeros(len(ids_TK), experts + 1, dtype=torch.bool)
        chosen_TE = spare_TE.scatter(1, ids_TK % (experts + 1), True)[:, :experts]
        padded_TK = torch.where(ids_TK < 0, chosen_first(chosen_TE, input @ self.wg.weight.t(), self.k), ids_TK)
        taken_TE = spare_TE[:, :experts].scatter(1, padded_TK, True)
        rows_KT = (taken_TE.cumsum(0) - 1).gather(1, padded_TK).t().contiguous().int()
        return balance, taken_TE.sum(0).max(), experts, padded_TK.t().contiguous().int(), rows_KT, weights_KT, load


def build(way: str, setting: Setting) -> Layer:
    """The layer, converted unless it is stock."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    sizes = setting.sizes
    torch.manual_seed(0)
    layer = MoE(
        sizes.hidden,
        Expert(sizes.hidden, sizes.inner),
        num_experts=sizes.experts,
        k=sizes.k,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
    )
    gate = layer.deepspeed_moe.gate
    with torch.no_grad():
        for expert in layer.deepspeed_moe.experts.parameters():
            expert.normal_(std=expert.shape[-1] ** -0.5)
        gate.wg.weight.copy_(setting.priced_router)
    if setting.asked is not None:
        adapter.convert(layer, setting.constraint, decide="mode")
        if setting.padded:
            gate.__class__ = PaddedGate
    load: list[Tensor] = []

    def run(hidden: Tensor) -> Tensor:
        output: Tensor
        output, _, counts = layer(hidden)
        load[:] = [counts]
        return output

    def executed() -> float:
        return float(load[0].sum()) / sizes.tokens

    return Layer(layer, run, executed)
