"""The study of learning: which router is worth training with, from scratch and in fine-tuning on plenty of text and on
little."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import REGIMES, DemoConfig, Run, keep_plain, require, require_at_least
from ..corpus import Corpus
from ..texts import load_corpus
from ..trainee import Setting, start
from ..training import training_step

REFERENCE = "top-k"
AGAIN = "top-k-again"  # the noise floor
PRETRAINING = "pretraining"
ROUTERS = (
    REFERENCE,
    "exact-k",
    "exact-k-0.5",
    "exact-k-0.25",
    "exact-k-annealed",
    "exact-k-none",
    "mode",
    "probe",
    "probes-all",
    "densemixer",
    "range-k-calibrated",
    "budget-calibrated",
    "soft-uniform",
    "soft-learned",
    "frozen",
    "dropout-0.2",
    AGAIN,
)
WITH_LITTLE = (*ROUTERS[:-2], "dropout-0.1", "dropout-0.2", "dropout-0.3", AGAIN)
PASSES = 12  # through the little text; what half of them gives is read off the same run
LITTLE = 40_000  # bytes
LONGER = 3  # times the steps from scratch, for the models that fine-tuning starts from
FINE_TUNING_RATE = 2e-3

CPU: dict[str, Any] = {"steps": 250, "hidden": 64, "k": 2, "validation_batches": 8, "test_batches": 24}
CPU_SEEDS = {"scratch": 5, "plenty": 3, "little": 3}
# Sized for a few minutes of a large GPU: one seed, and the routers that matter most.
CUDA: dict[str, Any] = {
    "steps": 1000,
    "layers": 8,
    "experts": 64,
    "k": 8,
    "hidden": 256,
    "batch_size": 32,
    "seq_len": 256,
    "learning_rate": 2e-3,
    "validation_batches": 4,
    "test_batches": 8,
}
CUDA_SEEDS = {"scratch": 1, "little": 1}
CUDA_LITTLE = 200_000
CUDA_ROUTERS = {
    "scratch": (REFERENCE, "exact-k-0.25", "probe"),
    "little": (REFERENCE, "exact-k-0.5", "dropout-0.2"),
}
WARM_STEPS, TIMED_STEPS = 2, 4
_LEAST = 1e-3  # of a run, below which the time that was asked for is left at that
_NOWHERE = Path("nowhere")  # nothing that is only timed is written


@dataclass(frozen=True)
class Regime:
    """Runs that differ in their router and seed.

    Attributes:
        name: of REGIMES, or PRETRAINING.
        config: what they share, with the first seed.
        seeds: how many, from the first on.
    """

    name: str
    config: DemoConfig
    seeds: int

    def __post_init__(self) -> None:
        keep_plain(self)

    def runs(self) -> list[Run]:
        """Seed by seed."""
        seeds = range(self.config.seed, self.config.seed + self.seeds)
        return [Run(router, self.config.k, seed, self.name) for seed in seeds for router in self.config.routers]


@dataclass(frozen=True)
class LearningConfig:
    """See execution.StudyConfig."""

    regimes: tuple[Regime, ...]

    def __post_init__(self) -> None:
        for regime in self.regimes:
            require_at_least(1, regime.seeds, "seeds")
            dataclasses.replace(regime.config, seed=regime.config.seed + regime.seeds - 1)  # may be too large

    def runs(self) -> list[Run]:
        """Regime by regime, those first that others start from."""
        return [run for regime in self.regimes for run in regime.runs()]

    def config_of(self, run: Run) -> DemoConfig:
        """What the runs of its regime and seed share."""
        return dataclasses.replace(self.regime(run.regime).config, seed=run.seed)

    def regime(self, name: str) -> Regime:
        """The one of this name."""
        return next(regime for regime in self.regimes if regime.name == name)

    def pretraining(self, run: Run) -> Run | None:
        """Fine-tuning starts from the model with the same seed."""
        if not self.config_of(run).pretrained_steps:
            return None
        return Run(REFERENCE, run.k, run.seed, PRETRAINING)

    def load_texts(self) -> dict[str, Corpus]:
        """The text of every regime."""
        return {regime.name: load_corpus(regime.config) for regime in self.regimes}

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "regimes": [
                {"name": regime.name, "config": regime.config.to_json(), "seeds": regime.seeds}
                for regime in self.regimes
            ]
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LearningConfig:
        """The inverse of to_json. Raises TypeError or KeyError on values that it did not write."""
        regimes = [
            Regime(value["name"], DemoConfig.from_json(value["config"]), value["seeds"]) for value in values["regimes"]
        ]
        return cls(tuple(regimes))


def preset(
    device: torch.device, given: Mapping[str, Any], regimes: Sequence[str] | None = None, seeds: int | None = None
) -> LearningConfig:
    """The study for a device, with what the command line sets instead. `steps` are those from scratch."""
    cuda = device.type == "cuda"
    sizes, usual_seeds = (CUDA, CUDA_SEEDS) if cuda else (CPU, CPU_SEEDS)
    names = tuple(usual_seeds) if regimes is None else tuple(regimes)
    unknown = [name for name in names if name not in REGIMES]
    require(bool(names) and not unknown, f"must name some of {', '.join(REGIMES)}, got {unknown or 'none'}", "regimes")
    require(len(set(names)) == len(names), f"names a regime twice: {' '.join(names)}", "regimes")
    base = DemoConfig(**{**sizes, "oracle_rounds": 0, "calibrate_every": 25, **given, "routers": (REFERENCE,)})
    routers = {**dict.fromkeys(REGIMES, ROUTERS), "little": WITH_LITTLE, **(CUDA_ROUTERS if cuda else {})}
    if "routers" in given:
        routers = dict.fromkeys(REGIMES, tuple(given["routers"]))
    make = {"scratch": _scratch, "plenty": _plenty, "little": _little}
    counts = {name: usual_seeds.get(name, 1) if seeds is None else seeds for name in names}
    made = [Regime(name, make[name](base, routers[name], cuda), counts[name]) for name in names]
    tuned = [counts[name] for name in names if name != "scratch"]
    before = [Regime(PRETRAINING, _pretraining(base), max(tuned))] if tuned else []
    return LearningConfig((*before, *made))


def _scratch(base: DemoConfig, routers: tuple[str, ...], cuda: bool) -> DemoConfig:
    return dataclasses.replace(base, routers=routers, validations=5)


def _pretraining(base: DemoConfig) -> DemoConfig:
    return dataclasses.replace(base, steps=LONGER * base.steps, validations=1)


def _plenty(base: DemoConfig, routers: tuple[str, ...], cuda: bool) -> DemoConfig:
    return dataclasses.replace(
        base,
        routers=routers,
        validations=5,
        language="c++",
        learning_rate=FINE_TUNING_RATE,
        pretrained_steps=LONGER * base.steps,
    )


def _little(base: DemoConfig, routers: tuple[str, ...], cuda: bool) -> DemoConfig:
    limit = CUDA_LITTLE if cuda else LITTLE
    per_pass = max(1, (limit - base.seq_len) // base.tokens_per_step)
    return dataclasses.replace(
        base,
        routers=routers,
        steps=PASSES * per_pass,
        validations=PASSES,
        language="english",
        text_limit=limit,
        passes=True,
        learning_rate=FINE_TUNING_RATE,
        pretrained_steps=LONGER * base.steps,
    )


# TIME


def fitted(
    config: LearningConfig, texts: Mapping[str, Corpus], device: torch.device, minutes: float, processes: int
) -> tuple[LearningConfig, float]:
    """The study, its runs shortened by one factor where it would take longer than so many minutes, and the minutes that
    it is expected to take.

    Times a few training steps of every router before anything else is done. What is shortened is the steps, and of
    runs that read their text pass by pass the passes.
    """
    require(minutes > 0, f"must be positive, got {minutes}", "minutes")
    seconds = _seconds_of_steps(config, texts, device)

    def takes(candidate: LearningConfig) -> float:
        total = sum(
            seconds[regime.name, run.router] * _steps_and_validations(regime) for regime, run in _each(candidate)
        )
        return total / processes / 60

    factor, fitting = 1.0, config
    # Validations do not get fewer with the steps, so one division may not be enough.
    while (expected := takes(fitting)) > minutes and factor > _LEAST:
        factor *= 0.98 * minutes / expected
        fitting = _shortened(config, factor)
    return fitting, expected


def _each(config: LearningConfig) -> list[tuple[Regime, Run]]:
    return [(regime, run) for regime in config.regimes for run in regime.runs()]


def _steps_and_validations(regime: Regime) -> float:
    """In units of steps: a batch forward and back costs three times as much as forward."""
    config = regime.config
    return config.steps + config.validations * (config.validation_batches + config.test_batches) / 3


def _seconds_of_steps(
    config: LearningConfig, texts: Mapping[str, Corpus], device: torch.device
) -> dict[tuple[str, str], float]:
    found = {}
    for regime in config.regimes:
        for router in regime.config.routers:
            # Weights that a run starts from make no difference to its time.
            step = _stepper(Setting(regime.config, texts[regime.name], device, _NOWHERE), router)
            for _ in range(WARM_STEPS):
                step()
            began = time.perf_counter()
            for _ in range(TIMED_STEPS):
                step()
            found[regime.name, router] = (time.perf_counter() - began) / TIMED_STEPS
    return found


def _stepper(setting: Setting, router: str) -> Callable[[], None]:
    trainee = start(setting, router, resume=False)

    def step() -> None:
        training_step(trainee)  # ends with the loss on the CPU, so the device is done
        trainee.record.step += 1

    return step


def _shortened(config: LearningConfig, factor: float) -> LearningConfig:
    steps = {regime.name: _fewer(regime.config, factor) for regime in config.regimes}
    regimes = []
    for regime in config.regimes:
        changes: dict[str, Any] = {"steps": steps[regime.name]}
        if regime.config.pretrained_steps:
            changes["pretrained_steps"] = steps[PRETRAINING]
        if regime.config.passes:
            changes["validations"] = max(1, round(regime.config.validations * changes["steps"] / regime.config.steps))
        regimes.append(dataclasses.replace(regime, config=dataclasses.replace(regime.config, **changes)))
    return LearningConfig(tuple(regimes))


def _fewer(config: DemoConfig, factor: float) -> int:
    if not config.passes:
        return max(1, int(config.steps * factor))
    per_pass = config.steps // config.validations  # one validation per pass
    return max(1, int(config.validations * factor)) * per_pass
