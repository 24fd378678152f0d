"""What is measured on the held-out text.

Shapes: B sequences, S positions, T = B S tokens, E experts, L layers, M all validation tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

import circuitroute as cr

from .config import DemoConfig
from .model import LanguageModel, token_losses
from .process import Stop, stop_if


@dataclass(frozen=True)
class Evaluation:
    """One pass over the held-out windows after `step` steps, the router taking its mode."""

    step: int
    bits_per_byte: float
    executed: float  # mean experts per token and layer
    load_entropy: float  # mean over layers
    max_violation: float  # mean over layers
    utilization: list[list[float]]  # [L, E]: fraction of tokens that use the expert
    executed_counts: list[int]  # [E + 1]: tokens, over all layers, that execute so many experts
    executed_totals: list[int]  # [L E + 1]: tokens that execute so many experts in all layers together
    soft_mass: list[float] | None  # [L]: mean soft mass per token; None for routers that choose subsets
    mode_agreement: float | None = None  # of what training samples with the mode, in expectation; None: it does not
    test_bits_per_byte: float | None = None  # on the second held-out part, where there is one


@torch.no_grad()
def evaluate(
    model: LanguageModel, batches: Sequence[Tensor], step: int, stop: Stop, testing: Sequence[Tensor] = ()
) -> Evaluation:
    """Leaves the model in training mode. Raises Interrupted between batches."""
    model.eval()
    nats: list[Tensor] = []
    masks: list[list[Tensor]] = []
    masses: list[Tensor] = []
    agreements: list[Tensor] = []
    try:
        for tokens in batches:
            stop_if(stop)
            logits_BSV, routings = model(tokens[:, :-1])
            nats.append(token_losses(logits_BSV, tokens[:, 1:]).double().mean(dim=-1))
            masks.append([routing.mask for routing in routings])
            if model.plan.soft:
                masses.append(torch.stack([routing.marginals.double().sum(dim=-1) for routing in routings]))
            elif model.samples:
                agreements.append(torch.cat([cr.metrics.mode_agreement(routing) for routing in routings]))
        tested = []
        for tokens in testing:
            stop_if(stop)
            tested.append(token_losses(model(tokens[:, :-1])[0], tokens[:, 1:]).double().mean(dim=-1))
    finally:
        model.train()
    mass = torch.cat(masses, dim=1).mean(dim=1).tolist() if masses else None
    found = _summary(step, _bits(nats), [torch.cat(layer) for layer in zip(*masks, strict=True)], mass)
    agreement = float(torch.cat(agreements).double().mean()) if agreements else None
    return replace(found, mode_agreement=agreement, test_bits_per_byte=_bits(tested) if tested else None)


def _bits(nats: Sequence[Tensor]) -> float:
    return float(torch.cat(list(nats)).mean()) / math.log(2)


def _summary(step: int, bits: float, masks_ME: Sequence[Tensor], mass: list[float] | None) -> Evaluation:
    counts_LM = torch.stack([mask_ME.sum(dim=-1) for mask_ME in masks_ME])
    experts = masks_ME[0].shape[-1]
    return Evaluation(
        step=step,
        bits_per_byte=bits,
        executed=float(counts_LM.double().mean()),
        load_entropy=fmean(float(cr.metrics.load_entropy(mask_ME)) for mask_ME in masks_ME),
        max_violation=fmean(float(cr.metrics.max_violation(mask_ME)) for mask_ME in masks_ME),
        utilization=[cr.metrics.utilization(mask_ME).tolist() for mask_ME in masks_ME],
        executed_counts=counts_LM.flatten().bincount(minlength=experts + 1).tolist(),
        executed_totals=counts_LM.sum(dim=0).bincount(minlength=len(masks_ME) * experts + 1).tolist(),
        soft_mass=mass,
    )


def swap_correlation(model: LanguageModel, config: DemoConfig, tokens: Tensor, stop: Stop) -> float | None:
    """How well the gradient of the middle layer's router predicts the loss when a chosen expert is swapped for another.

    Every other layer takes its mode, so the swap is all that differs. tokens: [B, S + 1] int64. Returns the rank
    correlation, or None where it is undefined, as for soft routers and budgets, which have no circuit for this layer
    alone. Raises Interrupted between runs of the model.
    """
    layer = config.layers // 2
    router = model.router(layer)
    if not isinstance(router, cr.Router) or config.oracle_rounds == 0:
        return None
    tokens = tokens[: config.oracle_sequences]

    def losses_of(routing: cr.Routing) -> Tensor:
        stop_if(stop)
        logits_BSV, _ = model(tokens[:, :-1], overrides={layer: lambda _: routing})
        return token_losses(logits_BSV, tokens[:, 1:]).mean(dim=-1)

    model.eval()
    try:
        with torch.no_grad():
            logits_TE = model(tokens[:, :-1])[1][layer].logits
        found = cr.metrics.swap_oracle(
            losses_of,
            logits_TE,
            router.circuit,
            combine=router.combine,
            estimator=router.estimator,
            rounds=config.oracle_rounds,
            seed=config.seed,
        )
    except ValueError:  # nothing to swap, as when every token takes all experts, or training has diverged
        return None
    finally:
        model.train()
    return found.correlation if math.isfinite(found.correlation) else None
