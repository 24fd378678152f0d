r"""Probes: unchosen experts that are run so that the gates' gradient learns what they would have been worth.

Legend: T tokens, E experts, P probes per token; S the chosen set, z its mask, m the exact marginals, w the weights.

**What is missing.** A layer's output is y = sum_i g_i w_i f_i(x), g being the estimator's mask: z in value, m in
gradient. With u_i = w_i <dL/dy, f_i>, the gradient that reaches the logits through g is Cov(z) u, the marginals'
Jacobian times u. A sparse dispatch runs f_i on S only, so u is known there and taken as 0 elsewhere: the estimate is
Cov(z) u_S, and an expert that is not chosen cannot learn that it should be.

**One probe.** Draw j outside S with probability q_j, run f_j, and use u_j / q_j in place of u_j, 0 for the others.
Since E[e_j u_j / q_j] = u outside S and Cov(z) is linear, the gradient is Cov(z) u in expectation: unbiased, for one
expert more per token instead of E - k. Its variance is smallest where q_j is proportional to |u_j|; m_j, renormalised
over what is not chosen, is what is known of that beforehand. Uniform q has the same mean and many times the variance
(``docs/testbed.md``): it mostly runs experts that no gradient should reach, and gives them the weight E - k.

**Several probes** are drawn one after the other, without replacement, each in proportion to q among what is left. Des
Raj's estimator (Some estimators in sampling with varying probabilities without replacement, JASA 1956) averages t_i =
sum_{l < i} u_l + u_i (1 - sum_{l < i} q_l) / q_i over the draws, each unbiased given those before it; so draw i of P
has the weight ((1 - sum_{l < i} q_l) / q_i + later draws) / P.

Without the weights the estimate leans to likely experts and varies less; with a cap it does a little of both.

**In value** a probe is nothing: :func:`with_worth` hands the layer's output on untouched, and only its backward looks
at f_j. An expert that overflows where it is probed cannot spoil the output; the gradient <dL/dy, f_j> of a probe whose
f_j is not finite is taken as 0.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuitroute._tensors import batchable
from circuitroute._validate import as_number, int_at_least, plain_option
from circuitroute.circuit import Compiled
from circuitroute.keys import fold_in, uniform
from circuitroute.routing.decision import Routing, chosen_first
from circuitroute.routing.estimators import Dense, Estimator, Score, as_estimator

ProbeCount: TypeAlias = int | Literal["all"]
ProbeWeights: TypeAlias = Literal["importance", "none"] | float

# Mixed into the key, so that probes are independent of what the decision draws with it.
PROBE = 0x9B0BE


class Probes(NamedTuple):
    """Unchosen (token, expert) pairs to run, and how much each counts in the gradient: [S] each."""

    token: Tensor
    expert: Tensor
    weight: Tensor


def as_probe_count(probes: ProbeCount) -> ProbeCount:
    """``probes``, checked: ``"all"``, or a number that is not negative."""
    return "all" if probes == "all" else int_at_least("probes", probes, 0)


def refuse_idle_probes(probes: ProbeCount, estimator: str | Estimator) -> None:
    """Refuse probes for an estimator that gives the gate of an unchosen expert no gradient.

    Raises:
        ValueError: the estimator is ``"none"`` or ``"score"``.
    """
    found = as_estimator(estimator)
    if probes and isinstance(found, Score) and not isinstance(found, Dense):
        raise ValueError(
            f"probes={probes!r} with estimator={estimator!r}: no gradient crosses the sample, so the gates of unchosen "
            "experts have none and probes would run in vain; use the estimator 'simple', or 'dense' with probes='all'"
        )


def as_probe_weights(weights: ProbeWeights) -> float:
    """The largest weight a probe may have: infinity for ``"importance"``, 0 where all weigh 1, else the cap.

    Raises:
        ValueError: another word, or a cap that is not positive.
    """
    if isinstance(weights, str):
        caps = {"importance": math.inf, "none": 0.0}
        if weights not in caps:
            raise ValueError(f"probe_weights={weights!r}: choose 'importance', 'none', or a cap on the weights")
        return caps[weights]
    cap = as_number("probe_weights", weights)
    if not cap > 0:
        raise ValueError(f"probe_weights={cap}: a cap must be positive")
    return cap


def plain_probe_weights(weights: ProbeWeights) -> Any:
    """``weights`` as plain Python has it: a str, or a float; what is wrong with it is for :func:`as_probe_weights`."""
    return plain_option("probe_weights", weights)


@torch.no_grad()
def draw_probes(
    routing: Routing, probes: int, key: Tensor | int | None, weights: ProbeWeights = "importance"
) -> Probes:
    """Draw ``probes`` unchosen experts per token in proportion to their marginals, without replacement.

    A pure function of the decision and its keys. Tokens with fewer feasible experts left get as many as there are.

    Args:
        routing: T decisions with a distribution.
        probes: P, at least 1.
        key: as for the decision, int64 broadcastable to [T]; None draws from torch's global generator.
        weights: see :class:`circuitroute.MoE`.
    """
    expert, weight, valid = _drawn(routing, probes, key, weights)
    token = torch.arange(len(routing.mask), device=expert.device).expand_as(valid)
    return Probes(token[valid], expert[valid], weight[valid].to(routing.gates.dtype))


@torch.no_grad()
def probe_weights(
    routing: Routing, probes: ProbeCount, key: Tensor | int | None, weights: ProbeWeights = "importance"
) -> Tensor:
    """[T, E] how much each expert counts as a probe, 0 where it is none: those of :func:`draw_probes`, or all at 1.

    Of shapes that do not depend on values, for programs that are traced.
    """
    if probes == "all":
        # A row with NaN has no decision, and no probes.
        return (~routing.mask & routing.gates.isfinite()).to(routing.gates.dtype)
    expert, weight, valid = _drawn(routing, min(probes, routing.mask.shape[-1]), key, weights)
    counted = torch.where(valid, weight, 0.0).to(routing.gates.dtype)
    # Invalid draws add 0 to some expert.
    return torch.zeros_like(routing.gates).scatter_add(-1, expert.t(), counted.t())


def probe_slots(circuit: Compiled, probes: ProbeCount) -> int:
    """The most probes that any token may have."""
    unchosen = circuit.n - circuit.min_count
    return unchosen if probes == "all" else min(probes, unchosen)


def padded_with_probes(
    routing: Routing, weight: Tensor, width: int, pad: Literal["distinct", "sentinel"] = "distinct"
) -> tuple[Tensor, Tensor]:
    """As :meth:`Routing.padded`, with probes behind the chosen experts: of weight 0, with their share of the gradient.

    Args:
        weight: [T, E], see :func:`probe_weights`.
        width: K; enough for the chosen experts and the probes of every token.
        pad: what fills the other slots; all ids are distinct with ``"distinct"``.

    Returns:
        (weights [T, K], indices [T, K] int64).
    """
    probed = weight > 0
    indices = chosen_first(2 * routing.mask.to(torch.uint8) + probed, routing.logits.detach(), width)
    used = (routing.mask | probed).gather(-1, indices)
    gates = (routing.gates * torch.where(routing.mask, 1.0, weight)).gather(-1, indices)
    # Gates of NaN, in rows without a decision, are not to pass for 0.
    weights = torch.where(used | gates.isnan(), gates, 0.0)
    return weights, indices if pad == "distinct" else torch.where(used, indices, routing.mask.shape[-1])


def _drawn(
    routing: Routing, probes: int, key: Tensor | int | None, weights: ProbeWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """(experts [P, T] int64, weights [P, T] float64, valid [P, T] bool: False once nothing feasible is left)."""
    cap = as_probe_weights(weights)
    keys = routing.distribution.keys(key)
    # Rounding may leave a marginal of 0 a little below it.
    rest = torch.where(routing.mask, 0.0, routing.marginals.double()).nan_to_num(0.0).clamp(min=0.0)
    u = uniform(fold_in(keys, keys.new_tensor(PROBE)), 0, probes, torch.float64)
    drawn, chances = [], []
    for i in range(probes):
        expert, chance = _inverted(rest, u[i])
        drawn.append(expert)
        chances.append(chance)
        rest = rest.scatter(-1, expert[:, None], 0.0)
    chance = torch.stack(chances)
    valid = chance > 0
    later = valid.flip(0).cumsum(0).flip(0) - 1
    importance = (torch.where(valid, chance, 1.0).reciprocal() + later) / valid.sum(0).clamp(min=1)
    weight = torch.ones_like(importance) if cap == 0 else importance.clamp(max=cap)
    return torch.stack(drawn), weight, valid


def every_unchosen(routing: Routing) -> Probes:
    """All experts that a token did not choose, at weight 1: what DenseMixer runs."""
    token, expert = (~routing.mask).nonzero(as_tuple=True)
    return Probes(token, expert, routing.gates.new_ones(len(token)))


def with_worth(combined: Tensor, gates: Tensor, outputs: Tensor, token: Tensor) -> Tensor:
    """``combined`` itself, to the bit, whose gradient also tells ``gates`` what the probes would have been worth.

    As if it were combined.index_add(0, token, gates[:, None] * outputs) with gates of 0, but nothing is multiplied or
    added in forward. Differentiable once.

    Args:
        combined: [T, H] what the chosen experts add up to; a tensor that nothing else uses, since it is handed on in
            place.
        gates: [S] of the probes, any values.
        outputs: [S, H] theirs, any floating dtype, taken as constant. Where a row holds inf or NaN, or overflows in
            sum, its gate gets a gradient of 0.
        token: [S] int64, whose they are.
    """
    found: Tensor = _WithWorth.apply(combined, gates, outputs, token)  # type: ignore[no-untyped-call]
    return found


class _WithWorth(torch.autograd.Function):
    """dcombined = dy, dgates_s = <dy[token_s], outputs_s>."""

    @staticmethod
    def forward(ctx: Any, combined: Tensor, gates: Tensor, outputs: Tensor, token: Tensor) -> Tensor:
        ctx.mark_dirty(combined)  # else the output would be a view, which callers may not change in place
        ctx.save_for_backward(outputs, token)
        ctx.dtype = gates.dtype
        return combined

    @staticmethod
    @batchable
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        outputs, token = ctx.saved_tensors
        wide = torch.promote_types(upstream.dtype, ctx.dtype)
        worth = upstream.index_select(0, token).to(wide).mul_(outputs).sum(-1)
        # Not finite where the row holds inf or NaN, and found in a fraction of the time of looking at every entry.
        total = outputs.sum(-1, dtype=wide)
        return upstream, torch.where(total.abs() < math.inf, worth, 0.0).to(ctx.dtype), None, None


def _inverted(share: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """([T] int64, [T]): an expert of each row in proportion to ``share`` [T, E], and its chance; 0 where all are 0."""
    cumulative = share.cumsum(-1)
    total = cumulative[:, -1]
    # The first whose sum exceeds u times the total: never one of share 0.
    expert = (cumulative <= (u * total)[:, None]).sum(-1).clamp(max=share.shape[-1] - 1)
    # By the sum that was drawn from: 1 minus what went before would lose small shares to rounding.
    return expert, share.gather(-1, expert[:, None])[:, 0] / torch.where(total > 0, total, 1.0)
