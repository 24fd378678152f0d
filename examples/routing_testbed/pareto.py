"""Error against executed experts: methods that take a number of experts that varies, at several budgets.

A budget is a mean number of experts per token and layer. What a method is asked for and what it executes in evaluation
may differ; it is compared with top-k at what it executes, between top-k's own whole numbers along straight lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import circuitroute as cr

from .layered_student import BudgetStudent, LayeredStudent, PricedStudent, SoftStudent
from .layered_task import EXPERTS, LAYERED, SPLITS, LayeredBatch, LayeredTask
from .measures import normalised_error
from .setting import LEAST, MOST, Setting
from .training import Row, keys, one_thread

Build = Callable[[str, float, Setting], LayeredStudent]
LAYERS = 4
COLD = 0.25  # the temperature of all methods that have one
SPLIT_RATE = 10.0  # times the learning rate, of a learned split, which would hardly move at that of the weights
CAP_FACTOR = 2.0  # SoftMoE's
CALIBRATE_EVERY, CALIBRATE_ON = 10, 4  # steps; batches before evaluation


def top_k(split: str, budget: float, setting: Setting) -> LayeredStudent:
    return LayeredStudent(_layers(setting, lambda: cr.TopKRouter(setting.hidden, EXPERTS, int(budget))))


def range_k(
    split: str, budget: float, setting: Setting, probes: Any = 0, held: str = "together", **options: Any
) -> LayeredStudent:
    """A price for all layers together, or one for each: with the same target, or that of the teacher's layer."""
    teacher = [mean * budget * LAYERS / sum(SPLITS[split]) for mean in SPLITS[split]]
    targets = {"together": [budget], "alike": [budget] * LAYERS, "as the teacher": teacher}[held]
    layers = _layers(
        setting,
        lambda: cr.DynamicKRouter(setting.hidden, EXPERTS, LEAST, MOST, **{"temperature": COLD, **options}),
        probes=probes,
    )
    return PricedStudent(layers).hold(targets)


def budgeted(split: str, budget: float, setting: Setting, fast: bool = False, **options: Any) -> LayeredStudent:
    """One total; ``fast`` if preferences and estimates are to learn at the rate of a learned split."""
    per_layer, total = cr.Between(LEAST, MOST), cr.AtMost(round(budget * LAYERS))
    layers = _layers(setting, lambda: cr.DynamicKRouter(setting.hidden, EXPERTS, LEAST, MOST))
    router = cr.BudgetRouter(setting.hidden, EXPERTS, LAYERS, per_layer, total, temperature=COLD, **options)
    for number, layer in enumerate(layers):  # the initial weights of the other methods
        assert layer.router is not None
        router.router(number).load_state_dict(layer.router.state_dict())
        layer.router = None
    return BudgetStudent(layers, router, fast)


def soft(
    split: str, budget: float, setting: Setting, learned: bool = False, calibrated: bool = False, **options: Any
) -> LayeredStudent:
    def router() -> cr.SoftTopKRouter:
        if calibrated:
            return cr.SoftTopKRouter(setting.hidden, EXPERTS, budget, threshold=0.5, **options)
        return cr.SoftTopKRouter.softmoe(setting.hidden, EXPERTS, budget, **{"cap_factor": CAP_FACTOR, **options})

    allocation = cr.LayerAllocation(LAYERS, LAYERS * budget, LEAST, MOST) if learned else None
    return SoftStudent(_layers(setting, router), budget, allocation, calibrated)


def soft_fixed(split: str, budget: float, setting: Setting) -> LayeredStudent:
    """Soft weights on a number of experts that does not vary: the k largest, always."""
    k = int(budget)
    layers = _layers(setting, lambda: cr.SoftTopKRouter(setting.hidden, EXPERTS, k, threshold=0.0, max_experts=k))
    return SoftStudent(layers, budget, allocation=None, calibrated=False)


def _layers(setting: Setting, router: Callable[[], Any], **options: Any) -> list[cr.MoE]:
    return [
        cr.MoE(router(), cr.StackedExperts(EXPERTS, setting.hidden, setting.inner), **options) for _ in range(LAYERS)
    ]


