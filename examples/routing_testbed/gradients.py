"""How good a method's gradient in the router logits is, where all subsets can be enumerated.

**The truth.** For a fixed batch and fixed weights, a token's loss l(S) is that of its output with the subset S, and the
expected loss is the mean over tokens of sum_S p_t(S) l(S), an exact sum over all subsets; p_t is the distribution over
logits / temperature. The logits act on it through p_t(S) and through the weights of the chosen experts.

**All experts seen.** The gradient through the exact marginals with every expert run: what probes estimate. It differs
from the truth because a loss is not linear in the mask. Of a method that takes the mode it is the gradient at the mode,
of one that samples the expectation over its samples.

Legend: R repeats, T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import combinations, islice
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import circuitroute as cr

from .methods import BALANCED, COLD, METHODS, PUBLISHED, Build, exact_k
from .setting import Setting, Shape
from .student import Student
from .task import Task
from .training import Row, keys, new_student, one_thread, train

SHAPES = {"8x1": Shape(8, 1), "8x2": Shape(8, 2)}
EXTRA: dict[str, Build] = {
    "score-1/4": partial(exact_k, estimator="score"),
    "sampled-1/4, all": partial(exact_k, probes="all"),
    "sampled-1/4, probe": partial(exact_k, probes=1),
}
# Gradients that are those of another method, or none, or of a loss whose expectation is another.
LEFT_OUT = ("bias", "frozen", "random", *PUBLISHED, *BALANCED)
TRAINED = 150  # steps of top-k before gradients are measured
TOKENS, REPEATS = 64, 256


class Problem(NamedTuple):
    """A half-trained student's experts and logits, over tokens with targets."""

    experts: cr.StackedExperts
    circuit: cr.Circuit
    hidden: Tensor
    target: Tensor
    logits: Tensor


@one_thread()
def run(name: str, seed: int, trained: int = TRAINED, tokens: int = TOKENS, repeats: int = REPEATS) -> list[Row]:
    """A row for each method."""
    setting = Setting(held_out=tokens)
    problem = half_trained(Task(SHAPES[name], setting, seed), trained)
    rows = []
    for method, build in {**METHODS, **EXTRA}.items():
        if method not in LEFT_OUT:
            torch.manual_seed(seed)
            student = build(SHAPES[name], setting).train()
            found = {"table": "gradients", "shape": name, "method": method, "seed": seed}
            rows.append({**found, **quality(problem, student, repeats, seed)})
    return rows


def half_trained(task: Task, steps: int) -> Problem:
    """The state of top-k after so many steps."""
    student = new_student(task, "top-k")
    train(student, task, list(islice(task.batches(), steps)))
    batch, router, experts = task.held_out(), student.router, student.moe.experts
    assert isinstance(experts, cr.StackedExperts)
    with torch.no_grad():
        logits = router.logits(batch.hidden)
    return Problem(experts.requires_grad_(False), router.circuit, batch.hidden, batch.target, logits)


def quality(problem: Problem, student: Student, repeats: int, seed: int) -> dict[str, float]:
    """Cosine, bias and variance of a student's gradients against the truth, and the first two against what they would
    be if all experts were seen; bias and variance are relative to the norm, and the squared norm, of what they are
    compared with."""
    router = student.router
    temperature = COLD if isinstance(router, cr.TopKRouter) else float(router.temperature)
    draws = drawn_gradients(problem, student, repeats, seed)
    truth = true_gradient(problem, temperature)
    seen = seen_gradient(problem, temperature, sampled=router.decide is None)
    return {
        "cosine": _cosine(draws, truth),
        "bias": _bias(draws, truth),
        "variance": _variance(draws) / float(truth.square().sum()),
        "cosine_seen": _cosine(draws, seen),
        "bias_seen": _bias(draws, seen),
    }


def _cosine(draws: Tensor, reference: Tensor) -> float:
    return float(torch.cosine_similarity(draws.flatten(1), reference.flatten()[None], dim=-1).mean())


def _variance(draws: Tensor) -> float:
    return float(draws.var(0).sum())


def _bias(draws: Tensor, reference: Tensor) -> float:
    """Without what a mean of so few draws differs by from the expectation."""
    squared = float((draws.mean(0) - reference).square().sum()) - _variance(draws) / len(draws)
    return math.sqrt(max(squared, 0.0) / float(reference.square().sum()))


def drawn_gradients(problem: Problem, student: Student, repeats: int, seed: int) -> Tensor:
    """[R, T, E] float64, gradients of the loss in the logits, each with decisions and probes of its own."""
    tokens = len(problem.hidden)
    leaf = problem.logits.repeat(repeats, 1).requires_grad_()
    student.moe.experts = problem.experts
    key = torch.cat([keys(seed, repeat, tokens) for repeat in range(repeats)])
    with patch.object(student.router, "logits", return_value=leaf):
        output, routing = student(problem.hidden.repeat(repeats, 1), key)
    cost = _losses(output, problem.target.repeat(repeats, 1)).reshape(repeats, tokens)
    loss = cost.sum() / tokens
    if student.router.estimator == "score":
        loss = loss + repeats * cr.estimators.score_function_loss(routing.log_prob.reshape(repeats, tokens), cost)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.reshape(repeats, tokens, -1).double()


def true_gradient(problem: Problem, temperature: float) -> Tensor:
    """[T, E] float64, of the expected loss."""
    leaf = problem.logits.detach().double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for mask in every_subset(problem):
        routing = cr.route(leaf, problem.circuit, replay=mask, estimator="none", decide="mode", temperature=temperature)
        output, _ = cr.MoE(None, problem.experts)(problem.hidden, routing=routing)
        expected = expected + (routing.log_prob.exp() * _losses(output.double(), problem.target)).mean()
    (gradient,) = torch.autograd.grad(expected, leaf)
    return gradient


def seen_gradient(problem: Problem, temperature: float, sampled: bool) -> Tensor:
    """[T, E] float64, through the exact marginals with all experts run: at the mode, or the mean over samples."""
    mode = problem.circuit(problem.logits).mode_mask()
    total = torch.zeros_like(problem.logits, dtype=torch.float64)
    for mask in every_subset(problem) if sampled else [mode]:
        leaf = problem.logits.detach().requires_grad_()
        routing = cr.route(leaf, problem.circuit, replay=mask, temperature=temperature)
        output, _ = cr.MoE(None, problem.experts, probes="all").train()(problem.hidden, routing=routing)
        (gradient,) = torch.autograd.grad(_losses(output, problem.target).mean(), leaf)
        share = routing.log_prob.detach().exp()[:, None] if sampled else 1.0
        total += share * gradient
    return total


def every_subset(problem: Problem) -> Iterator[Tensor]:
    """[T, E] bool each, the same for all tokens."""
    tokens, experts = problem.logits.shape
    for chosen in combinations(range(experts), problem.circuit.max_count):
        mask = torch.zeros(tokens, experts, dtype=torch.bool)
        mask[:, list(chosen)] = True
        yield mask


def _losses(output: Tensor, target: Tensor) -> Tensor:
    """[T], with the mean that students are trained on."""
    return (output - target).square().sum(-1) / target.square().sum(-1).mean()
