"""Logits to decisions: :func:`decide` says which subset, :func:`~circuitroute.routing.weights.weigh` with what weights.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from circuitroute._validate import as_mask
from circuitroute.circuit import Compiled, boolean
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.inference.evidence import rows_text
from circuitroute.routing.decision import Decision, Routing
from circuitroute.routing.estimators import Estimator, as_estimator
from circuitroute.routing.weights import Combine, as_combine, weigh

How: TypeAlias = Literal["sample", "mode", "count"]


def route(
    logits: Tensor,
    circuit: Circuit,
    *,
    combine: Combine = "softmax",
    estimator: str | Estimator = "simple",
    training: bool = True,
    key: Tensor | int | None = None,
    replay: Tensor | None = None,
    count_potential: Tensor | None = None,
    validate_args: bool | None = None,
) -> Routing:
    """Decide which experts each token uses.

    Args:
        logits: [T, E], any floating dtype; computed in float32. Infinite logits force or forbid experts. More
            leading dimensions are flattened into one of tokens, those of the other tensors with them.
        circuit: the compiled constraint over E experts.
        combine: how chosen experts are weighted, g being the estimator's mask: ``"softmax"``, g times the softmax
            over all experts (ProbMoE); ``"normalized"``, the softmax over the chosen ones; ``"sigmoid"``, g times
            sigmoid(logits); ``"marginal"``, g times the exact marginals.
        estimator: how gradients cross the sample: ``"simple"``, ``"score"``, ``"none"`` or an
            :class:`~circuitroute.routing.estimators.Estimator`.
        training: sample when True; take the mode, deterministically, when False.
        key: sampling keys, int64 broadcastable to [T]; a decision is a pure function of (logits row, key row).
            Give every token its own, e.g. ``cr.random_key(seed, step, layer, torch.arange(T))``. None draws from
            torch's global generator.
        replay: a recorded mask [T, E]: the decision is this one, with its gates, log-probability and gradients.
        count_potential: [K + 1] or [T, K + 1], see :class:`SubsetDistribution`.
        validate_args: whether to check values; None follows torch.distributions. Without it, rows with NaN or
            with evidence that leaves nothing choose no expert and have NaN gates, in those rows alone.

    Raises:
        ValueError: shapes that do not fit, an unknown option, NaN or unsatisfiable rows, or a replayed mask that
            the constraint or the evidence excludes, named by row.
    """
    as_combine(combine)
    as_estimator(estimator)
    decision = decide(
        logits,
        circuit,
        how="sample" if training else "mode",
        key=key,
        replay=replay,
        count_potential=count_potential,
        validate_args=validate_args,
    )
    return decision.routing(weigh(decision, combine=combine, estimator=estimator))


def decide(
    logits: Tensor,
    circuit: Compiled,
    *,
    how: How,
    key: Tensor | int | None = None,
    replay: Tensor | None = None,
    count_potential: Tensor | None = None,
    validate_args: bool | None = None,
) -> Decision:
    """Which subset: the first half of :func:`route`, with the same arguments; :func:`weigh` is the other.

    Args:
        how: ``"sample"``; ``"mode"``; or, for count constraints, ``"count"``, the most probable number of experts (the
            lower among equals), then the most probable subset of that size.
    """
    if isinstance(logits, Tensor) and logits.dim() > 0:
        logits, count_potential, key = _flatten(logits, count_potential, key)
    distribution = SubsetDistribution(circuit, logits, count_potential, validate_args=validate_args)
    if replay is None:
        mask = _chosen(distribution, how, key)
        invalid = distribution.invalid_rows()
    else:
        invalid = distribution.invalid_rows()
        mask = _replayed(distribution, replay, invalid)
    return Decision(distribution, mask if invalid is None else mask & ~invalid[:, None], invalid)


def _flatten(
    logits: Tensor, count_potential: Tensor | None, key: Tensor | int | None
) -> tuple[Tensor, Tensor | None, Tensor | int | None]:
    """All leading dimensions become one of tokens; a key may come with them or flattened already."""
    batch = logits.shape[:-1]
    if isinstance(count_potential, Tensor) and count_potential.dim() > 1:
        last = count_potential.shape[-1]
        count_potential = _expand("count_potential", count_potential, torch.Size([*batch, last])).reshape(-1, last)
    if isinstance(key, Tensor):
        key = per_token("key", key, batch)
    return logits.reshape(-1, logits.shape[-1]), count_potential, key


def per_token(name: str, value: Tensor, batch: torch.Size) -> Tensor:
    """[T], or a scalar as it is: ``value`` broadcast to the leading dimensions, unless it is flattened already."""
    if value.dim() == 0 or value.shape == (batch.numel(),):
        return value
    return _expand(name, value, batch).reshape(-1)


def _expand(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it must broadcast to {tuple(shape)}") from None


def _chosen(distribution: SubsetDistribution, how: How, key: Tensor | int | None) -> Tensor:
    """[T, E] bool."""
    if how == "sample":
        return distribution.sample_in_sweep(key)
    count = distribution.count_probs.detach().argmax(-1) if how == "count" else None
    return distribution.mode_mask(count)


def _replayed(distribution: SubsetDistribution, replay: Tensor, invalid: Tensor | None) -> Tensor:
    """[T, E] bool, the recorded decision; invalid rows had none to check."""
    mask = recorded_mask(replay, distribution.logits)
    allowed = boolean.satisfies(distribution.circuit, mask)
    infinite = torch.isinf(distribution.logits)
    allowed &= ((distribution.logits > 0) == mask).logical_or_(~infinite).all(-1)
    if distribution.count_potential is not None:
        potential = distribution.count_potential.expand(len(mask), -1)
        count = mask.sum(-1, keepdim=True).clamp(max=potential.shape[-1] - 1)
        allowed &= potential.gather(-1, count).squeeze(-1) > -torch.inf
    if invalid is not None:
        allowed |= invalid
    if not bool(allowed.all()):
        raise ValueError(
            f"replay holds a subset that {distribution.circuit.constraint!r}, the infinite logits or the count "
            f"potential exclude, in {rows_text(~allowed)}"
        )
    return mask


def recorded_mask(replay: Tensor, logits: Tensor) -> Tensor:
    """[T, E] bool on the device of the logits [T, E], from a mask with any leading dimensions of T tokens in all."""
    mask = as_mask("replay", replay, logits.shape[-1]).to(logits.device)
    mask = mask.reshape(-1, mask.shape[-1])
    if mask.shape != logits.shape:
        raise ValueError(f"replay has shape {tuple(mask.shape)}: it must be that of the logits, {tuple(logits.shape)}")
    return mask
