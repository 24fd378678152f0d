"""circuitroute's routing step, by engine, by rule of the decision, and by what is read of it.

Shapes: T tokens, N experts, K largest count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks.registry import Forward, Outputs, provider
from benchmarks.subset.engines import circuit_on
from benchmarks.subset.workload import CHECKED_TOKENS, SubsetCase
from circuitroute.routing.estimators import Simple

Read = Callable[[cr.Routing], tuple[Tensor, ...]]

READINGS: dict[str, Read] = {
    "gates": lambda routing: (routing.gates,),
    "padded": lambda routing: routing.padded()[:1],
    "balance": lambda routing: (routing.gates, routing.marginals, routing.log_prob),
}
NOTES = {"balance": "gates, marginals and log-probability, all differentiated"}


class Apart(Simple):
    """SIMPLE as an estimator of the caller's own, which no engine has fused: the step is composed of its parts."""


PARTS = "composed of its parts, as before"
# Of a decision in training; evaluation has the mode alone.
RULES: dict[str, dict[str, Any]] = {"sample": {}, "mode": {"decide": "mode"}, "cold": {"temperature": 0.25}}
ENGINES = ("numba", "triton", "torch")


def _decision(case: SubsetCase, engine: str, read: Read, tokens: int, **settings: Any) -> Forward:
    """The first of the case's tokens decided and read; keys make each row's decision its own."""
    circuit = circuit_on(case, engine)
    key_T = cr.random_key(case.seed, torch.arange(tokens, device="cpu" if engine == "naive" else case.device))

    def forward(logits_TN: Tensor) -> Outputs:
        result, *more = read(cr.route(logits_TN, circuit, key=key_T, **settings))
        return Outputs(result, more=tuple(more))

    return forward


def _checked(case: SubsetCase, forward: Forward, truth: Forward) -> Forward:
    def run(logits_TN: Tensor) -> Outputs:
        found = forward(logits_TN)
        return Outputs(found.result, {"truth": truth}, more=found.more)

    return run


def _training(engine: str, read: Read, settings: dict[str, Any]) -> Callable[[SubsetCase], Forward]:
    def build(case: SubsetCase) -> Forward:
        few = min(case.tokens, CHECKED_TOKENS)
        truth = _decision(case, "naive", read, few, **settings)
        return _checked(case, _decision(case, engine, read, case.tokens, **settings), truth)

    return build


def _evaluating(engine: str, read: Read, **options: Any) -> Callable[[SubsetCase], Forward]:
    def build(case: SubsetCase) -> Forward:
        settings = {"training": False, "combine": "normalized", **options}
        few = min(case.tokens, CHECKED_TOKENS)
        forward = torch.no_grad()(_decision(case, engine, read, case.tokens, **settings))
        return _checked(case, forward, _decision(case, "naive", read, few, **settings))

    return build


for _reading, _read in READINGS.items():
    for _rule in ("sample", "mode"):
        provider("step", f"parts:{_rule}:{_reading}", engine="numba", note=PARTS)(
            _training("numba", _read, {**RULES[_rule], "estimator": Apart()})
        )
    if _reading != "balance":
        provider("evaluation", f"parts:{_reading}", engine="numba", note=PARTS)(
            _evaluating("numba", _read, estimator=Apart())
        )

for _engine in ENGINES:
    _default = _engine != "torch"  # which composes a step of its parts: it runs when asked for
    for _reading, _read in READINGS.items():
        for _rule, _settings in RULES.items():
            provider(
                "step",
                f"{_engine}:{_rule}:{_reading}",
                engine=_engine,
                by_default=_default and (_rule != "cold" or _reading == "balance"),
                note=NOTES.get(_reading),
            )(_training(_engine, _read, _settings))
    for _reading in ("gates", "padded"):
        provider("evaluation", f"{_engine}:{_reading}", engine=_engine, by_default=_default)(
            _evaluating(_engine, READINGS[_reading])
        )
