"""What a run and a study are made of: frozen dataclasses, validated when they are built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

ROUTERS = ("top-k", "exact-k", "range-k")  # what the demo compares unless told otherwise
ALL_ROUTERS = (*ROUTERS, "soft-uniform", "soft-learned", "budget")
HEAD_SIZE = 32

STUDIES = ("budgets",)
# A small model for 2 CPU cores, and one for a GPU; both train for longer than the demo and measure on more text.
MEASURED = {"validations": 2, "oracle_rounds": 0}
CPU = {"steps": 250, "validation_batches": 40, **MEASURED}
CPU_BUDGETS = (2, 4)
CUDA = {
    "steps": 2000,
    "layers": 8,
    "experts": 64,
    "hidden": 256,
    "batch_size": 64,
    "seq_len": 256,
    "learning_rate": 2e-3,
    "validation_batches": 40,
    **MEASURED,
}
CUDA_BUDGETS = (4, 8)


class DemoError(ValueError):
    """Something the user can put right; `argument` names the option to change, where one is to blame."""

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


def require(condition: bool, message: str, argument: str) -> None:
    if not condition:
        raise DemoError(message, argument)


def require_at_least(least: int, value: int, argument: str) -> None:
    require(value >= least, f"must be at least {least}, got {value}", argument)


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides a run's numbers, except the device and the number of threads.

    A checkpoint stores it, and a run resumes only from a checkpoint with an equal one. The second block has no options
    on the command line. Raises DemoError naming the option, its value and the remedy.
    """

    steps: int = 200
    seed: int = 0
    layers: int = 4
    experts: int = 16
    k: int = 4
    hidden: int = 96
    batch_size: int = 16
    seq_len: int = 64
    routers: tuple[str, ...] = ROUTERS
    text: str | None = None

    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    balance_weight: float = 0.01
    z_weight: float = 1e-3
    count_weight: float = 0.1
    estimation_weight: float = 1.0  # of what a plan adds to the loss
    table_rate: float = 10.0  # times the learning rate: the few numbers that split a budget over the layers
    soft_alpha: float = 1.0
    calibrate_every: int = 10  # steps between calibrations of soft routers' thresholds
    calibration_batches: int = 4  # of training text, before a validation
    validations: int = 8
    validation_batches: int = 10
    oracle_sequences: int = 16
    oracle_rounds: int = 32  # 0: no swap oracle

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "experts", "k", "batch_size"):
            require_at_least(1, getattr(self, name), name)
        require_at_least(0, self.seed, "seed")
        require_at_least(8, self.seq_len, "seq_len")
        require(self.seed < 2**31, f"must be below 2**31, got {self.seed}", "seed")
        require(self.experts > 1, "must be at least 2 for there to be something to route, got 1", "experts")
        most = f"must be at most the number of experts, {self.experts}"
        require(self.k <= self.experts, f"{most}, got {self.k}: a smaller --k or more --experts", "k")
        multiple = f"must be a positive multiple of {HEAD_SIZE} (one attention head)"
        require(self.hidden >= HEAD_SIZE and self.hidden % HEAD_SIZE == 0, f"{multiple}, got {self.hidden}", "hidden")
        self._check_routers()

    def _check_routers(self) -> None:
        unknown = [name for name in self.routers if name not in ALL_ROUTERS]
        given = ", ".join(map(repr, unknown)) or "none"
        known = bool(self.routers) and not unknown
        require(known, f"must name some of {', '.join(ALL_ROUTERS)}, got {given}", "routers")
        twice = len(set(self.routers)) < len(self.routers)
        require(not twice, f"names a router twice: {' '.join(self.routers)}", "routers")

    @property
    def k_range(self) -> tuple[int, int]:
        """What a layer may get where there is a choice: half to twice k, so that k sits inside."""
        return max(1, self.k // 2), min(self.experts, 2 * self.k)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def validation_every(self) -> int:
        return max(1, self.steps // self.validations)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "routers": list(self.routers)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DemoConfig:
        """The inverse of to_json. Raises TypeError or KeyError on values that it did not write."""
        return cls(**{**values, "routers": tuple(values["routers"])})


class Run(NamedTuple):
    """One training run: a router, the experts it may execute per token and layer, and a seed."""

    router: str
    k: int
    seed: int

    def __str__(self) -> str:
        return f"{self.router}, k = {self.k}, seed {self.seed}"


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides a study's numbers, except device, threads and processes.

    Attributes:
        base: what all runs share, with the first budget and the first seed.
        budgets: k, experts executed per token and layer; a token's budget is k times the layers.
        seeds: how many, from the first on.

    Raises DemoError naming the option, its value and the remedy.
    """

    base: DemoConfig
    budgets: tuple[int, ...]
    seeds: int = 3

    def __post_init__(self) -> None:
        given = " ".join(map(str, self.budgets)) or "none"
        distinct = 0 < len(self.budgets) == len(set(self.budgets))
        require(distinct, f"must name different numbers of experts, got {given}", "budgets")
        bounds = f"must lie between 1 and the number of experts, {self.base.experts}"
        for k in self.budgets:
            allowed = 1 <= k <= self.base.experts
            require(allowed, f"{bounds}, got {k}: other --budgets, or more --experts", "budgets")
        require_at_least(1, self.seeds, "seeds")
        self.config(self.budgets[0], self.base.seed + self.seeds - 1)  # the last seed may be too large

    def runs(self) -> list[Run]:
        """Seed by seed, so that a study that is stopped has compared all routers on the seeds it got to."""
        seeds = range(self.base.seed, self.base.seed + self.seeds)
        return [Run(router, k, seed) for seed in seeds for k in self.budgets for router in self.base.routers]

    def config(self, k: int, seed: int) -> DemoConfig:
        """The configuration of the runs with this budget and seed."""
        return dataclasses.replace(self.base, k=k, seed=seed)

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base.to_json(), "budgets": list(self.budgets), "seeds": self.seeds}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StudyConfig:
        """The inverse of to_json. Raises TypeError or KeyError on values that it did not write."""
        return cls(DemoConfig.from_json(values["base"]), tuple(values["budgets"]), values["seeds"])


def preset(
    device: torch.device, given: dict[str, Any], budgets: Sequence[int] | None = None, seeds: int | None = None
) -> StudyConfig:
    """The study for a device, with what the command line sets instead."""
    sizes, usual = (CUDA, CUDA_BUDGETS) if device.type == "cuda" else (CPU, CPU_BUDGETS)
    chosen = tuple(usual if budgets is None else budgets)
    fields: dict[str, Any] = {"routers": ALL_ROUTERS, **sizes, **given}
    # The budgets are checked by StudyConfig, in their own name.
    k = chosen[0] if chosen and 1 <= chosen[0] <= fields.get("experts", DemoConfig.experts) else 1
    return StudyConfig(DemoConfig(**fields, k=k), chosen, 3 if seeds is None else seeds)
