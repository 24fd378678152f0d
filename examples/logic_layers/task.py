"""A task: features, labels that satisfy a constraint, and the circuit that says which do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import circuitroute as cr


@dataclass(frozen=True)
class Part:
    """Rows of features [T, H] and labels [T, N] bool."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Task:
    """Rows to learn from, to choose settings by, and to be judged by.

    Attributes:
        known: [T, N] bool, which labels of the rows to learn from are known.
    """

    name: str
    circuit: cr.Circuit
    train: Part
    validation: Part
    test: Part
    known: Tensor

    @staticmethod
    def split(
        name: str, circuit: cr.Circuit, x: Tensor, y: Tensor, train: int, validation: int, known: Tensor | None = None
    ) -> Task:
        """The first rows are to learn from, the next ones to choose by, the others to be judged by."""
        places = (slice(train), slice(train, train + validation), slice(train + validation, None))
        learn, choose, judge = (Part(x[place], y[place]) for place in places)
        known = torch.ones_like(learn.y) if known is None else known
        return Task(name, circuit, learn, choose, judge, known)
