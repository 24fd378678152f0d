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
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from circuitroute._tensors import cannot_look
from circuitroute._validate import as_number, as_real, one_of
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.evidence import rows_text
from circuitroute.routing.decision import Routing, by_token
from circuitroute.routing.records import LayerRecord as LayerRecord
from circuitroute.routing.records import RecordFile as RecordFile
from circuitroute.routing.records import RecordWriter as RecordWriter
from circuitroute.routing.records import RoutingRecord as RoutingRecord
from circuitroute.routing.records import check_constraint, each_of, mask_of, model_label, same_temperature

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


def masks_for(
    record: RoutingRecord, circuits: Sequence[Circuit], temperatures: Sequence[float], model: str | None = None
) -> list[Tensor]:
    """The decisions of a record, checked against all the layers that are to replay them, before any layer does.

    Args:
        record: of L layers.
        circuits: what each of the L layers allows.
        temperatures: what each of them divides its logits by.
        model: the label of the model that is to replay it; compared where the record has one too.

    Returns:
        [T, E] bool per layer, on the CPU.

    Raises:
        TypeError: ``record`` is none.
        ValueError: it is of another model or of other numbers of layers or experts, was made at another temperature or
            under another constraint, or holds a subset that a layer forbids; names the layer, and the rows.
    """
    if not isinstance(record, RoutingRecord):
        raise TypeError(
            f"record is a {type(record).__name__}: expected a RoutingRecord, such as RoutingRecord.of makes"
        )
    label = model_label(model)
    if None not in (label, record.model) and label != record.model:
        raise ValueError(
            f"record is of model {record.model!r}, and is to be replayed by {label!r}: replay what was recorded from "
            "the same model"
        )
    experts = tuple(circuit.n for circuit in circuits)
    if record.num_experts != experts:
        raise ValueError(
            f"record has layers of {list(record.num_experts)} experts, and the model's routers {list(experts)}: replay "
            "what was recorded from the same model"
        )
    if len(temperatures) != len(experts):
        raise ValueError(f"temperatures has {len(temperatures)} entries: expected one per layer, {len(experts)}")
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
    for layer, circuit in enumerate(circuits):
        check_constraint(record, layer, circuit)
    return masks


def log_probs(routings: Sequence[Routing]) -> Tensor:
    """[T, L] float64 exact log-probability of every token's decision in every layer; differentiable.

    With recorded decisions replayed, that under the policy that is trained; ``record.log_probs`` has that under the
    policy that made them. By the tokens' numbers, as in records, where a host numbers them: see ``Routing.token``.

    Raises:
        ValueError: there is none, or they are of different numbers of tokens.
        AttributeError: a decision without a log-probability, such as a soft router's.
    """
    tokens = [len(routing.mask) for routing in routings]
    if not tokens or len(set(tokens)) > 1:
        raise ValueError(f"routings have {tokens} tokens: give one per layer, of the same tokens")
    return torch.stack([by_token(routing, routing.log_prob).double() for routing in routings], dim=1)


def path_log_prob(routings: Sequence[Routing]) -> Tensor:
    """[T] float64 exact log-probability of every token's path through the layers; differentiable.

    By the tokens' numbers, as in records: see ``Routing.token``.

    Raises:
        ValueError: there is none, or they are of different numbers of tokens.
    """
    return log_probs(routings).sum(1)


def importance_ratio(new_log_prob: Tensor, old_log_prob: Tensor, *, clip: tuple[float, float] | None = None) -> Tensor:
    """exp(new - old): how much likelier the decisions are now than when they were made; differentiable in the first.

    Args:
        new_log_prob: [...] under the policy that is trained, with the recorded decisions replayed: ``log_prob`` of one
            layer, :func:`log_probs` or :func:`path_log_prob` of all.
        old_log_prob: [...] under the policy that made them; taken as constant.
        clip: bounds of the ratio, such as (0.8, 1.2), or (0, 2) to truncate from above. There is no gradient outside.

    Returns:
        [...] float32, computed in float64: sums over many layers are large, their differences are not.

    Raises:
        ValueError: shapes that differ, an old log-probability that is not finite (something impossible was recorded; on
            CPUs only, where looking costs no waiting), or bounds that are not 0 <= low < high.
    """
    difference = _difference("log_prob", new_log_prob, old_log_prob)
    if clip is not None:
        low, high = (as_number(f"clip[{i}]", bound) for i, bound in enumerate(clip))
        if not 0 <= low < high:
            raise ValueError(f"clip={clip!r}: expected (low, high) with 0 <= low < high")
        difference = difference.clamp(_log(low), _log(high))
    return difference.exp().float()


