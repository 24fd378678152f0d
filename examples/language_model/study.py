"""The study of budgets: which runs it is made of, and what they come to over the seeds.

All routers of a study execute k experts per token and layer, or are held near it: see docs/study-budgets.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from .config import ALL_ROUTERS, DemoConfig, DemoError
from .corpus import Corpus
from .trainee import Record, Setting, record_of, saved_state

STUDIES = ("budgets",)
REFERENCE = "top-k"  # what differences are taken to, run by run of the same seed
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
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            given = " ".join(map(str, self.budgets)) or "none"
            raise DemoError(f"must name different numbers of experts, got {given}", "budgets")
        for k in self.budgets:
            if not 1 <= k <= self.base.experts:
                raise DemoError(
                    f"must lie between 1 and the number of experts, {self.base.experts}, got {k}: other --budgets, or "
                    "more --experts",
                    "budgets",
                )
        if self.seeds < 1:
            raise DemoError(f"must be at least 1, got {self.seeds}", "seeds")
        self.config(self.budgets[0], self.base.seed + self.seeds - 1)  # the last seed may be too large

    def runs(self) -> list[Run]:
        """Seed by seed, so that a study that is stopped has compared all routers on the seeds it got to."""
        seeds = range(self.base.seed, self.base.seed + self.seeds)
        return [Run(router, k, seed) for seed in seeds for k in self.budgets for router in self.base.routers]

    def config(self, k: int, seed: int) -> DemoConfig:
        """The configuration of the runs with this budget and seed."""
        return dataclasses.replace(self.base, k=k, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """What from_json takes."""
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


@dataclass(frozen=True)
class Study:
    """A study's configuration, text, device and place on disk."""

    config: StudyConfig
    corpus: Corpus
    device: torch.device
    checkpoints: Path

    def setting(self, run: Run) -> Setting:
        """What a run shares with the others of its budget and seed."""
        config = self.config.config(run.k, run.seed)
        return Setting(config, self.corpus, self.device, self.checkpoints / f"k{run.k}-seed{run.seed}")

    def record(self, run: Run) -> Record | None:
        """What the checkpoint of a run holds; None where there is none yet. Raises DemoError when it is damaged."""
        state = saved_state(self.setting(run), run.router)
        return None if state is None else record_of(state)


# ---------------------------------------------------------------------------------------------- the numbers


def row_of(run: Run, record: Record, config: DemoConfig) -> dict[str, Any]:
    """One run as a flat row; None where nothing has been measured. Totals are a token's, over all layers."""
    last = record.evaluations[-1] if record.evaluations else None
    row: dict[str, Any] = {**run._asdict(), "steps": record.step, "finished": record.finished}
    row["seconds"] = record.seconds
    tokens = record.step * config.tokens_per_step
    row["tokens_per_second"] = tokens / record.training_seconds if record.training_seconds else None
    row["bits_per_byte"] = last and last.bits_per_byte
    row["executed_per_layer"] = last and [math.fsum(layer) for layer in last.utilization]
    row["soft_mass_per_layer"] = last and last.soft_mass
    row["soft_mass"] = fmean(last.soft_mass) if last and last.soft_mass else None
    row["load_entropy"] = last and last.load_entropy
    row["max_violation"] = last and last.max_violation
    row["budget"] = config.layers * config.k
    row["totals"] = last and last.executed_totals
    row |= _of_totals(last.executed_totals, row["budget"], config.layers) if last else dict.fromkeys(_OF_TOTALS)
    return row


_OF_TOTALS = ("executed", "total_mean", "total_spread", "total_max", "over_budget", "over_budget_share")


def _of_totals(histogram: Sequence[int], budget: int, layers: int) -> dict[str, Any]:
    """Read off the tokens that execute 0, 1, ... experts: the mean per layer, and the total's mean, standard deviation
    over tokens, largest value, and the tokens above the budget."""
    tokens = sum(histogram)
    mean = sum(total * count for total, count in enumerate(histogram)) / tokens
    variance = sum((total - mean) ** 2 * count for total, count in enumerate(histogram)) / tokens
    over = sum(histogram[budget + 1 :])
    largest = max(total for total, count in enumerate(histogram) if count)
    return dict(zip(_OF_TOTALS, (mean / layers, mean, math.sqrt(variance), largest, over, over / tokens), strict=True))


SUMMARISED = (
    "bits_per_byte",
    "difference",
    "executed",
    "soft_mass",
    "total_spread",
    "over_budget_share",
    "load_entropy",
    "max_violation",
    "tokens_per_second",
)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per budget and router, in the order they first appear: means and spreads over the finished runs.

    A spread is the sample standard deviation, None for a single seed. `difference` is in bits per byte, to top-k with
    the same budget and seed; so `difference_spread` leaves out what the seeds have in common.
    """
    finished = [row for row in rows if row["finished"]]
    reference = {(row["k"], row["seed"]): row["bits_per_byte"] for row in finished if row["router"] == REFERENCE}
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in finished:
        base = reference.get((row["k"], row["seed"]))
        difference = None if base is None else row["bits_per_byte"] - base
        groups.setdefault((row["k"], row["router"]), []).append({**row, "difference": difference})
    # Interrupted studies have groups of any sizes; budgets stay together.
    budgets = list(dict.fromkeys(k for k, _ in groups))
    return [_summary(k, router, groups[k, router]) for b in budgets for k, router in groups if k == b]


def _summary(k: int, router: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"router": router, "k": k, "budget": rows[0]["budget"], "seeds": len(rows)}
    for name in SUMMARISED:
        summary[name], summary[f"{name}_spread"] = _mean_and_spread([row[name] for row in rows])
    for name in ("executed_per_layer", "soft_mass_per_layer"):
        layers = [row[name] for row in rows if row[name] is not None]
        found = [_mean_and_spread(values) for values in zip(*layers, strict=True)]
        summary[name] = [mean for mean, _ in found] or None
        summary[f"{name}_spread"] = [spread for _, spread in found] or None
    summary["over_budget"] = sum(row["over_budget"] for row in rows)
    summary["total_max"] = max(row["total_max"] for row in rows)
    summary["totals"] = [sum(counts) for counts in zip(*(row["totals"] for row in rows), strict=True)]
    return summary


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return fmean(known), stdev(known) if len(known) > 1 else None
