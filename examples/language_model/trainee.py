"""A model in training, and the checkpoint from which it resumes exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import circuitroute as cr

from . import checkpoint
from .config import DemoConfig, DemoError, Run, require
from .corpus import Corpus
from .evaluation import Evaluation
from .model import LanguageModel, build_model, common_name, is_matrix

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
    violations: list[float] = field(default_factory=list)  # one per step: max violation of the batch, mean over layers

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
    """What all routers of a run share.

    pretrained: the checkpoint that their weights start from, if any.
    regime: of a study that has several.
    """

    config: DemoConfig
    corpus: Corpus
    device: torch.device
    checkpoints: Path
    pretrained: Path | None = None
    regime: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with for a run to resume from it."""
        return {"config": self.config.to_json(), "text": self.corpus.digest}

    def checkpoint(self, router: str) -> Path:
        return self.checkpoints / f"{router}.safetensors"


@dataclass
class Trainee:
    """A model, its optimizer and its record, which change together: a checkpoint is written between steps only.

    log: where what the routers do is written, every few steps, for `circuitroute report`; None: nowhere.
    """

    setting: Setting
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    record: Record
    log: cr.metrics.RunLog | None = None

    @property
    def run(self) -> Run:
        return Run(self.record.router, self.setting.config.k, self.setting.config.seed, self.setting.regime)

    def save(self) -> None:
        """Raises OSError where the disk refuses."""
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, weight in self.model.named_parameters():
            if self.record.finished:
                break  # nothing is left for the optimizer to do
            state = self.optimizer.state.get(weight, {})  # empty for what has had no gradient yet
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        state = {**self.setting.identity, "record": self.record.to_json()}
        checkpoint.save(self.setting.checkpoint(self.record.router), tensors, state)

    def restore(self, record: Record) -> None:
        """Resumes from the checkpoint of this record. Raises DemoError when it is damaged or another model's."""
        tensors = checkpoint.load_tensors(self.setting.checkpoint(self.record.router))
        values = self.model.state_dict()
        same = {f"model.{name}" for name in values} == {name for name in tensors if name.startswith("model.")}
        require(same, "the checkpoint holds another model's tensors: start again without --resume", "resume")
        with torch.no_grad():
            for name, value in values.items():  # the thresholds of soft routers too, which are not parameters
                value.copy_(tensors[f"model.{name}"])
        self.optimizer.load_state_dict(_optimizer_state(self.optimizer, tensors))
        self.record = record


def start(setting: Setting, router: str, resume: bool) -> Trainee:
    """A trainee at step 0, or where its checkpoint left it."""
    model = build_model(setting.config, router)
    if setting.pretrained is not None:
        adopt(model, checkpoint.load_tensors(setting.pretrained))
    model = model.to(setting.device)
    trainee = Trainee(setting, model, _optimizer(model, setting), Record(router))
    record = saved_record(setting, router) if resume else None
    if record is not None:
        trainee.restore(record)
    return trainee


@torch.no_grad()
def adopt(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Takes the weights of a checkpoint, whatever its router was; a plan's own tables keep their start. Raises
    DemoError when it is of another model."""
    for name, weight in model.named_parameters():
        found = tensors.get(f"model.{common_name(name)}")
        if found is None and name.startswith("plan."):
            continue
        same = found is not None and found.shape == weight.shape
        require(same, f"the pretrained model has no {name} of shape {list(weight.shape)}", "resume")
        weight.copy_(cast(Tensor, found))


def _optimizer(model: LanguageModel, setting: Setting) -> torch.optim.Optimizer:
    """AdamW: weight decay for matrices alone, and a rate of their own for the tables of a plan."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [(name, weight) for name, weight in named if is_matrix(name, weight)]
    rest = [(name, weight) for name, weight in named if not is_matrix(name, weight)]
    tables = [(name, weight) for name, weight in rest if name.startswith("plan.")]
    others = [(name, weight) for name, weight in rest if not name.startswith("plan.")]
    groups = [
        {"params": matrices, "weight_decay": setting.config.weight_decay, "scale": 1.0},
        {"params": others, "weight_decay": 0.0, "scale": 1.0},
        {"params": tables, "weight_decay": 0.0, "scale": setting.config.table_rate},
    ]
    fused = setting.device.type in ("cpu", "cuda")  # one kernel instead of a dozen per tensor
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, fused=fused)


def saved_record(setting: Setting, router: str) -> Record | None:
    """The record in a router's checkpoint, None where there is none yet. Raises DemoError when it is damaged, of
    another format, or from a run with another configuration or text."""
    path = setting.checkpoint(router)
    if not checkpoint.exists(path):
        return None
    state = checkpoint.load_state(path)
    for part, wanted in setting.identity.items():
        same = state.get(part) == wanted
        require(same, f"{path} was written with another {part}: start again without --resume", "resume")
    try:
        return Record.from_json(state["record"])
    except (KeyError, TypeError) as error:
        raise DemoError(
            f"a checkpoint's record is damaged ({error!r}): start again without --resume", "resume"
        ) from None


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The optimizer's state_dict with the checkpoint's tensors in it, keyed by parameter number as in torch."""
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    for number, name in ((n, name) for g in groups for n, name in zip(g["params"], g["param_names"], strict=True)):
        prefix = f"optimizer.{name}."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if found:
            state[number] = found
    return {"state": state, "param_groups": groups}
