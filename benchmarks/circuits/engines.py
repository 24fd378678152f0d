"""circuitroute itself, once per engine.

Shapes: T rows, N variables.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import circuitroute as cr
from benchmarks.circuits.workload import CircuitCase
from benchmarks.registry import Forward, Outputs, UnavailableError, provider
from circuitroute.engines import ENGINES


def _build(engine: str) -> Callable[[CircuitCase], Forward]:
    def build(case: CircuitCase) -> Forward:
        try:
            circuit = case.circuit.with_engine(engine)
        except cr.CircuitRouteError as reason:
            raise UnavailableError(str(reason)) from reason

        def forward(logits_TN: Tensor) -> Outputs:
            log_partition_T = circuit(logits_TN).log_partition
            return Outputs(log_partition_T, {"log_partition": log_partition_T})

        return forward

    return build


for _engine in ENGINES["layered"]:
    # The naive engine is there to be obviously right: it runs when asked for.
    provider("circuits", f"circuitroute:{_engine}", engine=_engine, by_default=_engine != "naive")(_build(_engine))
