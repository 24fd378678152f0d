"""A model in training, and the checkpoint from which it resumes exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .config import DemoConfig, DemoError, Run
from .corpus import Corpus
from .evaluation import Evaluation
from .model import LanguageModel, build_model, is_matrix

BETAS = (0.9, 0.95)


@dataclass
class Record:
    """All that is known about one router's run but its tensors: what a checkpoint holds as JSON."""

    router: str
    step: int = 0
    losses: list[float] = field(default_factory=list)  # one per step, nats per byte
    evaluations: list[Evaluation] = field(default_factory=list)
    swap_correlation: float | None = None
    finished: bool = False
    training_seconds: float = 0.0
    seconds: float = 0.0  # with validation and the swap oracle

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        """The inverse of to_json. Raises TypeError or KeyError on values that it did not write."""
        evaluations = [Evaluation(**evaluation) for evaluation in values["evaluations"]]
        return cls(**{**values, "evaluations": evaluations})

    @property
    def last(self) -> Evaluation | None:
        """The latest evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    def tokens_per_second(self, config: DemoConfig) -> float | None:
        """The speed of training."""
        return self.step * config.tokens_per_step / self.training_seconds if self.training_seconds else None


@dataclass(frozen=True)
class Setting:
    """What all routers of a run share."""

    config: DemoConfig
    corpus: Corpus
    device: torch.device
    checkpoints: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with for a run to resume from it."""
        return {"config": self.config.to_json(), "text": self.corpus.digest}

    def checkpoint(self, router: str) -> Path:
        return self.checkpoints / f"{router}.safetensors"


@dataclass
class Trainee:
    """A model, its optimizer and its record, which change together: a checkpoint is written between steps only."""

    setting: Setting
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    record: Record

    @property
    def run(self) -> Run:
        return Run(self.record.router, self.setting.config.k, self.setting.config.seed)

    def save(self) -> None:
        """Raises OSError where the disk refuses."""
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, weight in self.model.named_parameters():
            state = self.optimizer.state.get(weight, {})  # empty for an expert that no token has used yet
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        state = {**self.setting.identity, "record": self.record.to_json()}
        checkpoint.save(self.setting.checkpoint(self.record.router), tensors, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint. Raises DemoError when it is damaged or holds another model's tensors."""
        tensors = checkpoint.load_tensors(self.setting.checkpoint(self.record.router))
        weights, values = dict(self.model.named_parameters()), self.model.state_dict()
        if {f"model.{name}" for name in values} != {name for name in tensors if name.startswith("model.")}:
            raise DemoError("the checkpoint holds another model's tensors: start again without --resume", "resume")
        with torch.no_grad():
            for name, value in values.items():  # the thresholds of soft routers too, which are not parameters
                value.copy_(tensors[f"model.{name}"])
        self.optimizer.load_state_dict(_optimizer_state(self.optimizer, weights, tensors))
        self.record = record_of(state)


def start(setting: Setting, router: str, resume: bool) -> Trainee:
    """A trainee at step 0, or where its checkpoint left it."""
    model = build_model(setting.config, router).to(setting.device)
    matrices: list[Tensor] = []
    tables: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in model.named_parameters():
        if is_matrix(name, weight):
            matrices.append(weight)
        else:
            (tables if name.startswith("plan.") else others).append(weight)
    groups = [
        {"params": matrices, "weight_decay": setting.config.weight_decay, "scale": 1.0},
        {"params": others, "weight_decay": 0.0, "scale": 1.0},
    ]
    if tables:
        groups.append({"params": tables, "weight_decay": 0.0, "scale": setting.config.table_rate})
    fused = setting.device.type in ("cpu", "cuda")  # one kernel instead of a dozen per tensor
    trainee = Trainee(setting, model, torch.optim.AdamW(groups, betas=BETAS, fused=fused), Record(router))
    state = saved_state(setting, router) if resume else None
    if state is not None:
        trainee.restore(state)
    return trainee


def saved_state(setting: Setting, router: str) -> dict[str, Any] | None:
    """A router's checkpoint without its tensors, None where there is none yet. Raises DemoError when it is damaged, of
    another format, or from a run with another configuration or text."""
    path = setting.checkpoint(router)
    if path.with_suffix(".json").exists():
        raise DemoError(
            f"{path.with_suffix('.json')} has format 1, this version reads format {checkpoint.CHECKPOINT_FORMAT}: "
            "start again without --resume",
            "resume",
        )
    if not path.exists():
        return None
    state = checkpoint.load_state(path)
    for part, wanted in setting.identity.items():
        if state.get(part) != wanted:
            raise DemoError(f"{path} was written with another {part}: start again without --resume", "resume")
    return state


def record_of(state: dict[str, Any]) -> Record:
    """The record in a checkpoint's state. Raises DemoError when it is damaged."""
    try:
        return Record.from_json(state["record"])
    except (KeyError, TypeError) as error:
        raise DemoError(
            f"a checkpoint's record is damaged ({error!r}): start again without --resume", "resume"
        ) from None


def _optimizer_state(
    optimizer: torch.optim.Optimizer, weights: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The optimizer's state_dict with the checkpoint's tensors in it, keyed by parameter number as in torch."""
    names = {weight: name for name, weight in weights.items()}
    ordered = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for number, name in enumerate(ordered):
        prefix = f"optimizer.{name}."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if found:
            state[number] = found
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
