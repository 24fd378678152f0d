"""The library's own layer: ``cr.MoE`` around modules, and around stacked experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import circuitroute as cr
from benchmarks.executed.settings import Layer, Setting

PACKAGES = ()
MODULES, STACKED = "modules", "StackedExperts"
WAYS = (MODULES, STACKED)


class PaddedMoE(cr.MoE):
    """The same with every token paying for as many experts as a token may have, those it does not use at weight 0."""

    def _dispatched(self, rows: Tensor, routing: cr.Routing) -> Tensor:
        weights, indices = routing.padded(pad="distinct")
        expert, order = indices.reshape(-1).sort(stable=True)
        token = order // indices.shape[1]
        outputs = self._run(rows.index_select(0, token), self._loads(expert))
        weighted = outputs * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(rows).index_add(0, token, weighted)


def build(way: str, setting: Setting) -> Layer:
    """The layer; a fixed top-k is ``cr.TopKRouter``."""
    sizes = setting.sizes
    torch.manual_seed(0)
    router = _router(setting)
    with torch.no_grad():
        router.weight.copy_(setting.priced_router)
    experts = (
        cr.StackedExperts(sizes.experts, sizes.hidden, sizes.inner)
        if way == STACKED
        else [
            nn.Sequential(
                nn.Linear(sizes.hidden, sizes.inner, bias=False),
                nn.GELU(),
                nn.Linear(sizes.inner, sizes.hidden, bias=False),
            )
            for _ in range(sizes.experts)
        ]
    )
    layer = (PaddedMoE if setting.padded else cr.MoE)(router, experts)
    last: list[cr.Routing] = []

    def run(hidden: Tensor) -> Tensor:
        output, routing = layer(hidden)
        last[:] = [routing]
        return output

    return Layer(layer, run, lambda: cr.metrics.active_experts(last[0]))


def _router(setting: Setting) -> cr.Router:
    sizes = setting.sizes
    if setting.asked is None:
        return cr.TopKRouter(sizes.hidden, sizes.experts, sizes.k)
    return cr.Router(sizes.hidden, sizes.experts, setting.constraint, decide="mode")
