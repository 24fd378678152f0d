"""Routing decisions to learn from: those of the demo's model on held-out text.

Shapes: T tokens, L layers, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from language_model.config import DemoConfig
from language_model.texts import load_corpus
from language_model.trainee import Setting, start
from language_model.training import train
from torch import Tensor

import circuitroute as cr

# By name of the router, what each of its layers allows.
ROUTERS = {"exact-k-0.25": cr.Exactly(4), "range-k-calibrated": cr.Between(2, 8)}


class Decisions(NamedTuple):
    """[T, L, E] bool: what the trained model decides on two parts of the held-out text, the later one to judge by."""

    fit: Tensor
    test: Tensor


def recorded(router: str, seed: int, steps: int, batches: int, directory: Path) -> Decisions:
    """The decisions of a model of the demo, trained now; two thirds of the held-out windows are to be fitted."""
    config = DemoConfig(
        steps=steps, seed=seed, routers=(router,), validations=1, validation_batches=batches, oracle_rounds=0
    )
    setting = Setting(config, load_corpus(config), torch.device("cpu"), directory)
    trainee = start(setting, router, resume=False)
    train(trainee, lambda event: None, stop=lambda: False)
    model = trainee.model.eval()
    with torch.no_grad():
        routings = [model(tokens[:, :-1])[1] for tokens in setting.corpus.validation(config)]
    records = [cr.RoutingRecord.of([routing.mask for routing in layers]) for layers in routings]
    split = 2 * len(records) // 3
    return Decisions(*(_masks(cr.RoutingRecord.cat(part)) for part in (records[:split], records[split:])))


def _masks(record: cr.RoutingRecord) -> Tensor:
    return torch.stack(record.masks(), 1)
