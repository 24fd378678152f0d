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
from circuitroute.engines.base import LayeredEngine as LayeredEngine
from circuitroute.engines.layered import NaiveLayered, PyjuiceLayered, TorchLayered, evaluated
from circuitroute.engines.layered.pyjuice import missing as missing_for_pyjuice
from circuitroute.engines.subset import NaiveSubset, TorchSubset
from circuitroute.errors import EngineError

# Names in order of preference, by op; "pyjuice" runs only where it is asked for.
ENGINES: dict[str, tuple[str, ...]] = {"subset": ("torch", "naive"), "layered": ("torch", "naive", "pyjuice")}

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
    lacking = missing_for_pyjuice() if name == "pyjuice" else None
    if lacking is not None:
        raise EngineError(f"engine='pyjuice' cannot run here: {lacking}")


def engine_of(circuit: Circuit, device: torch.device) -> Engine:
    """The engine that runs ``circuit`` on ``device``, ready for use."""
    if circuit.op == "layered":
        return layered_engine(circuit, device)
    return _SUBSET[circuit.engine_for(device)]


def layered_engine(circuit: Circuit, device: torch.device) -> LayeredEngine:
    """The engine of a circuit that is no pure count constraint; kept with the circuit, since it holds a plan."""
    name = circuit.engine_for(device)
    made: dict[str, LayeredEngine] = circuit.__dict__.setdefault("_layered_engines", {})
    if name not in made:
        made[name] = _make_layered(circuit, name)
    return made[name]


def _make_layered(circuit: Circuit, name: str) -> LayeredEngine:
    if name == "naive":
        return NaiveLayered(evaluated(circuit.graph))
    if name == "pyjuice":
        return PyjuiceLayered(circuit)
    return TorchLayered(evaluated(circuit.graph), circuit.max_count)


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
