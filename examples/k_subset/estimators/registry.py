"""The methods by name, in the order of tables, with the settings that are tried for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import circuitroute as cr

from .exact import Enumeration
from .interface import Estimator
from .ours import MeanField, Mode, Score, Simple, SimpleScore, TaylorScore, TemperedSimple
from .peers import IMLE, GumbelScore, RelaxedGumbel, StraightThroughGumbel

Settings = dict[str, Any]

# What the gradient study tries, where a try costs little, ...
TEMPERATURES: tuple[Settings, ...] = tuple({"temperature": t} for t in (0.25, 0.5, 1.0, 2.0, 4.0))
GUMBEL: tuple[Settings, ...] = tuple({**t, "log_sigmoid": flag} for flag in (False, True) for t in TEMPERATURES)
STEPS: tuple[Settings, ...] = tuple(
    {"step": step, "noise": noise} for noise in ("sum-of-gamma", "gumbel") for step in (0.1, 0.5, 2.5, 10.0, 50.0)
)
SHARES: tuple[Settings, ...] = ({"share": 0.5}, {"share": 1.0})
# ... and what tasks try, where a try is a fit: at most three.
FEW_TEMPERATURES: tuple[Settings, ...] = TEMPERATURES[1:4]
FEW_STEPS: tuple[Settings, ...] = (
    {"step": 2.5, "noise": "sum-of-gamma"},
    {"step": 1.0, "noise": "gumbel"},
    {"step": 10.0, "noise": "gumbel", "divided": False},
)


class Method(NamedTuple):
    """How an estimator is made, whose it is, and the settings among which the studies choose."""

    make: Callable[..., Estimator]
    ours: bool
    grid: tuple[Settings, ...] = ({},)
    few: tuple[Settings, ...] = ({},)
    least: int = 1  # evaluations per row


METHODS: dict[str, Method] = {
    "simple": Method(Simple, True),
    "simple-tempered": Method(TemperedSimple, True, TEMPERATURES, FEW_TEMPERATURES),
    "mode": Method(Mode, True, TEMPERATURES, FEW_TEMPERATURES),
    "mean-field": Method(MeanField, True),
    "score": Method(Score, True),
    "score-taylor": Method(TaylorScore, True, least=2),
    "score-simple": Method(SimpleScore, True, SHARES, SHARES, least=2),
    "gumbel-relaxed": Method(RelaxedGumbel, False, GUMBEL, FEW_TEMPERATURES),
    "gumbel-st": Method(StraightThroughGumbel, False, GUMBEL, FEW_TEMPERATURES),
    "imle": Method(IMLE, False, STEPS, FEW_STEPS),
    "sfess": Method(GumbelScore, False, ({"baseline": False},), ({"baseline": False},)),
    "sfess-vr": Method(GumbelScore, False, least=2),
    "exact": Method(Enumeration, True),
}


def build(name: str, circuit: cr.Circuit, settings: Settings) -> Estimator:
    """The estimator of that name on a circuit of exactly k."""
    return METHODS[name].make(circuit, **settings)
