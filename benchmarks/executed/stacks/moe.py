"""The library's own layer: ``cr.MoE`` around modules, around stacked experts, and around these with null experts.

With null experts every token has k choices, of which those among the null experts cost nothing. k - 1 of them, all with
the price as their logit, make exactly k the same choice of experts as the range has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import circuitroute as cr
from benchmarks.executed.settings import LEAST, Layer, Setting

PACKAGES = ()
MODULES, STACKED, NULL = "modules", "StackedExperts", "null experts"
WAYS = (MODULES, STACKED, NULL)


class PaddedMoE(cr.MoE):
    """The same with every token paying for as many experts as a token may have, those it does not use at weight 0."""

    def _dispatched(self, rows: Tensor, routing: cr.Routing) -> Tensor:
        weights, indices = routing.padded(pad="distinct")
        expert, order = indices.reshape(-1).sort(stable=True)
        token = order // indices.shape[1]
        outputs = self._run(rows.index_select(0, token), self._loads(expert)[0])
        weighted = outputs * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(rows).index_add(0, token, weighted)


def build(way: str, setting: Setting) -> Layer | None:
    """The layer; a fixed top-k is ``cr.TopKRouter``. Null experts need no padding."""
    if way == NULL and setting.padded:
        return None
    torch.manual_seed(0)
    experts = _modules(setting) if way == MODULES else _stacked(setting)
    if way == NULL and setting.asked is not None:
        layer = cr.MoE(_router_with_null_experts(setting), experts, null_experts="identity")
    else:
        layer = (PaddedMoE if setting.padded else cr.MoE)(_router(setting), experts)
    last: list[cr.Routing] = []

    def run(hidden: Tensor) -> Tensor:
        output, routing = layer(hidden)
        last[:] = [routing]
        return output

    return Layer(layer, run, lambda: float(layer.executed_counts(last[0]).double().mean()))


def _modules(setting: Setting) -> list[nn.Module]:
    sizes = setting.sizes
    up = [nn.Linear(sizes.hidden, sizes.inner, bias=False) for _ in range(sizes.experts)]
    down = [nn.Linear(sizes.inner, sizes.hidden, bias=False) for _ in range(sizes.experts)]
    return [nn.Sequential(first, nn.GELU(), second) for first, second in zip(up, down, strict=True)]


def _stacked(setting: Setting) -> cr.StackedExperts:
    return cr.StackedExperts(setting.sizes.experts, setting.sizes.hidden, setting.sizes.inner)


@torch.no_grad()
def _router(setting: Setting) -> cr.Router:
    sizes = setting.sizes
    if setting.asked is None:
        router: cr.Router = cr.TopKRouter(sizes.hidden, sizes.experts, sizes.k)
    else:
        router = cr.Router(sizes.hidden, sizes.experts, setting.constraint, decide="mode")
    router.weight.copy_(setting.priced_router)
    return router


@torch.no_grad()
def _router_with_null_experts(setting: Setting) -> cr.Router:
    sizes = setting.sizes
    null = sizes.k - LEAST
    router = cr.Router(sizes.hidden, sizes.experts + null, cr.Exactly(sizes.k), decide="mode")
    router.weight.zero_()
    router.weight[: sizes.experts] = setting.router
    router.weight[sizes.experts :, 0] = setting.price
    return router
