"""Routing decisions on record: compact, replayed exactly, with importance ratios for reinforcement learning.

Legend: T tokens, L layers, E experts of a layer, K slots (the largest number of experts any token has in a layer).

The engine that rolls a policy out and the one that trains it disagree on some decisions: other kernels, precision and
batches. Record what the rollout decided, hand it to the routers as ``replay=``, and take the exact log-probability of
those very decisions from ``Routing.log_prob``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from circuitroute._tensors import cannot_look
from circuitroute._validate import as_number, as_real
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.evidence import rows_text
from circuitroute.routing.decision import Routing, by_token
from circuitroute.routing.records import LayerRecord as LayerRecord
from circuitroute.routing.records import RoutingRecord as RoutingRecord
from circuitroute.routing.records import each_of, mask_of, same_temperature

Decisions: TypeAlias = "Routing | Tensor | Sequence[Routing | Tensor] | RoutingRecord"


@dataclass(frozen=True)
class Mismatch:
    """How far two records of the same tokens differ: fractions, 0 where they agree.

    Attributes:
        subsets: of all decisions (one per token and layer), those whose subsets differ.
        slots: of all chosen experts on both sides, those that the other side did not choose.
        tokens: of all tokens, those with a different subset in any layer.
    """

    subsets: float
    slots: float
    tokens: float


def mismatch(a: Decisions, b: Decisions) -> Mismatch:
    """Compare two decisions on the same tokens: Routings, masks [T, E], one per layer, or records.

    Raises:
        TypeError, ValueError: other things, or shapes that differ.
    """
    ours, theirs = _masks_of("a", a), _masks_of("b", b)
    shapes = [[tuple(mask.shape) for mask in masks] for masks in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"a has masks of shapes {shapes[0]} and b {shapes[1]}: they must be of the same layers and tokens"
        )
    differing = [(x != y).sum(-1) for x, y in zip(ours, theirs, strict=True)]
    wrong = torch.stack([count > 0 for count in differing], dim=1)
    chosen = sum(int(mask.sum()) for mask in (*ours, *theirs))
    return Mismatch(
        subsets=_fraction(int(wrong.sum()), wrong.numel()),
        slots=_fraction(sum(int(count.sum()) for count in differing), chosen),
        tokens=_fraction(int(wrong.any(1).sum()), len(wrong)),
    )


def masks_for(record: RoutingRecord, circuits: Sequence[Circuit], temperatures: Sequence[float]) -> list[Tensor]:
    """The decisions of a record, checked against all the layers that are to replay them, before any layer does.

    Args:
        record: of L layers.
        circuits: what each of the L layers allows.
        temperatures: what each of them divides its logits by.

    Returns:
        [T, E] bool per layer, on the CPU.

    Raises:
        TypeError: ``record`` is none.
        ValueError: it is of other numbers of layers or experts, was made at another temperature, or holds a subset that
            a layer forbids; names the layer, and the rows.
    """
    if not isinstance(record, RoutingRecord):
        raise TypeError(
            f"record is a {type(record).__name__}: expected a RoutingRecord, such as RoutingRecord.of makes"
        )
    experts = tuple(circuit.n for circuit in circuits)
    if record.num_experts != experts:
        raise ValueError(
            f"record has layers of {list(record.num_experts)} experts, and the model's routers {list(experts)}: replay "
            "what was recorded from the same model"
        )
    for layer, temperature in enumerate(temperatures):
        if not same_temperature(record.temperature, temperature):
            raise ValueError(
                f"record was made at temperature {record.temperature:g}, and layer {layer} decides at {temperature:g}: "
                "log-probabilities depend on it; set the routers' temperature to the record's"
            )
    masks = record.masks()
    for layer, (mask, circuit) in enumerate(zip(masks, circuits, strict=True)):
        forbidden = ~circuit.satisfies(mask)
        if bool(forbidden.any()):
            raise ValueError(
                f"record: layer {layer} has subsets that {circuit.constraint!r} forbids, in {rows_text(forbidden)}: "
                "replay decisions that were made under the same constraint"
            )
    return masks


def path_log_prob(routings: Sequence[Routing]) -> Tensor:
    """[T] float64 exact log-probability of every token's path through the layers; differentiable.

    By the tokens' numbers, as in records: see ``Routing.token``.

    Raises:
        ValueError: there is none, or they are of different numbers of tokens.
    """
    tokens = [len(routing.mask) for routing in routings]
    if not tokens or len(set(tokens)) > 1:
        raise ValueError(f"routings have {tokens} tokens: give one per layer, of the same tokens")
    return torch.stack([by_token(routing, routing.log_prob).double() for routing in routings]).sum(0)


def importance_ratio(new_log_prob: Tensor, old_log_prob: Tensor, *, clip: tuple[float, float] | None = None) -> Tensor:
    """exp(new - old): how much likelier the decisions are now than when they were made; differentiable in the first.

    Args:
        new_log_prob: [...] under the policy that is trained, with the recorded decisions replayed: ``log_prob`` of one
            layer or :func:`path_log_prob` of all.
        old_log_prob: [...] under the policy that made them; taken as constant.
        clip: bounds of the ratio, such as (0.8, 1.2), or (0, 2) to truncate from above. There is no gradient outside.

    Returns:
        [...] float32, computed in float64: sums over many layers are large, their differences are not.

    Raises:
        ValueError: shapes that differ, an old log-probability that is not finite (something impossible was recorded; on
            CPUs only, where looking costs no waiting), or bounds that are not 0 <= low < high.
    """
    new_log_prob = as_real("new_log_prob", new_log_prob, floating=True)
    old_log_prob = as_real("old_log_prob", old_log_prob, floating=True)
    if new_log_prob.shape != old_log_prob.shape:
        raise ValueError(
            f"new_log_prob has shape {tuple(new_log_prob.shape)} and old_log_prob {tuple(old_log_prob.shape)}: they "
            "must be of the same decisions"
        )
    old = old_log_prob.detach().to(new_log_prob.device, torch.float64)
    if not cannot_look(old) and not bool(old.isfinite().all()):
        raise ValueError("old_log_prob is not finite somewhere: no policy makes a decision of probability 0")
    difference = new_log_prob.double() - old
    if clip is not None:
        low, high = (as_number(f"clip[{i}]", bound) for i, bound in enumerate(clip))
        if not 0 <= low < high:
            raise ValueError(f"clip={clip!r}: expected (low, high) with 0 <= low < high")
        difference = difference.clamp(math.log(low) if low > 0 else -math.inf, math.log(high))
    return difference.exp().float()


def _masks_of(name: str, decisions: Decisions) -> list[Tensor]:
    """[T, E] bool per layer, on the CPU."""
    if isinstance(decisions, RoutingRecord):
        return decisions.masks()
    each = each_of(name, decisions)
    if not each:
        raise ValueError(f"{name} is empty: give one decision per layer")
    return [by_token(decision, mask_of(f"{name}[{i}]", decision)).cpu() for i, decision in enumerate(each)]


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
