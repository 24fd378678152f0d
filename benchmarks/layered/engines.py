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


@provider("layered", "circuitroute:torch with sample", engine="torch")
def build_with_sample(case: LayeredCase) -> Forward:
    """The same sweep with an exact sample."""
    circuit = _circuit(case, "torch")
    key_T = cr.random_key(case.seed, torch.arange(case.tokens, device=case.device))

    def forward(logits_TN: Tensor) -> Outputs:
        dist = circuit(logits_TN)
        mask = dist.sample_in_sweep(key_T)
        log_partition_T = dist.log_partition
        return Outputs(log_partition_T, {"log_partition": log_partition_T, "mask": mask})

    return forward


for _engine in ENGINES["layered"]:
    # The naive engine is there to be obviously right: it runs when asked for.
    provider("layered", f"circuitroute:{_engine}", engine=_engine, by_default=_engine == "torch")(_build(_engine))
