"""Circuit -> tensor programs: one folder per op, a naive engine beside its fast versions.

Two ops cover everything: ``subset``, the flat count family, and ``layered``, any circuit. Which engine runs is
decided by device and by what is installed, on declared reasons, and can be forced and asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from circuitroute.circuit import Circuit
from circuitroute.engines.base import Engine as Engine
from circuitroute.engines.base import Inference as Inference
from circuitroute.engines.layered import NaiveLayered
from circuitroute.engines.subset import NaiveSubset, TorchSubset
from circuitroute.errors import EngineError

# Names in order of preference, by op.
ENGINES: dict[str, tuple[str, ...]] = {"subset": ("torch", "naive"), "layered": ("naive",)}

_SUBSET: dict[str, Engine] = {"torch": TorchSubset(), "naive": NaiveSubset()}


def choose(circuit: Circuit, device: torch.device) -> str:
    """The preferred engine for a circuit on a device."""
    return ENGINES[circuit.op][0]


def require(circuit: Circuit, name: str) -> None:
    """Raise :class:`EngineError` unless engine ``name`` exists and can run the circuit."""
    known = sorted({engine for names in ENGINES.values() for engine in names})
    if name not in known:
        raise EngineError(f"engine={name!r}: there is no such engine; known are {', '.join(known)}")
    if name not in ENGINES[circuit.op]:
        raise EngineError(
            f"engine={name!r} runs no circuit of op {circuit.op!r} such as {circuit.constraint!r}; "
            f"use one of {', '.join(ENGINES[circuit.op])}"
        )


def engine_of(circuit: Circuit, device: torch.device) -> Engine:
    """The engine that runs ``circuit`` on ``device``, ready for use."""
    if circuit.op == "layered":
        return layered_engine(circuit)
    return _SUBSET[circuit.engine_for(device)]


def layered_engine(circuit: Circuit) -> NaiveLayered:
    """The engine of a circuit that is no pure count constraint; kept with the circuit, since it holds a plan."""
    engine: NaiveLayered | None = circuit.__dict__.get("_layered_engine")
    if engine is None:
        engine = circuit.__dict__["_layered_engine"] = NaiveLayered(circuit.graph)
    return engine


@dataclass(frozen=True)
class Cost:
    """Predicted cost per token: multiply-adds of the marginals and of their gradient, and bytes in and out."""

    multiply_adds: int
    backward: int
    bytes_moved: int


def cost(circuit: Circuit) -> Cost:
    """One multiply-add per element up, two down; the gradient sweeps dual numbers, three times as much."""
    sweep = 3 * circuit.num_edges
    return Cost(multiply_adds=sweep, backward=3 * sweep, bytes_moved=8 * circuit.n)
