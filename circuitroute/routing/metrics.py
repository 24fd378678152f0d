"""What a router does: load, diversity, and whether its gradient points the right way.

Legend: T tokens, E experts, S swaps, G groups of tokens.

Load metrics take a :class:`Routing` or a mask [T, E] of the executed experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitroute._validate import as_number, as_real, int_at_least
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.temperature import MIN_TEMPERATURE
from circuitroute.keys import random_key, uniform
from circuitroute.routing.agreement import executed, expected_agreement
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.route import route
from circuitroute.routing.runs import RunLog as RunLog
from circuitroute.routing.summary import summary as summary
from circuitroute.routing.weights import Combine


def utilization(decisions: Routing | Tensor) -> Tensor:
    """[E] float64, the fraction of tokens that use each expert."""
    mask = executed(decisions)
    return mask.sum(0).double() / max(1, len(mask))


def load_entropy(decisions: Routing | Tensor) -> float:
    """Entropy of the load distribution over experts, divided by log E: 1 when balanced, 0 when one takes all."""
    load = executed(decisions).sum(0).double()
    if load.numel() == 1:
        return 1.0
    share = load / load.sum().clamp(min=1)
    return float(torch.special.entr(share).sum()) / math.log(len(load))


def max_violation(decisions: Routing | Tensor) -> float:
    """(largest load - mean load) / mean load (MaxVio of Wang et al. 2024, arXiv:2408.15664); 0 when balanced."""
    load = executed(decisions).sum(0).double()
    mean = float(load.mean())
    return float(load.max()) / mean - 1.0 if mean > 0 else 0.0


def mode_agreement(routing: Routing) -> Tensor:
    """[T] the share of the most probable subset that a sample is expected to choose: (sum of m_e over it) / its size.

    Exact. 1 where samples always are the mode; near k / E where they are nearly uniform, and experts are trained on
    tokens that the mode will not send them. Below 0.5, lower the temperature
    (:meth:`circuitroute.Router.calibrate_temperature`). An empty mode counts the probability of choosing nothing.
    For a layer under a budget this is the mode of its distribution, not the rule by which evaluation decides.

    Raises:
        TypeError: anything but a Routing.
        AttributeError: a :class:`SoftRouting`, which has no distribution.
    """
    if not isinstance(routing, Routing):
        raise TypeError(
            f"routing is a {type(routing).__name__}: expected the Routing that a router returned, since a mask alone "
            "has no distribution"
        )
    with torch.no_grad():
        return expected_agreement(routing.distribution, routing.untempered.mode_mask())


# Temperatures beyond these times the spread of the logits are as good as 0 and infinity.
_COLDEST, _HOTTEST = 1e-6, 1e6


def temperature_for(logits: Tensor, circuit: Circuit, agreement: float) -> float:
    """The temperature at which the mean of :func:`mode_agreement` is ``agreement``, by bisection on its logarithm.

    Args:
        logits: [T, E], at least one token.
        circuit: over E experts.
        agreement: between what the highest and the lowest temperature give.

    Raises:
        ValueError: no tokens, or an agreement that no temperature gives.
    """
    target = as_number("agreement", agreement)
    if not len(logits):
        raise ValueError(f"logits have shape {tuple(logits.shape)}: there are no tokens to calibrate on")
    base = circuit(logits.detach())
    mode = base.mode_mask()

    def mean(temperature: float) -> float:
        return float(expected_agreement(base.tempered(temperature), mode).double().mean())

    finite = base.logits[base.logits.isfinite()]
    spread = max(float(finite.max() - finite.min()) if finite.numel() else 0.0, 1e-30)
    cold, hot = max(_COLDEST * spread, MIN_TEMPERATURE), _HOTTEST * spread
    most, least = mean(cold), mean(hot)
    if most - least < 1e-6:  # but for rounding
        raise ValueError(
            f"agreement={target}: on these logits every temperature gives {most:.4g}; they are all equal, or the "
            "constraint leaves no choice, so that there is nothing to calibrate"
        )
    if not least < target < most:
        raise ValueError(
            f"agreement={target}: on these logits temperatures give from {least:.4g} (infinitely hot) to {most:.4g} "
            "(infinitely cold); ask for a mean in between, both excluded"
        )
    while hot / cold > 1 + 1e-4:
        middle = math.sqrt(hot * cold)
        cold, hot = (middle, hot) if mean(middle) > target else (cold, middle)
    return math.sqrt(hot * cold)


def active_experts(decisions: Routing | Tensor) -> float:
    """Mean number of executed experts per token."""
    mask = executed(decisions)
    return float(mask.sum()) / max(1, len(mask))


def soft_mass(routing: Routing) -> float:
    """Mean over tokens of the sum of the marginals: what a soft router was given, beside what it executes.

    For a :class:`SoftRouting` that is its k, and :func:`active_experts` the price that is paid for it; for a routing
    by a distribution it is the expected number of experts.
    """
    return float(routing.marginals.detach().double().sum()) / max(1, len(routing.mask))


def subset_diversity(decisions: Routing | Tensor) -> float:
    """exp of the entropy of the empirical distribution of subsets: how many different ones are in use, in effect."""
    mask = executed(decisions)
    if len(mask) == 0:
        return 0.0
    counts = torch.unique(mask, dim=0, return_counts=True)[1].double()
    return float(torch.special.entr(counts / counts.sum()).sum().exp())


@dataclass(frozen=True)
class SwapOracle:
    """Outcome of :func:`swap_oracle`.

    Attributes:
        correlation: Spearman's rank correlation of predicted and actual; NaN where either is constant.
        predicted: [S] float64, first-order change of the loss by the router's gradient.
        actual: [S] float64, true change of the loss.
    """

    correlation: float
    predicted: Tensor
    actual: Tensor


def swap_oracle(
    loss_fn: Callable[[Routing], Tensor],
    logits: Tensor,
    circuit: Circuit,
    *,
    combine: Combine = "softmax",
    estimator: str | Estimator = "simple",
    training: bool = False,
    key: Tensor | int | None = None,
    rounds: int = 16,
    seed: int = 0,
) -> SwapOracle:
    """Does the router's gradient know which expert would have been better?

    For random swaps of a chosen expert a with an unchosen one b, the gradient g of the loss in the logits predicts
    a change of g_b - g_a; the oracle recomputes the loss with the swapped subset. The rank correlation between the
    two says how well the gradient orders the alternatives: 0 for noise, 1 for a perfect ordering.

    Args:
        loss_fn: the loss for a given routing of this layer, everything else fixed: a scalar, or [G] losses of
            groups of T / G consecutive tokens that do not influence one another (sequences of a batch). With
            groups, one swap per group is evaluated in each call.
        logits: [T, E] router logits; not changed. Experts they force or forbid are not swapped.
        circuit: the router's; only swaps that satisfy it are tried.
        combine, estimator, training, key: as in :func:`circuitroute.route`.
        rounds: calls of ``loss_fn`` with swaps, each giving up to G swaps.
        seed: which swaps are tried.

    Raises:
        TypeError: a loss that is not a tensor.
        ValueError: logits that are not [T, E]; losses that are not finite, not a function of the logits, or not a
            scalar or [G] with G dividing T; no swap is possible.
    """
    rounds = int_at_least("rounds", rounds, 1)
    logits = as_real("logits", logits, floating=True)
    if logits.dim() != 2 or len(logits) == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: expected [tokens, experts] with a token at least")
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        routing = route(leaf, circuit, combine=combine, estimator=estimator, training=training, key=key)
        base = _group_losses(loss_fn(routing), len(leaf))
        if not base.requires_grad:
            raise ValueError("loss_fn returned a loss that is not a function of the logits: it has no gradient")
        (gradient,) = torch.autograd.grad(base.sum(), leaf)
    predicted, actual = [], []
    with torch.no_grad():
        for index in range(rounds):
            mask, token, out, into = _swapped(routing.mask, len(base), random_key(seed, index))
            undecided = torch.isfinite(leaf[token, out]) & torch.isfinite(leaf[token, into])
            valid = circuit.satisfies(mask[token]) & (out != into) & undecided
            mask[token[~valid]] = routing.mask[token[~valid]]
            swapped = route(leaf, circuit, combine=combine, estimator=estimator, replay=mask)
            change = _group_losses(loss_fn(swapped), len(leaf)) - base
            predicted.append((gradient[token, into] - gradient[token, out])[valid].double())
            actual.append(change[valid].double())
    found = torch.cat(predicted)
    if not len(found):
        raise ValueError(f"no swap of a chosen with an unchosen expert satisfies {circuit.constraint!r} here")
    return SwapOracle(rank_correlation(found, torch.cat(actual)), found, torch.cat(actual))


def _group_losses(losses: Tensor, tokens: int) -> Tensor:
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn returned {losses!r}: expected a tensor, got {type(losses).__name__}")
    if losses.dim() > 1:
        raise ValueError(f"loss_fn returned losses of shape {tuple(losses.shape)}: expected a scalar or [groups]")
    losses = losses.reshape(-1)
    if len(losses) == 0 or tokens % len(losses):
        raise ValueError(f"loss_fn returned {len(losses)} losses, which does not divide the {tokens} tokens")
    if not bool(torch.isfinite(losses).all()):
        raise ValueError("loss_fn returned a loss that is not finite")
    return losses


def _swapped(mask: Tensor, groups: int, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One random swap per group: the new mask, and for each group the token, the expert out and the expert in.

    Groups whose token has no chosen or no unchosen expert get out == in.
    """
    size = len(mask) // groups
    draws = uniform(key.reshape(1), 0, 3 * groups, torch.float64).reshape(3, groups).to(mask.device)
    token = (draws[0] * size).long() + torch.arange(groups, device=mask.device) * size
    rows = mask[token]
    out = _pick(rows, draws[1])
    into = _pick(~rows, draws[2])
    into = torch.where(rows.any(-1) & ~rows.all(-1), into, out)
    result = mask.clone()
    result[token, out] = torch.where(out == into, result[token, out], False)
    result[token, into] = torch.where(out == into, result[token, into], True)
    return result, token, out, into


def _pick(candidates: Tensor, u: Tensor) -> Tensor:
    """[G] a uniformly drawn true entry of each row (0 where there is none)."""
    rank = (u * candidates.sum(-1)).long()
    return ((candidates.cumsum(-1) == (rank + 1)[:, None]) & candidates).to(torch.uint8).argmax(-1)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors, with mean ranks for ties; NaN where either is constant."""
    rx, ry = _ranks(x), _ranks(y)
    rx, ry = rx - rx.mean(), ry - ry.mean()
    scale = float(rx.norm() * ry.norm())
    return float(rx @ ry) / scale if scale > 0 else math.nan


def _ranks(x: Tensor) -> Tensor:
    """[S] float64 ranks, the mean rank among equals."""
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    mean_rank: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return mean_rank[group]
