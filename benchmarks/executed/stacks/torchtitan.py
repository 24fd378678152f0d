"""torchtitan's ``MoE`` layer by experts: its own, grouped matmuls in bfloat16, and a float32 loop over experts.

A fixed top-k is the stock layer. What executes only what was chosen is ``padding="auto"``; where every token pays it is
``padding="distinct"``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

import circuitroute as cr
from benchmarks.executed.settings import Layer, Setting
from circuitroute.integrations import torchtitan as adapter

PACKAGES = ("torchtitan",)
GROUPED, LOOP = "grouped_mm, bfloat16", "loop, float32"
WAYS = (GROUPED, LOOP)


class LoopedExperts(GroupedExperts):
    """The same function in the dtype of its input, expert by expert."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """The host's fields."""

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        rows = x_RD.split(num_tokens_per_expert_E.tolist())
        # Unbound at once: every index of its own would have a gradient of the size of all experts.
        each = zip(rows, self.w1_EFD.unbind(), self.w2_EDF.unbind(), self.w3_EFD.unbind(), strict=True)
        outputs = [(F.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t() for x, w1, w2, w3 in each]
        return torch.cat(outputs)


def build(way: str, setting: Setting) -> Layer:
    """The layer of torchtitan, converted unless it is stock."""
    sizes = setting.sizes
    experts = (GroupedExperts if way == GROUPED else LoopedExperts).Config(
        dim=sizes.hidden, hidden_dim=sizes.inner, num_experts=sizes.experts
    )
    config: Any = MoE.Config(
        num_experts=sizes.experts,
        router=TokenChoiceTopKRouter.Config(
            num_experts=sizes.experts,
            gate=Linear.Config(in_features=sizes.hidden, out_features=sizes.experts),
            top_k=sizes.k,
            score_func="softmax",
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=experts,
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=sizes.experts, top_k=sizes.k),
        ),
    )
    if setting.asked is not None:
        padding: adapter.Padding = "distinct" if setting.padded else "auto"
        config = adapter.circuit_moe(config, setting.constraint, decide="mode", padding=padding)
    layer = config.build()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.routed_experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        layer.router.gate.weight.copy_(setting.priced_router)

    def run(hidden: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # The stock router's, whose autocast CPUs do not have.
            warnings.filterwarnings("ignore", "In CPU autocast")
            output: Tensor = layer(hidden.unsqueeze(0))
        return output.view_as(hidden)

    def executed() -> float:
        if setting.asked is None:
            return float(sizes.k)
        with torch.no_grad(), adapter.recorded_routings(layer) as routings:
            layer.router(setting.hidden.unsqueeze(0))
        return float(cr.metrics.active_experts(routings[0]))

    return Layer(layer, run, executed)
