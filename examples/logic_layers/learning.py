"""The methods, trained alike: one network, one optimiser, one number of steps; last layer and loss differ.

Legend: T rows, N labels.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import circuitroute as cr

from .task import Part, Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """How labels are learned and predicted.

    Attributes:
        name: as in the table.
        layer: whether the last layer is a ConstraintLayer, trained by its likelihood; else N sigmoid outputs.
        components: of the layer.
        semantic: the weights of semantic loss to choose from, beside cross-entropy.
        project: whether the prediction is the most probable allowed subset, rather than each label above one half.
    """

    name: str
    layer: bool = False
    components: int | None = None
    semantic: tuple[float, ...] = (0.0,)
    project: bool = False


METHODS = (
    Method("sigmoid"),
    Method("sigmoid, mode at test time", project=True),
    Method("sigmoid + semantic loss", semantic=(0.005, 0.05, 0.5, 5.0)),
    Method("ConstraintLayer", layer=True),
    Method("ConstraintLayer, 4 gates", layer=True, components=4),
)


@dataclass(frozen=True)
class Setting:
    """What all methods share."""

    width: int = 128
    epochs: int = 40
    batch: int = 100
    rate: float = 2e-3
    every: int = 5  # epochs between looks at the rows to choose by


def run(task: Task, seed: int, setting: Setting, methods: tuple[Method, ...] = METHODS) -> list[Row]:
    """A row per method: how it predicts rows to be judged by, at the epoch and weight that were best on others."""
    found = []
    for method in methods:
        trained = [_train(task, method, weight, seed, setting) for weight in method.semantic]
        score, weight, net, seconds = max(trained, key=lambda result: result[0])
        row = {"task": task.name, "method": method.name, "seed": seed, "semantic_weight": weight, "validation": score}
        found.append(row | judge(task.circuit, predict(net, task, method, task.test), task.test) | {"seconds": seconds})
    return found


def judge(circuit: cr.Circuit, predicted: Tensor, part: Part) -> Row:
    """Exact match, Hamming loss, micro-averaged F1, and the share of rows that violate the constraint."""
    wrong = predicted != part.y
    hits = (predicted & part.y).sum()
    return {
        "exact": (~wrong.any(-1)).double().mean().item(),
        "hamming": wrong.double().mean().item(),
        "f1": (2 * hits / (predicted.sum() + part.y.sum()).clamp(min=1)).item(),
        "violations": (~circuit.satisfies(predicted)).double().mean().item(),
    }


@torch.no_grad()
def predict(net: nn.Module, task: Task, method: Method, part: Part) -> Tensor:
    """[T, N] bool."""
    out = net(part.x)
    if method.layer or method.project:
        found: Tensor = (out if method.layer else task.circuit(out)).mode
        return found.bool()
    return torch.as_tensor(out > 0)


def network(task: Task, method: Method, width: int) -> nn.Module:
    """Two hidden layers, and a map to N logits: under a sigmoid each, or under the constraint."""
    head: nn.Module = nn.Linear(width, task.circuit.n)
    if method.layer:
        head = cr.nn.ConstraintLayer(task.circuit, in_features=width, components=method.components)
    inputs = task.train.x.shape[-1]
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), head)


def loss(out: Any, labels: Tensor, known: Tensor, task: Task, semantic: float) -> Tensor:
    """Mean over rows: minus the log-likelihood of the labels that are known, and the weighted semantic loss."""
    if not isinstance(out, Tensor):  # a distribution
        return -cr.nn.log_likelihood(out, labels, known).mean()
    each = F.binary_cross_entropy_with_logits(out, labels.float(), reduction="none")
    found = torch.where(known, each, 0.0).sum(-1)
    if semantic:
        found = found + semantic * cr.losses.semantic_loss(task.circuit(out))
    return found.mean()


def _train(
    task: Task, method: Method, semantic: float, seed: int, setting: Setting
) -> tuple[float, float, nn.Module, float]:
    """(exact match on the rows to choose by, weight of semantic loss, network, CPU seconds of the steps)."""
    torch.manual_seed(seed)
    net = network(task, method, setting.width)
    optimizer = torch.optim.Adam(net.parameters(), lr=setting.rate)
    shuffle = torch.Generator().manual_seed(seed)
    best, kept, seconds = -1.0, net.state_dict(), 0.0
    for epoch in range(setting.epochs):
        began = time.process_time()
        for rows in torch.randperm(len(task.train.x), generator=shuffle).split(setting.batch):
            optimizer.zero_grad()
            loss(net(task.train.x[rows]), task.train.y[rows], task.known[rows], task, semantic).backward()
            optimizer.step()
        seconds += time.process_time() - began
        if (epoch + 1) % setting.every == 0 or epoch + 1 == setting.epochs:
            score = judge(task.circuit, predict(net, task, method, task.validation), task.validation)["exact"]
            if score > best:
                best, kept = score, copy.deepcopy(net.state_dict())
    net.load_state_dict(kept)
    return best, semantic, net, seconds
