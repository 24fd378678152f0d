"""What a demo run is made of: one frozen dataclass, validated when it is built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

ROUTERS = ("top-k", "exact-k", "range-k")  # what the demo compares unless told otherwise
ALL_ROUTERS = (*ROUTERS, "soft-uniform", "soft-learned", "budget")
HEAD_SIZE = 32


class DemoError(ValueError):
    """Something the user can put right; `argument` names the option to change, where one is to blame."""

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides a run's numbers, except the device and the number of threads.

    A checkpoint stores it, and a run resumes only from a checkpoint with an equal one. The second block has
    no options on the command line. Raises DemoError naming the option, its value and the remedy.
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
            _require_at_least(name, getattr(self, name), 1)
        _require_at_least("seed", self.seed, 0)
        _require_at_least("seq_len", self.seq_len, 8)
        if self.seed >= 2**31:
            raise DemoError(f"must be below 2**31, got {self.seed}", "seed")
        if self.experts < 2:
            raise DemoError("must be at least 2 for there to be something to route, got 1", "experts")
        if self.k > self.experts:
            raise DemoError(
                f"must be at most the number of experts, {self.experts}, got {self.k}: a smaller --k or more --experts",
                "k",
            )
        if self.hidden < HEAD_SIZE or self.hidden % HEAD_SIZE:
            raise DemoError(
                f"must be a positive multiple of {HEAD_SIZE} (one attention head), got {self.hidden}",
                "hidden",
            )
        self._check_routers()

    def _check_routers(self) -> None:
        unknown = [name for name in self.routers if name not in ALL_ROUTERS]
        if unknown or not self.routers:
            given = ", ".join(map(repr, unknown)) or "none"
            raise DemoError(f"must name some of {', '.join(ALL_ROUTERS)}, got {given}", "routers")
        if len(set(self.routers)) < len(self.routers):
            raise DemoError(f"names a router twice: {' '.join(self.routers)}", "routers")

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


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise DemoError(f"must be at least {least}, got {value}", name)
