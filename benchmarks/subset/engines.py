"""circuitroute itself, once per engine: ``cr.route`` with ProbMoE's gates.

Shapes: T tokens, N variables.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks.registry import Forward, Outputs, UnavailableError, provider
from benchmarks.subset.workload import SubsetCase
from circuitroute.engines import ENGINES

# Where an engine is at home. Triton's interpreter runs kernels on a CPU too, but its time says nothing.
DEVICES = {"numba": "cpu", "triton": "cuda"}
# 2,048 of 65,536 have 131 million elements, which are never built: engines need the allowed counts alone.
MAX_NODES = 10_000_000


def _build(engine: str) -> Callable[[SubsetCase], Forward]:
    def build(case: SubsetCase) -> Forward:
        circuit = circuit_on(case, engine)
        key_T = cr.random_key(case.seed, torch.arange(case.tokens, device=case.device))

        def forward(logits_TN: Tensor) -> Outputs:
            routing = cr.route(logits_TN, circuit, combine="softmax", estimator="simple", key=key_T)
            log_partition_T = routing.distribution.log_partition
            values = {"marginals": routing.marginals, "log_partition": log_partition_T, "mask": routing.mask}
            return Outputs(result=routing.gates, values=values)

        return forward

    return build


def circuit_on(case: SubsetCase, engine: str) -> cr.Circuit:
    """The case's circuit on an engine, or an error that says why it is not timed here."""
    home = DEVICES.get(engine)
    if home not in (None, case.logits.device.type):
        raise UnavailableError(f"engine {engine} is timed on {home} only")
    circuit = cr.compile(cr.Between(case.kmin, case.k), case.n, max_nodes=MAX_NODES)
    try:
        return circuit.with_engine(engine)
    except cr.CircuitRouteError as reason:
        raise UnavailableError(str(reason)) from reason


for _engine in ENGINES["subset"]:
    # The naive engine is there to be obviously right: it runs when asked for.
    provider("subset", f"circuitroute:{_engine}", engine=_engine, by_default=_engine != "naive")(_build(_engine))
