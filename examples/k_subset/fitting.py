"""What fits have in common: weights and minibatches that are functions of the seed, Adam, and CPU time.

Legend: R seeds, S subsets per row, T rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
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


class Networks(nn.Module):
    """Networks of one shape side by side, linear layers with ReLU between them: one for each seed.

    They share nothing but their steps, which cost little more than those of one, so small are the matrices.
    """

    def __init__(self, seeds: Sequence[int], *sizes: int) -> None:
        super().__init__()
        alone = [_layers(seed, sizes) for seed in seeds]
        same = list(zip(*alone, strict=True))
        self.weights = nn.ParameterList(torch.stack([one.weight.detach().T for one in layers]) for layers in same)
        self.biases = nn.ParameterList(torch.stack([one.bias.detach()[None] for one in layers]) for layers in same)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., R, T, sizes[0]] -> [..., R, T, sizes[-1]]"""
        stacked = inputs.reshape(-1, *inputs.shape[-3:]).transpose(0, 1)  # [R, S, T, size]
        found = stacked.flatten(1, 2)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            found = torch.baddbmm(bias, found.relu() if layer else found, weight)
        return found.reshape(*stacked.shape[:3], -1).transpose(0, 1).reshape(*inputs.shape[:-1], -1)


def _layers(seed: int, sizes: Sequence[int]) -> list[nn.Linear]:
    torch.manual_seed(seed)
    return [nn.Linear(size, following) for size, following in pairwise(sizes)]


def minimise(
    networks: Sequence[Networks], loss: Callable[[Tensor], Tensor], minibatches: Iterator[Tensor], budget: Budget
) -> float:
    """Adam on ``loss``, a function of the indices of minibatches; the rate falls to 0 as half a cosine.

    The loss is a mean over seeds. It divides every seed's gradient by their number, of which Adam takes no notice.

    Returns the CPU seconds of all steps but the first, in which kernels may have to be compiled.
    """
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=budget.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / budget.steps)) / 2
    )
    began = time.process_time()
    for step, indices in enumerate(minibatches):
        optimizer.zero_grad()
        loss(indices).backward()
        optimizer.step()
        schedule.step()
        if step == 0:
            began = time.process_time()
    return time.process_time() - began


def minibatches(seeds: Sequence[int], rows: int, budget: Budget) -> Iterator[Tensor]:
    """[R, batch] indices for every step: each seed's own permutation, and a new one for every pass."""
    streams = [_permuted(seed, rows, budget.batch) for seed in seeds]
    for _ in range(budget.steps):
        yield torch.stack([next(stream) for stream in streams])


def _permuted(seed: int, rows: int, batch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(rows, generator=generator)
        yield from order[: rows // batch * batch].split(batch)


def rows_of(values: Tensor, indices: Tensor) -> Tensor:
    """[R, batch, ...] of [R, T, ...], each seed's own."""
    return values[torch.arange(len(values))[:, None], indices]
