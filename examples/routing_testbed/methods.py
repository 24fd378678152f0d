"""The methods that are compared: a router, what it runs besides, and what is adjusted after a step.

Legend: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import circuitroute as cr

from .baselines import (
    BalancedStudent,
    DefaultStudent,
    GrinRouter,
    GumbelTopKRouter,
    LossFreeStudent,
    MicroBatchStudent,
    RandomRouter,
    ReMoERouter,
    ReMoEStudent,
    UniformProbeStudent,
)
from .setting import LEAST, MOST, THOROUGH, VARIABLE, Setting, Shape
from .student import RangeStudent, Student

Build = Callable[[Shape, Setting], Student]
Kind = Callable[[cr.MoE], Student]  # what a layer becomes

COLD = 0.25  # the temperature of all methods that do not say another
CAP = 4.0  # the largest weight of a probe, where it is capped


def top_k(shape: Shape, setting: Setting, k: int | None = None, kind: Kind = Student) -> Student:
    return _student(cr.TopKRouter(setting.hidden, shape.experts, k or shape.count), setting, kind)


def exact_k(
    shape: Shape,
    setting: Setting,
    kind: Kind = Student,
    probes: Any = 0,
    probe_weights: Any = "importance",
    temperature: float = COLD,
    **options: Any,
) -> Student:
    router = cr.ExactKRouter(setting.hidden, shape.experts, shape.count, temperature=temperature, **options)
    return _student(router, setting, kind, probes=probes, probe_weights=probe_weights)


def range_k(shape: Shape, setting: Setting, probes: Any = 0, **options: Any) -> Student:
    router = cr.DynamicKRouter(setting.hidden, shape.experts, LEAST, MOST, temperature=COLD, **options)
    student = _student(router, setting, RangeStudent, probes=probes)
    assert isinstance(student, RangeStudent)
    student.hold(shape.k)
    return student


def frozen(shape: Shape, setting: Setting) -> Student:
    student = top_k(shape, setting)
    student.router.weight.requires_grad_(False)
    return student


def remoe(shape: Shape, setting: Setting, kind: Callable[..., Student] = ReMoEStudent) -> Student:
    # Inputs are symmetric about 0: of the logits without a bias half would be positive, whatever the weights.
    router = ReMoERouter(setting.hidden, shape.experts, cr.AtMost(shape.experts), bias=True)
    return _student(router, setting, partial(kind, k=shape.k))


def of_router(router: type[cr.Router], shape: Shape, setting: Setting) -> Student:
    return _student(router(setting.hidden, shape.experts, cr.Exactly(shape.count)), setting)


def _student(router: cr.Router, setting: Setting, kind: Kind = Student, **options: Any) -> Student:
    experts = cr.StackedExperts(router.num_experts, setting.hidden, setting.inner)
    return kind(cr.MoE(router, experts, **options))


_mode = partial(exact_k, decide="mode")
METHODS: dict[str, Build] = {
    "top-k": top_k,
    "sampled-1": partial(exact_k, temperature=1.0),
    "sampled-1/4": exact_k,
    "sampled-1/8": partial(exact_k, temperature=1 / 8),
    "mode": _mode,
    "mode-10%": partial(exact_k, decide=0.1),
    "probe": partial(_mode, probes=1),
    "probe-none": partial(_mode, probes=1, probe_weights="none"),
    "probe-cap": partial(_mode, probes=1, probe_weights=CAP),
    "probes-2": partial(_mode, probes=2),
    "probes-all": partial(_mode, probes="all"),
    "densemixer": partial(_mode, estimator="dense", probes="all"),
    "probe-uniform": partial(_mode, kind=UniformProbeStudent),
    "gumbel": partial(of_router, GumbelTopKRouter),
    "bias": partial(top_k, kind=LossFreeStudent),
    "frozen": frozen,
    "random": partial(of_router, RandomRouter),
}
USUAL = tuple(METHODS)
_marginal = partial(BalancedStudent, probabilities="marginal")
# Where there is no time for all: those of others, and probes and balance together.
PUBLISHED: dict[str, Build] = {
    "remoe": remoe,
    "remoe-slow": partial(remoe, kind=partial(ReMoEStudent, first=1e-3, factor=1.02)),
    "default": partial(top_k, kind=DefaultStudent),
    "grin": partial(of_router, GrinRouter),
    "balance": partial(top_k, kind=BalancedStudent),
    "balance-micro": partial(top_k, kind=MicroBatchStudent),
    "balance-buffer": partial(top_k, kind=partial(MicroBatchStudent, buffered=True)),
}
BALANCED: dict[str, Build] = {
    "probe-bias": partial(_mode, probes=1, kind=LossFreeStudent),
    "probes-all-bias": partial(_mode, probes="all", kind=LossFreeStudent),
    "densemixer-bias": partial(_mode, estimator="dense", probes="all", kind=LossFreeStudent),
    "mode-balance": partial(_mode, kind=_marginal),
    "probe-balance": partial(_mode, probes=1, kind=_marginal),
    "probes-all-balance": partial(_mode, probes="all", kind=_marginal),
    "densemixer-balance": partial(_mode, estimator="dense", probes="all", kind=BalancedStudent),
}
METHODS |= PUBLISHED | BALANCED
RANGE: dict[str, Build] = {
    "top-3": partial(top_k, k=3),
    "top-2": partial(top_k, k=2),
    "range-sampled": range_k,
    "range-mode": partial(range_k, decide="mode"),
    "range-probe": partial(range_k, decide="mode", probes=1),
    "range-all": partial(range_k, decide="mode", probes="all"),
}
CORE = ("top-k", "sampled-1/4", "mode", "probe", "probe-none", "probes-all", "densemixer", "bias", "frozen")


def usual_methods(shape: Shape) -> list[str]:
    """Those that are run where nothing else is asked for."""
    if shape == VARIABLE:
        return list(RANGE)
    return list(USUAL if shape in THOROUGH else CORE)


def methods_of(shape: Shape) -> dict[str, Build]:
    """Those that fit; the first is what the others are paired with."""
    return RANGE if shape.kind == "variable" else METHODS
