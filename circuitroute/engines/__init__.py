"""Circuit -> tensor programs: one folder per op, a naive engine beside its fast versions.

Two ops cover everything: ``subset``, the flat count family, and ``layered``, any circuit. Which engine runs is
decided by device and by what is installed, on declared reasons, and can be forced and asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from circuitroute.circuit import Circuit
from circuitroute.engines.base import Engine as Engine
from circuitroute.engines.base import Inference as Inference
from circuitroute.engines.base import LayeredEngine as LayeredEngine
from circuitroute.engines.base import certainly_finite as certainly_finite
from circuitroute.engines.layered import NaiveLayered, PyjuiceLayered, TorchLayered, evaluated
from circuitroute.engines.layered.pyjuice import missing as missing_for_pyjuice
from circuitroute.engines.subset import NaiveSubset, NumbaSubset, TorchSubset, TritonSubset
from circuitroute.engines.subset.fused import installed as triton_installed
from circuitroute.engines.subset.fused import missing as missing_for_triton
from circuitroute.engines.subset.fused import refusal as triton_refusal
from circuitroute.engines.subset.numba import fits as numba_fits
from circuitroute.engines.subset.numba import missing as missing_for_numba
from circuitroute.engines.subset.numba import warmup as warmup
from circuitroute.errors import EngineError

# Names in order of preference, by op; "pyjuice" runs only where it is asked for.
ENGINES: dict[str, tuple[str, ...]] = {
    "subset": ("triton", "numba", "torch", "naive"),
    "layered": ("torch", "naive", "pyjuice"),
}

_SUBSET: dict[str, Engine] = {
    "triton": TritonSubset(),
    "numba": NumbaSubset(),
    "torch": TorchSubset(),
    "naive": NaiveSubset(),
}

# Engines that need what may not be installed: why they cannot run here, or None.
_NEEDS: dict[str, Callable[[], str | None]] = {
    "triton": missing_for_triton,
    "numba": missing_for_numba,
    "pyjuice": missing_for_pyjuice,
}


def choose(circuit: Circuit, device: torch.device) -> str:
    """The preferred engine for a circuit on a device."""
    if circuit.op == "subset" and device.type == "cpu" and missing_for_numba() is None:
        return "numba" if numba_fits(circuit.n, circuit.max_count) else "torch"
    if circuit.op == "subset" and device.type == "cuda" and triton_installed():
        return "torch" if triton_refusal(circuit.n, circuit.max_count) else "triton"
    return "torch"


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
    lacking = _NEEDS[name]() if name in _NEEDS else None
    if lacking is not None:
        raise EngineError(f"engine={name!r} cannot run here: {lacking}")
    refused = triton_refusal(circuit.n, circuit.max_count) if name == "triton" else None
    if refused is not None:
        raise EngineError(f"engine='triton' does not run {circuit.constraint!r}: {refused}")


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
