"""What a run and a study are made of: frozen dataclasses, validated when they are built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

ROUTERS = ("top-k", "exact-k-0.25", "range-k-calibrated")  # what the demo compares unless told otherwise
# All of them; `kinds` says what they are.
ALL_ROUTERS = (
    "top-k",
    "exact-k",
    "range-k",
    "soft-uniform",
    "soft-learned",
    "budget",
    "exact-k-0.5",
    "exact-k-0.25",
    "exact-k-annealed",
    "exact-k-none",
    "mode",
    "probe",
    "probes-all",
    "densemixer",
    "range-k-calibrated",
    "range-k-controlled",
    "budget-calibrated",
    "frozen",
    "dropout-0.1",
    "dropout-0.2",
    "dropout-0.3",
    "top-k-bias",
    "mode-bias",
    "probe-bias",
    "top-k-free",
    "top-k-quantile",
    "top-k-exact",
    "mode-free",
    "mode-quantile",
    "mode-exact",
    "top-k-again",
)
HEAD_SIZE = 32
STUDIES = ("balance", "budgets", "learning")
REGIMES = ("scratch", "plenty", "little")  # of the study of learning
Language = Literal["python", "c++", "english"]


class DemoError(ValueError):
    """Something the user can put right; `argument` names the option to change, where one is to blame."""

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


def require(condition: bool, message: str, argument: str) -> None:
    if not condition:
        raise DemoError(message, argument)


def plain(value: Any) -> Any:
    """A number or flag as Python's own: JSON, in which configurations are kept, knows none of NumPy's or torch's."""
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0:
        return tuple(map(plain, value))
    return value.item() if hasattr(value, "item") else value


def keep_plain(config: Any) -> None:
    """Make all fields of a frozen dataclass plain."""
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, plain(getattr(config, field.name)))


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
    test_batches: int = 0  # of a second held-out part, for runs that choose their best step on the first
    oracle_sequences: int = 16
    oracle_rounds: int = 32  # 0: no swap oracle

    language: Language = "python"  # of the text, where no file is given
    text_limit: int | None = None  # bytes of training text; the rest is not read
    passes: bool = False  # whether every pass reads each window of the training text once, instead of windows at random
    pretrained_steps: int = 0  # of the run with top-k on Python that the weights come from; 0: drawn at random

    def __post_init__(self) -> None:
        keep_plain(self)
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
    """One training run: a router, the experts it may execute per token and layer, a seed, and the regime, if a study
    has several."""

    router: str
    k: int
    seed: int
    regime: str = ""

    def __str__(self) -> str:
        regime = f"{self.regime}: " if self.regime else ""
        return f"{regime}{self.router}, k = {self.k}, seed {self.seed}"
