"""Top-k routers, range routers and a budget router, one linear map per layer each.

Shapes: T tokens, L layers, H hidden size, N experts, K the largest count of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import circuitroute as cr
from benchmarks.budget.workload import HIDDEN, BudgetCase
from benchmarks.registry import Forward, Outputs, provider


def _keys(case: BudgetCase) -> list[Tensor]:
    return [cr.random_key(case.seed, layer, torch.arange(case.tokens)) for layer in range(case.layers)]


@provider("budget", "topk")
def build_topk(case: BudgetCase) -> Forward:
    """Softmax, topk, gather after each layer's linear map."""
    maps = [nn.Linear(HIDDEN, case.n, bias=False).to(case.device) for _ in range(case.layers)]

    def forward(hidden_LTH: Tensor) -> Outputs:
        weights = []
        for linear, hidden_TH in zip(maps, hidden_LTH, strict=True):
            logits_TN = linear(hidden_TH)
            weights.append(torch.softmax(logits_TN, -1).gather(-1, logits_TN.topk(case.k, dim=-1).indices))
        return Outputs(torch.stack(weights))

    return forward


@provider("budget", "range", note="no budget over the layers")
def build_range(case: BudgetCase) -> Forward:
    """``cr.DynamicKRouter`` in each layer."""
    routers = [cr.DynamicKRouter(HIDDEN, case.n, case.kmin, case.k).to(case.device) for _ in range(case.layers)]
    keys = _keys(case)

    def forward(hidden_LTH: Tensor) -> Outputs:
        routings = [route(hidden, key) for route, hidden, key in zip(routers, hidden_LTH, keys, strict=True)]
        return _outputs(routings)

    return forward


@provider("budget", "budget")
def build_budget(case: BudgetCase) -> Forward:
    """``cr.BudgetRouter`` over all layers."""
    per_layer, total = cr.Between(case.kmin, case.k), cr.AtMost(case.total)
    budget = cr.BudgetRouter(HIDDEN, case.n, case.layers, per_layer, total).to(case.device)
    keys = _keys(case)

    def forward(hidden_LTH: Tensor) -> Outputs:
        state, routings = budget.begin(hidden_LTH[0]), []
        for hidden, key in zip(hidden_LTH, keys, strict=True):
            routing, state = budget(hidden, state, key=key)
            routings.append(routing)
        return _outputs(routings, total=case.total)

    return forward


def _outputs(routings: list[cr.Routing], total: int | None = None) -> Outputs:
    counts_LT = torch.stack([routing.counts for routing in routings])
    engine = routings[0].distribution.circuit.engine_for(routings[0].logits.device)
    gates_LTN = torch.stack([routing.gates for routing in routings])
    return Outputs(gates_LTN, {"counts": counts_LT, "total": total}, about={"engine": engine})