BUDGETS = (1.5, 2.0, 2.5, 3.0)
BASELINE = "top-k"
METHODS: dict[str, tuple[Build, Sequence[float]]] = {
    BASELINE: (top_k, (1.0, 2.0, 3.0, 4.0)),
    "range-sampled": (range_k, BUDGETS),
    "range-mode": (partial(range_k, decide="mode"), BUDGETS),
    "range-probe": (partial(range_k, decide="mode", probes=1), BUDGETS),
    "budget-sampled": (budgeted, BUDGETS),
    "budget-mode": (partial(budgeted, decide="mode"), BUDGETS),
    "softmoe": (soft, BUDGETS),
    "softmoe-learned": (partial(soft, learned=True), BUDGETS),
    "calibrated": (partial(soft, calibrated=True), BUDGETS),
    "calibrated-learned": (partial(soft, calibrated=True, learned=True), BUDGETS),
    "range-marginal": (partial(range_k, decide="mode", combine="marginal", temperature=1.0), BUDGETS),
    "range-marginal, cold": (partial(range_k, decide="mode", combine="marginal"), (2.5,)),
    "soft-fixed": (soft_fixed, (2.0, 3.0)),
    "calibrated, softmax": (partial(soft, calibrated=True, combine="softmax"), (2.5,)),
    "budget-mode, fast": (partial(budgeted, decide="mode", fast=True), (2.5,)),
    "range-mode, alike": (partial(range_k, decide="mode", held="alike"), (2.5,)),
    "range-mode, teacher's": (partial(range_k, decide="mode", held="as the teacher"), (2.5,)),
}
# With the second teacher only the methods that divide a budget, at one of them, and what they are compared with.
DIVIDING = ("range-sampled", "range-mode", "range-probe", "budget-sampled", "budget-mode")
FALLING: dict[str, Sequence[float]] = {
    BASELINE: (2.0, 3.0),
    **dict.fromkeys((*DIVIDING, "softmoe-learned", "calibrated-learned"), (2.5,)),
}


def jobs(seeds: int, setting: Setting) -> list[Callable[[], list[Row]]]:
    """What there is to do, a method with all its budgets at a time."""
    chosen: dict[str, dict[str, Sequence[float]]] = {
        "rising": {name: budgets for name, (_, budgets) in METHODS.items()},
        "falling": FALLING,
    }
    return [
        partial(run, split, name, budgets, seed, setting)
        for split, methods in chosen.items()
        for seed in range(seeds)
        for name, budgets in methods.items()
    ]


@one_thread()
def run(split: str, name: str, budgets: Sequence[float], seed: int, setting: Setting = LAYERED) -> list[Row]:
    """A row for each budget."""
    task = LayeredTask(split, setting, seed)
    batches, held_out = list(task.batches()), task.held_out()
    build, _ = METHODS[name]
    rows = []
    for budget in budgets:
        torch.manual_seed(seed)
        student = build(split, budget, setting).train()
        _train(student, task, batches)
        found = {"table": "pareto", "shape": split, "method": name, "budget": budget, "seed": seed}
        rows.append({**found, "steps": len(batches), **_measure(student, task, batches, held_out)})
    return rows


def _train(student: LayeredStudent, task: LayeredTask, batches: Sequence[LayeredBatch]) -> None:
    splitting = {id(parameter) for parameter in student.splitting()}
    weights = [parameter for parameter in student.parameters() if id(parameter) not in splitting]
    rate = task.setting.rate
    groups = [{"params": weights, "lr": rate}, {"params": student.splitting(), "lr": SPLIT_RATE * rate}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / len(batches))) / 2
    )
    for step, batch in enumerate(batches):
        if step % CALIBRATE_EVERY == 0:
            student.calibrate(batch.hidden)
        output, routings = student(batch.hidden, keys(task.seed, step, len(batch.hidden)))
        loss = normalised_error(output, batch.target) + student.more_loss(routings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        student.after(routings)


@torch.no_grad()
def _measure(
    student: LayeredStudent, task: LayeredTask, batches: Sequence[LayeredBatch], held_out: LayeredBatch
) -> dict[str, Any]:
    """Error, experts executed per token and layer, and the same layer by layer, the student's and the teacher's."""
    student.calibrate(torch.cat([batch.hidden for batch in batches[-CALIBRATE_ON:]]))
    student.eval()
    output, routings = student(held_out.hidden, keys(task.seed, len(batches), len(held_out.hidden)))
    counts = torch.stack([routing.counts for routing in routings], -1).double()
    return {
        "error": normalised_error(output, held_out.target).item(),
        "executed": counts.mean().item(),
        "layers": counts.mean(0).tolist(),
        "teacher_layers": held_out.counts.double().mean(0).tolist(),
        "count_correlation": _correlation(counts.sum(-1), held_out.counts.double().sum(-1)),
    }


def _correlation(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Over tokens; None where one of the two is constant."""
    if not (one.std() > 0 and other.std() > 0):
        return None
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])
