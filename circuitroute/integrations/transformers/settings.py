"""The options of a patched model, and how its ``config.json`` keeps them: plain JSON under one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from circuitroute._validate import as_int, as_number, one_of
from circuitroute.constraints import Constraint
from circuitroute.errors import CircuitRouteError
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.temperature import as_temperature
from circuitroute.integrations.transformers.controls import from_plain
from circuitroute.integrations.transformers.experts import Padding
from circuitroute.interop import storage
from circuitroute.interop.reprs import parse_constraint, rebuilt
from circuitroute.routing.choice import Decide, as_share
from circuitroute.routing.estimators import Estimator, name_of
from circuitroute.routing.probes import (
    ProbeCount,
    ProbeWeights,
    as_probe_count,
    as_probe_weights,
    refuse_idle_probes,
)
from circuitroute.routing.weights import Combine, as_combine

Eval: TypeAlias = Literal["auto", "mode"]

FORMAT = 1
REMEDY = "Load it with from_pretrained, and call patch() with yours"
# The attribute of the configuration that holds the settings.
SETTINGS = "circuitroute"


@dataclass(frozen=True)
class Options:
    """The keyword arguments of :func:`patch`, which all layers share."""

    combine: Combine | None = None
    estimator: str | Estimator = "simple"
    padding: Padding = "auto"
    eval: Eval = "auto"
    seed: int | None = None
    decide: Decide | float | None = None
    temperature: float = 1.0
    probes: ProbeCount = 0
    probe_weights: ProbeWeights = "importance"

    def __post_init__(self) -> None:
        if self.combine is not None:
            as_combine(self.combine)
        as_share(self.decide, self.estimator)
        if self.decide is not None and not isinstance(self.decide, str):
            object.__setattr__(self, "decide", as_number("decide", self.decide))
        given: Any = self.temperature
        if isinstance(given, Tensor) and given.requires_grad:
            raise TypeError(
                "temperature is a tensor that requires a gradient: all layers of a patched model share a plain number, "
                "which Handle.temperature changes; cr.Router takes temperatures that are learned"
            )
        # All as plain numbers, which JSON can keep, whatever gave them: NumPy's are none.
        object.__setattr__(self, "temperature", as_temperature(as_number("temperature", self.temperature)))
        object.__setattr__(self, "probes", as_probe_count(self.probes))
        as_probe_weights(self.probe_weights)
        if not isinstance(self.probe_weights, str):
            object.__setattr__(self, "probe_weights", as_number("probe_weights", self.probe_weights))
        refuse_idle_probes(self.probes, self.estimator)
        one_of("padding", self.padding, get_args(Padding))
        one_of("eval", self.eval, get_args(Eval))
        if self.seed is not None:
            object.__setattr__(self, "seed", as_int("seed", self.seed))


class Saved(NamedTuple):
    """How a model was patched when it was saved."""

    rules: list[Constraint | Circuit | None]  # one per mixture-of-experts layer; None for a layer left as it was
    total: Constraint | None  # of the budget
    options: Options
    price: list[Tensor | None] | None  # per routed layer
    bias: list[Tensor | None] | None


def as_rule(given: Constraint | Circuit, circuit: Circuit) -> Constraint | Circuit:
    """What to keep of a layer's constraint: itself if its text tells all, else the circuit, which does."""
    return given if isinstance(given, Constraint) and rebuilt(given) is not None else circuit


def as_json(options: Options, rules: Sequence[Constraint | Circuit | None], total: Constraint | None) -> dict[str, Any]:
    """The settings as the configuration keeps them; see :class:`Saved`.

    A constraint is kept as its ``repr``, and a circuit as ``{"circuit": i}``, where the i-th of ``"circuits"`` is the
    content of the file that :meth:`circuitroute.Circuit.save` writes. An estimator of the user's own is code, which no
    configuration can hold: ``{"own": name}`` says which it was.
    """
    circuits = list(dict.fromkeys(rule for rule in rules if isinstance(rule, Circuit)))
    kept = [{"circuit": circuits.index(x)} if isinstance(x, Circuit) else None if x is None else repr(x) for x in rules]
    settings = {"format": FORMAT, "constraints": kept, **vars(options), "estimator": _kept_estimator(options.estimator)}
    if circuits:
        settings["circuits"] = [storage.content(circuit).decode("ascii") for circuit in circuits]
    return settings if total is None else {**settings, "total": repr(total)}


def _kept_estimator(estimator: str | Estimator) -> str | dict[str, str]:
    name = name_of(estimator)
    if name is not None:
        return name
    inner: Any = estimator
    while isinstance(inner, partial):
        inner = inner.func
    kind = inner if hasattr(inner, "__qualname__") else type(inner)
    return {"own": f"{kind.__module__}.{kind.__qualname__}"}


def read_settings(path: Any, settings: Any, estimator: str | Estimator | None = None) -> Saved:
    """The settings of a model that was saved at ``path``, with ``estimator`` in place of its own unless None.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    place = f"path={str(path)!r}"
    if not isinstance(settings, dict) or not isinstance(settings.get("constraints"), list):
        raise ValueError(f"{place} was not saved from a patched model: load it with from_pretrained, and call patch()")
    if settings.get("format") != FORMAT:
        raise ValueError(f"{place} has settings of format {settings.get('format')!r}: this release reads {FORMAT}")
    settings = settings if estimator is None else {**settings, "estimator": estimator}
    if isinstance(settings.get("estimator"), dict):
        own = settings["estimator"].get("own")
        raise ValueError(
            f"{place} was saved with an estimator of its user's own, {own}, which is code, and a configuration holds "
            f"none: hand it over, load(path, estimator=...), or name another one, such as 'simple'"
        )
    try:
        options = Options(**{field.name: settings[field.name] for field in fields(Options) if field.name in settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}. {REMEDY}") from None
    circuits = _read_circuits(place, settings.get("circuits", []))
    rules = [_read_rule(place, kept, circuits) for kept in settings["constraints"]]
    total = _read_constraint(place, settings.get("total"))
    try:
        return Saved(rules, total, options, *(from_plain(settings.get(name)) for name in ("price", "bias")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: price or bias: {error}. {REMEDY}") from None


def _read_circuits(place: str, texts: Any) -> list[Circuit]:
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.isascii() for text in texts):
        raise ValueError(f"{place}: circuits must be texts. {REMEDY}")
    try:
        return [Circuit(*storage.parse(f"circuit {i}", text.encode())) for i, text in enumerate(texts)]
    except CircuitRouteError as error:
        raise ValueError(f"{place}: {error}. {REMEDY}") from None


def _read_rule(place: str, kept: Any, circuits: Sequence[Circuit]) -> Constraint | Circuit | None:
    if not isinstance(kept, dict):
        return _read_constraint(place, kept)
    index = kept.get("circuit")
    if type(index) is not int or not 0 <= index < len(circuits):
        raise ValueError(
            f"{place}: a layer has the constraint {kept!r}, and there are {len(circuits)} circuits. {REMEDY}"
        )
    return circuits[index]


def _read_constraint(place: str, text: Any) -> Constraint | None:
    if text is None:
        return None
    found = parse_constraint(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{place}: the constraint {text!r} is not made of built-in constraints. {REMEDY}")
    return found
