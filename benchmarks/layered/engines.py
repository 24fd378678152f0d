"""circuitroute itself, once per engine: log Z and marginals in one sweep; with a sample, and with its second order.

Shapes: T tokens, N variables.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks.layered.workload import LayeredCase
from benchmarks.registry import Forward, Outputs, UnavailableError, provider
from circuitroute.engines import ENGINES


def _circuit(case: LayeredCase, engine: str) -> cr.Circuit:
    try:
        return case.circuit.with_engine(engine)
    except cr.CircuitRouteError as reason:
        raise UnavailableError(str(reason)) from reason


def _build(engine: str) -> Callable[[LayeredCase], Forward]:
    def build(case: LayeredCase) -> Forward:
        circuit = _circuit(case, engine)

        def forward(logits_TN: Tensor) -> Outputs:
            dist = circuit(logits_TN)
            log_partition_T = dist.log_partition
            return Outputs(log_partition_T, {"log_partition": log_partition_T, "marginals": dist.marginals})

        return forward

    return build


def _build_with_sample(engine: str) -> Callable[[LayeredCase], Forward]:
    """The same sweep with an exact sample."""

    def build(case: LayeredCase) -> Forward:
        circuit = _circuit(case, engine)
        key_T = cr.random_key(case.seed, torch.arange(case.tokens, device=case.device))

        def forward(logits_TN: Tensor) -> Outputs:
            dist = circuit(logits_TN)
            mask = dist.sample_in_sweep(key_T)
            log_partition_T = dist.log_partition
            return Outputs(log_partition_T, {"log_partition": log_partition_T, "mask": mask})

        return forward

    return build


# The engines that run by themselves; the naive one is there to be obviously right, and runs when asked for.
PREFERRED = ("numba", "torch")

for _engine in PREFERRED:
    provider("layered", f"circuitroute:{_engine} with sample", engine=_engine)(_build_with_sample(_engine))
for _engine in ENGINES["layered"]:
    provider("layered", f"circuitroute:{_engine}", engine=_engine, by_default=_engine in PREFERRED)(_build(_engine))
