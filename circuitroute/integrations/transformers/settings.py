"""The options of a patched model, and how its ``config.json`` keeps them: plain JSON under one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from circuitroute._validate import as_int, as_number, one_of
from circuitroute.constraints import Constraint
from circuitroute.inference.temperature import as_temperature
from circuitroute.integrations.transformers.experts import Padding
from circuitroute.interop.reprs import parse_constraint
from circuitroute.routing.choice import Decide, as_share
from circuitroute.routing.estimators import Estimator
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
            object.__setattr__(self, "decide", as_number("decide", self.decide))  # which JSON can keep
        object.__setattr__(self, "temperature", as_temperature(as_number("temperature", self.temperature)))
        object.__setattr__(self, "probes", as_probe_count(self.probes))
        as_probe_weights(self.probe_weights)
        refuse_idle_probes(self.probes, self.estimator)
        one_of("padding", self.padding, get_args(Padding))
        one_of("eval", self.eval, get_args(Eval))
        if self.seed is not None:
            as_int("seed", self.seed)


class Saved(NamedTuple):
    """How a model was patched when it was saved."""

    constraints: list[Constraint | None]  # one per mixture-of-experts layer; None for a layer left as it was
    total: Constraint | None  # of the budget
    options: Options


def as_json(options: Options, constraints: Sequence[Constraint | None], total: Constraint | None) -> dict[str, Any]:
    """The settings as the configuration keeps them; see :class:`Saved`."""
    estimator = options.estimator if isinstance(options.estimator, str) else repr(options.estimator)
    texts = [None if constraint is None else repr(constraint) for constraint in constraints]
    settings = {"format": FORMAT, "constraints": texts, **vars(options), "estimator": estimator}
    return settings if total is None else {**settings, "total": repr(total)}


def read_settings(path: Any, settings: Any) -> Saved:
    """The settings of a model that was saved at ``path``.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    place = f"path={str(path)!r}"
    if not isinstance(settings, dict) or not isinstance(settings.get("constraints"), list):
        raise ValueError(f"{place} was not saved from a patched model: load it with from_pretrained, and call patch()")
    if settings.get("format") != FORMAT:
        raise ValueError(f"{place} has settings of format {settings.get('format')!r}: this release reads {FORMAT}")
    try:
        options = Options(**{field.name: settings[field.name] for field in fields(Options) if field.name in settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}. Load it with from_pretrained, and call patch()") from None
    *constraints, total = (_read_constraint(place, text) for text in [*settings["constraints"], settings.get("total")])
    return Saved(constraints, total, options)


def _read_constraint(place: str, text: Any) -> Constraint | None:
    if text is None:
        return None
    found = parse_constraint(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(
            f"{place}: the constraint {text!r} is not made of built-in constraints. Load it with from_pretrained, and "
            "call patch() with yours"
        )
    return found
