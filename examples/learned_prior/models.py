"""What is fitted to decisions, and how many bits it needs for others.

Shapes: T decisions, N experts (of one layer, or of all layers of a token).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import circuitroute as cr

SMOOTHING = 0.5  # observations, added to every distribution of a prior; half a one to each outcome of a coin
EM_STEPS = 60
GRADIENT_STEPS = 150
RATE = 0.2  # of Adam; 0.05 and 0.1 were slower
BATCH = 1024  # of mini-batches
STEP_SIZE = 0.5  # of EM on them


class Fit(NamedTuple):
    """A fitted distribution: the log-probability of masks [T, N], and the CPU seconds that fitting took."""

    log_prob: Callable[[Tensor], Tensor]
    seconds: float


@torch.no_grad()
def bits(log_prob: Callable[[Tensor], Tensor], masks_TN: Tensor) -> float:
    """Per decision: what an ideal entropy coder that is told this distribution would take, on average."""
    rows, counts = torch.unique(masks_TN, dim=0, return_counts=True)
    return -float((log_prob(rows).double() * counts).sum() / counts.sum()) / math.log(2)


def baselines(masks_TN: Tensor, circuit: cr.Circuit) -> Iterator[tuple[str, Fit]]:
    """What knows no more than each expert's share and the counts; ``circuit`` is what the router allows."""
    yield "any allowed subset", _timed(lambda: circuit(torch.zeros(circuit.n)).log_prob)
    yield "independent coins", _timed(lambda: _coins(masks_TN))
    yield "count, then any subset", _timed(lambda: _counted(masks_TN))
    yield "coins times constraint", _timed(lambda: _tilted(masks_TN, circuit))


def _timed(fit: Callable[[], Callable[[Tensor], Tensor]]) -> Fit:
    began = time.process_time()
    return Fit(fit(), time.process_time() - began)


def _coins(masks_TN: Tensor) -> Callable[[Tensor], Tensor]:
    share_N = (masks_TN.sum(0).double() + 0.5) / (len(masks_TN) + 1)
    return lambda masks: torch.where(masks, share_N, 1 - share_N).log().sum(-1)


def _counted(masks_TN: Tensor) -> Callable[[Tensor], Tensor]:
    """One distribution of the count, all subsets of a count being alike."""
    n = masks_TN.shape[1]
    counts = masks_TN.sum(-1).bincount(minlength=n + 1).double() + 0.5
    ways = torch.tensor([math.comb(n, k) for k in range(n + 1)], dtype=torch.float64)
    log_each = (counts / counts.sum() / ways).log()
    return lambda masks: log_each[masks.sum(-1)]


def _tilted(masks_TN: Tensor, circuit: cr.Circuit) -> Callable[[Tensor], Tensor]:
    """The exponential family on the allowed subsets: logits, and a potential of the count where there is a choice."""
    logits = torch.zeros(circuit.n, dtype=torch.float64, requires_grad=True)
    potential: Tensor | None = None
    if circuit.counts is not None and len(circuit.counts) > 1:
        potential = torch.zeros(circuit.max_count + 1, dtype=torch.float64, requires_grad=True)
    rows, counts = torch.unique(masks_TN, dim=0, return_counts=True)
    weights = counts.double() / counts.sum()
    free = [logits] if potential is None else [logits, potential]
    solver = torch.optim.LBFGS(free, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        # A thousandth of a square keeps an expert that is never chosen from running off to minus infinity.
        fit = -(circuit(logits, potential).log_prob(rows) * weights).sum()
        value: Tensor = fit + 1e-3 / len(masks_TN) * logits.square().sum()
        torch.autograd.backward(value)
        return value

    solver.step(loss)
    found = circuit(logits.detach(), None if potential is None else potential.detach())
    return found.log_prob


class Trained(NamedTuple):
    """A prior, and the CPU seconds that training it took."""

    prior: cr.SubsetPrior
    seconds: float


# After every step: the number of steps, the CPU seconds so far, and the prior.
Watch = Callable[[int, float, cr.SubsetPrior], None]


def train_prior(
    masks_TN: Tensor,
    method: str,
    steps: int,
    watch: Watch | None = None,
    circuit: cr.Circuit | None = None,
    **options: Any,
) -> Trained:
    """A prior fitted by ``"em"``, ``"em-batches"``, ``"adam"`` or ``"adam-batches"``; options are SubsetPrior's.

    With a ``circuit`` the loss of Adam is that of the prior under the constraint, which EM cannot have.
    """
    prior = cr.SubsetPrior(masks_TN.shape[1], **options)
    rows, counts = torch.unique(masks_TN, dim=0, return_counts=True)
    weights = counts.double()
    optimizer = torch.optim.Adam(prior.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(prior.seed)
    spent = 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        batch, counted = rows, weights
        if method.endswith("batches"):
            batch = masks_TN[torch.randint(len(masks_TN), (BATCH,), generator=generator)]
            counted = torch.ones(BATCH, dtype=torch.float64)
        if method.startswith("em"):
            prior.em_step(batch, 1.0 if method == "em" else STEP_SIZE, SMOOTHING, weights=counted)
        else:
            optimizer.zero_grad()
            log_prob = (prior if circuit is None else prior.constrained(circuit)).log_prob(batch)
            (-(log_prob * counted).sum() / counted.sum()).backward()
            optimizer.step()
        spent += time.process_time() - began
        if watch is not None:
            watch(step, spent, prior)
    return Trained(prior, spent)
