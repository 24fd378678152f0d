"""Which engine runs a circuit on a device, for which reasons, and what a sweep costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from circuitroute.circuit import Compiled
from circuitroute.engines.base import Engine, LayeredEngine
from circuitroute.engines.compiled import missing as missing_for_numba
from circuitroute.engines.layered import NaiveLayered, NumbaLayered, PyjuiceLayered, TorchLayered, evaluated, lean
from circuitroute.engines.layered.pyjuice import missing as missing_for_pyjuice
from circuitroute.engines.subset import NaiveSubset, NumbaSubset, TorchSubset, TritonSubset
from circuitroute.engines.subset.numba.engine import fits as numba_fits
from circuitroute.engines.subset.triton.engine import installed as triton_installed
from circuitroute.engines.subset.triton.engine import missing as missing_for_triton
from circuitroute.engines.subset.triton.engine import refusal as triton_refusal
from circuitroute.engines.subset.triton.engine import unfit as triton_unfit
from circuitroute.errors import EngineError

# Names by op, in order of preference; "pyjuice" runs only on request.
ENGINES: dict[str, tuple[str, ...]] = {
    "subset": ("triton", "numba", "torch", "naive"),
    "layered": ("numba", "torch", "naive", "pyjuice"),
}

_SUBSET: dict[str, Engine] = {
    "triton": TritonSubset(),
    "numba": NumbaSubset(),
    "torch": TorchSubset(),
    "naive": NaiveSubset(),
}

# Where one count alone is allowed, which only a circuit tells without a look at potentials.
_SUBSET_OF_ONE_COUNT: dict[str, Engine] = {**_SUBSET, "triton": TritonSubset(exact=True)}

# Engines of arbitrary circuits hold a plan, which lives as long as its circuit.
_LAYERED: WeakKeyDictionary[Compiled, dict[str, LayeredEngine]] = WeakKeyDictionary()

# Engines that need more than torch: why they cannot run here, or None.
_NEEDS: dict[str, Callable[[], str | None]] = {
    "triton": missing_for_triton,
    "numba": missing_for_numba,
    "pyjuice": missing_for_pyjuice,
}


def op_of(circuit: Compiled) -> str:
    """``"subset"`` for a pure count constraint over all variables, else ``"layered"``."""
    return "layered" if circuit.counts is None else "subset"


def engine_name(circuit: Compiled, device: torch.device) -> str:
    """The name of the engine that runs a circuit on a device: the forced one, or the preferred one."""
    return circuit.engine or choose(circuit, device)


def choose(circuit: Compiled, device: torch.device) -> str:
    """The preferred engine for a circuit on a device."""
    if device.type == "cpu" and missing_for_numba() is None:
        fits = op_of(circuit) == "layered" or numba_fits(circuit.n, circuit.max_count)
        return "numba" if fits else "torch"
    if op_of(circuit) == "subset" and device.type == "cuda" and triton_installed() and triton_unfit(device) is None:
        return "torch" if triton_refusal(circuit.n, circuit.max_count) else "triton"
    return "torch"


def require(circuit: Compiled, name: str) -> None:
    """Raise :class:`EngineError` unless engine ``name`` exists and can run the circuit."""
    known = sorted({engine for names in ENGINES.values() for engine in names})
    if name not in known:
        raise EngineError(f"engine={name!r}: there is no such engine; known are {', '.join(known)}")
    if name not in ENGINES[op_of(circuit)]:
        raise EngineError(
            f"engine={name!r} does not run circuits of op {op_of(circuit)!r} such as {circuit.constraint!r}; "
            f"use one of {', '.join(ENGINES[op_of(circuit)])}"
        )
    lacking = _NEEDS[name]() if name in _NEEDS else None
    if lacking is not None:
        raise EngineError(f"engine={name!r} cannot run here: {lacking}")
    refused = triton_refusal(circuit.n, circuit.max_count) if name == "triton" else None
    if refused is not None:
        raise EngineError(f"engine='triton' does not run {circuit.constraint!r}: {refused}")


def engine_of(circuit: Compiled, device: torch.device) -> Engine:
    """The engine that runs ``circuit`` on ``device``, ready for use."""
    if op_of(circuit) == "layered":
        return layered_engine(circuit, device)
    engines = _SUBSET_OF_ONE_COUNT if circuit.counts is not None and len(circuit.counts) == 1 else _SUBSET
    return engines[engine_name(circuit, device)]


def layered_engine(circuit: Compiled, device: torch.device) -> LayeredEngine:
    """The engine of a circuit that is not a pure count constraint, kept with the circuit since it holds a plan."""
    name = engine_name(circuit, device)
    made = _LAYERED.setdefault(circuit, {})
    if name not in made:
        made[name] = _make_layered(circuit, name)
    return made[name]


def counting_engine(circuit: Compiled, device: torch.device) -> Engine:
    """The engine that runs ``circuit`` on ``device`` with the count posterior among its moments."""
    return engine_of(circuit, device) if op_of(circuit) == "subset" else layered_engine(circuit, device).counting()


def _make_layered(circuit: Compiled, name: str) -> LayeredEngine:
    if name == "naive":
        return NaiveLayered(evaluated(circuit.graph))
    if name == "pyjuice":
        return PyjuiceLayered(circuit.graph, circuit.max_count, repr(circuit.constraint))
    kind = NumbaLayered if name == "numba" else TorchLayered
    return kind(lean(circuit.graph), circuit.max_count, drawn=evaluated(circuit.graph))


@dataclass(frozen=True)
class Cost:
    """Predicted cost per token: multiply-adds of the marginals and of their gradient, and bytes in and out."""

    multiply_adds: int
    backward: int
    bytes_moved: int


def cost(circuit: Compiled) -> Cost:
    """One multiply-add per element up and two down; the gradient, on dual numbers, takes three times as much."""
    sweep = 3 * circuit.graph.num_edges
    return Cost(multiply_adds=sweep, backward=3 * sweep, bytes_moved=8 * circuit.n)