def truncated_ratio(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    *,
    per: Literal["path", "layer"] = "path",
    low: float = 0.0,
    high: float = 2.0,
    outside: Literal["clamp", "zero"] = "clamp",
) -> Tensor:
    """The routers' importance ratio of every token as a constant weight, bounded: what a token's loss is multiplied by.

    With r_l = p_new(S_l) / p_old(S_l), the exact ratio of the subset in layer l, and f the bounds:

    - ``per="path"``: f(prod_l r_l), truncated importance sampling (Ionides, 2008) of the path; with ``high`` alone,
      min(r, high), what is done for tokens where rollout and training differ (prime-rl #1300, and for routers #1406).
    - ``per="layer"``: prod_l f(r_l): one layer that moved far does not use up the bound of the others.
    - ``outside="clamp"``: f(r) = min(max(r, low), high). ``outside="zero"``: f(r) = r between the bounds and 0 beyond,
      which takes the token out of the loss: the two-sided mask of IcePop (arXiv 2510.18855), low 0.5 and high 5 there.

    A bounded weight is biased, towards what both policies agree on, and has a bounded variance; ``high=math.inf`` is
    the unbiased one.

    Args:
        new_log_probs: [T, L], :func:`log_probs` of the replayed decisions.
        old_log_probs: [T, L], ``record.log_probs``.
        per: what is bounded.
        low, high: the bounds, 0 <= low < high.
        outside: what becomes of a ratio beyond them.

    Returns:
        [T] float32, without gradient, computed in float64.

    Raises:
        ValueError: shapes that differ or are not [T, L], an old log-probability that is not finite (on CPUs only), or
            other bounds and words.
    """
    per, outside = one_of("per", per, ("path", "layer")), one_of("outside", outside, ("clamp", "zero"))
    low, high = as_number("low", low), as_number("high", high)
    if not 0 <= low < high:
        raise ValueError(f"low={low} and high={high}: expected 0 <= low < high")
    moved = _by_layer(new_log_probs, old_log_probs)
    moved = moved.sum(1, keepdim=True) if per == "path" else moved
    if outside == "clamp":
        return moved.clamp(_log(low), _log(high)).exp().prod(1).float()
    beyond = (moved < _log(low)) | (moved > _log(high))
    return moved.exp().masked_fill(beyond, 0.0).prod(1).float()


def router_shift(new_log_probs: Tensor, old_log_probs: Tensor, *, floor: float = 0.0) -> Tensor:
    """How far the routers have moved on every token, as a constant weight: max(floor, exp(-mean_l |log r_l|)).

    1 where all layers give their decision the same probability as before, less the more they changed it, up or down,
    never below ``floor``. After the router-shift ratio of RSPO (arXiv 2510.23027), which compares the scores of single
    experts; here log r_l is that of the exact probabilities of the subset in layer l.

    Args:
        new_log_probs: [T, L], :func:`log_probs` of the replayed decisions.
        old_log_probs: [T, L], ``record.log_probs``.
        floor: from 0 to 1.

    Returns:
        [T] float32, without gradient.

    Raises:
        ValueError: shapes that differ or are not [T, L], an old log-probability that is not finite (on CPUs only), or
            another floor.
    """
    floor = as_number("floor", floor)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor}: must lie in 0..1")
    moved = _by_layer(new_log_probs, old_log_probs)
    return moved.abs().mean(1).neg().exp().clamp(min=floor).float()


def _by_layer(new_log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """[T, L] float64, new - old, without gradient."""
    difference = _difference("log_probs", new_log_probs, old_log_probs).detach()
    if difference.dim() != 2 or difference.shape[1] == 0:
        raise ValueError(
            f"new_log_probs has shape {tuple(difference.shape)}: expected [tokens, layers], such as "
            "log_probs(routings) and record.log_probs"
        )
    return difference


def _difference(name: str, new: Tensor, old: Tensor) -> Tensor:
    """new - old in float64, on the device of the first; the second is constant."""
    new = as_real(f"new_{name}", new, floating=True)
    old = as_real(f"old_{name}", old, floating=True)
    if new.shape != old.shape:
        raise ValueError(
            f"new_{name} has shape {tuple(new.shape)} and old_{name} {tuple(old.shape)}: they must be of the same "
            "decisions"
        )
    old = old.detach().to(new.device, torch.float64)
    if not cannot_look(old) and not bool(old.isfinite().all()):
        raise ValueError(f"old_{name} is not finite somewhere: no policy makes a decision of probability 0")
    return new.double() - old


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


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
