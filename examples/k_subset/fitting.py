"""What fits have in common: minibatches and weights that are functions of the seed, Adam, and CPU time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Budget:
    """What every method gets: steps of so many rows, each with so many evaluations of the loss."""

    steps: int
    batch: int = 64
    evaluations: int = 4
    rate: float = 3e-3


@contextmanager
def one_thread() -> Iterator[None]:
    """For torch's kernels, which are too small here to gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def minimise(parameters: Iterable[nn.Parameter], rows: int, loss: Callable[[Tensor], Tensor], budget: Budget) -> float:
    """Adam on ``loss``, a function of the indices of a minibatch; the rate falls to 0 as half a cosine.

    Returns the CPU seconds of all steps but the first, in which kernels may have to be compiled.
    """
    optimizer = torch.optim.Adam(parameters, lr=budget.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / budget.steps)) / 2
    )
    began = time.process_time()
    for step, indices in enumerate(_minibatches(rows, budget)):
        optimizer.zero_grad()
        loss(indices).backward()
        optimizer.step()
        schedule.step()
        if step == 0:
            began = time.process_time()
    return time.process_time() - began


def _minibatches(rows: int, budget: Budget) -> Iterator[Tensor]:
    """Indices [batch], a new permutation for every pass; drawn from a copy of torch's generator, whatever else
    draws."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    order = torch.randperm(rows, generator=generator)
    for _ in range(budget.steps):
        if len(order) < budget.batch:
            order = torch.randperm(rows, generator=generator)
        yield order[: budget.batch]
        order = order[budget.batch :]


def network(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
