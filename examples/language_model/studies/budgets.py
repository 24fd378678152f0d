"""The study of budgets: every router at several numbers of executed experts, with several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import DemoConfig, Run, keep_plain, require, require_at_least

ROUTERS = ("top-k", "exact-k-0.25", "range-k-controlled", "budget-calibrated", "soft-uniform", "soft-learned")
# A small model for 2 CPU cores, and one for a GPU; both train for longer than the demo and measure on more text.
MEASURED = {"validations": 2, "oracle_rounds": 0}
CPU = {"steps": 250, "hidden": 64, "validation_batches": 40, **MEASURED}
CPU_BUDGETS = (1, 2, 3, 4)
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
SEEDS = 3


@dataclass(frozen=True)
class BudgetsConfig:
    """Everything that decides a study's numbers, except device, threads and processes.

    Attributes:
        base: what all runs share, with the first budget and the first seed.
        budgets: k, experts executed per token and layer; a token's budget is k times the layers.
        seeds: how many, from the first on.

    Raises DemoError naming the option, its value and the remedy.
    """

    base: DemoConfig
    budgets: tuple[int, ...]
    seeds: int = SEEDS

    def __post_init__(self) -> None:
        keep_plain(self)
        given = " ".join(map(str, self.budgets)) or "none"
        distinct = 0 < len(self.budgets) == len(set(self.budgets))
        require(distinct, f"must name different numbers of experts, got {given}", "budgets")
        bounds = f"must lie between 1 and the number of experts, {self.base.experts}"
        for k in self.budgets:
            allowed = 1 <= k <= self.base.experts
            require(allowed, f"{bounds}, got {k}: other --budgets, or more --experts", "budgets")
        require_at_least(1, self.seeds, "seeds")
        self._config(self.budgets[0], self.base.seed + self.seeds - 1)  # the last seed may be too large

    def runs(self) -> list[Run]:
        """Seed by seed, so that a study that is stopped has compared all routers on the seeds it got to."""
        seeds = range(self.base.seed, self.base.seed + self.seeds)
        return [Run(router, k, seed) for seed in seeds for k in self.budgets for router in self.base.routers]

    def config_of(self, run: Run) -> DemoConfig:
        """What the runs with its budget and seed share."""
        return self._config(run.k, run.seed)

    def _config(self, k: int, seed: int) -> DemoConfig:
        return dataclasses.replace(self.base, k=k, seed=seed)

    def pretraining(self, run: Run) -> None:
        """All start from scratch."""

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base.to_json(), "budgets": list(self.budgets), "seeds": self.seeds}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BudgetsConfig:
        """The inverse of to_json. Raises TypeError or KeyError on values that it did not write."""
        return cls(DemoConfig.from_json(values["base"]), tuple(values["budgets"]), values["seeds"])


def preset(
    device: torch.device, given: dict[str, Any], budgets: Sequence[int] | None = None, seeds: int | None = None
) -> BudgetsConfig:
    """The study for a device, with what the command line sets instead."""
    sizes, usual = (CUDA, CUDA_BUDGETS) if device.type == "cuda" else (CPU, CPU_BUDGETS)
    chosen = tuple(usual if budgets is None else budgets)
    fields: dict[str, Any] = {"routers": ROUTERS, **sizes, **given}
    # The budgets are checked by BudgetsConfig, in their own name.
    k = chosen[0] if chosen and 1 <= chosen[0] <= fields.get("experts", DemoConfig.experts) else 1
    return BudgetsConfig(DemoConfig(**fields, k=k), chosen, SEEDS if seeds is None else seeds)
