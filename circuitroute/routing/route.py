"""One routing decision per token, and its three projections.

Legend: T tokens, E experts, K slots of a padded projection; z the 0/1 mask of the chosen experts.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from circuitroute._validate import as_mask, int_at_least
from circuitroute.circuit import boolean
from circuitroute.engines import certainly_finite
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution, cannot_look
from circuitroute.inference.evidence import rows_text, unsatisfiable_rows
from circuitroute.routing.estimators import Estimator, as_estimator

Combine: TypeAlias = Literal["softmax", "normalized", "sigmoid", "marginal"]
Decide: TypeAlias = Literal["sample", "mode", "count"]
Pad: TypeAlias = Literal["distinct", "sentinel", "minus_one"]
COMBINES, PADS = get_args(Combine), get_args(Pad)  # here, since torch 2.6 cannot trace get_args

# An unchosen expert's weight relative to the chosen ones enters a gradient only; e^30 keeps that finite.
MAX_RELATIVE_LOGIT = 30.0


class Routing:
    """The chosen experts of T tokens, with what training, serving and replay need of the choice.

    Attributes:
        mask: [T, E] bool, the chosen experts.
        gates: [T, E] float32, combination weights; 0 off the chosen set in value, with the estimator's gradient.
    """

    def __init__(self, distribution: SubsetDistribution, mask: Tensor, gates: Tensor) -> None:
        self._distribution = distribution
        self.mask = mask
        self.gates = gates

    @property
    def distribution(self) -> SubsetDistribution:
        """What the decision was drawn from, with batch [T]."""
        return self._distribution

    @property
    def logits(self) -> Tensor:
        """[T, E] float32 router logits."""
        return self.distribution.logits

    @property
    def marginals(self) -> Tensor:
        """[T, E] exact probability of each expert to be chosen; differentiable."""
        return self.distribution.marginals

    @property
    def log_prob(self) -> Tensor:
        """[T] exact log-probability of the decision; differentiable."""
        return self.distribution.log_prob(self.mask)

    @property
    def counts(self) -> Tensor:
        """[T] int64, number of chosen experts."""
        return self.mask.sum(-1)

    @property
    def max_count(self) -> int:
        """The most experts that any token may have; at least 1, so that there is a slot."""
        return max(1, self.distribution.circuit.max_count)

    def padded(self, width: int | None = None, pad: Pad = "distinct") -> tuple[Tensor, Tensor]:
        """The decision in K slots per token: chosen experts first, by decreasing logit, then padding.

        Args:
            width: K; ``max_count`` by default.
            pad: what fills unused slots, always with weight 0 and without gradient: ``"distinct"`` experts that
                were not chosen (safe everywhere, computed in vain), the index E (``"sentinel"``), or -1.

        Returns:
            (weights [T, K] float32, indices [T, K] int64).

        Raises:
            ValueError: an unknown ``pad``, ``width`` outside 1..E, or a token with more experts than ``width``.
        """
        if pad not in PADS:
            raise ValueError(f"pad={pad!r}: choose one of {', '.join(map(repr, PADS))}")
        experts = self.mask.shape[-1]
        largest = self.max_count
        slots = largest if width is None else int_at_least("width", width, 1)
        if slots > experts:
            raise ValueError(f"width={slots}: there are only {experts} experts")
        if slots < largest and self.counts.numel() and int(self.counts.max()) > slots:
            raise ValueError(f"width={slots}: a token has {int(self.counts.max())} experts; widen it")
        # Chosen experts first: among equals of the first sort the second, stable one keeps the logit order.
        by_logit = self.logits.detach().argsort(dim=-1, descending=True, stable=True)
        chosen_first = self.mask.gather(-1, by_logit).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        indices = by_logit.gather(-1, chosen_first)[:, :slots]
        used = self.mask.gather(-1, indices)
        weights = torch.where(used, self.gates.gather(-1, indices), 0.0)
        if pad == "sentinel":
            indices = torch.where(used, indices, experts)
        elif pad == "minus_one":
            indices = torch.where(used, indices, -1)
        return weights, indices

    def ragged(self, by: Literal["token", "expert"] = "token") -> tuple[Tensor, Tensor, Tensor]:
        """The decision as a list of (token, expert, weight), one entry per chosen expert.

        Args:
            by: sort by token and then expert, or by expert and then token (what a sparse dispatch wants).

        Returns:
            (token_index [S], expert_index [S], weight [S]) with S the total number of chosen experts.
        """
        if by not in ("token", "expert"):
            raise ValueError(f"by={by!r}: choose 'token' or 'expert'")
        if by == "token":
            token, expert = self.mask.nonzero(as_tuple=True)
        else:
            expert, token = self.mask.t().nonzero(as_tuple=True)
        return token, expert, self.gates[token, expert]

    def __repr__(self) -> str:
        tokens, experts = self.mask.shape
        return f"Routing({tokens} tokens, {experts} experts, {self.distribution.circuit.constraint!r})"


class SoftRouting(Routing):
    """A decision by a relaxation: soft weights p, of which the larger ones are executed. Nothing is drawn.

    Losses, metrics, projections and :class:`MoE` take it like any other. There is no ``distribution`` and no
    ``log_prob``.

    Attributes:
        mask: [T, E] bool, the executed experts.
        gates: [T, E] float32, combination weights; 0 off the executed set, where they have no gradient of their own.
    """

    def __init__(self, logits: Tensor, marginals: Tensor, mask: Tensor, gates: Tensor, max_count: int) -> None:
        self._logits = logits
        self._marginals = marginals
        self._max_count = max_count
        self.mask = mask
        self.gates = gates

    @property
    def logits(self) -> Tensor:
        """[T, E] float32 router logits."""
        return self._logits

    @property
    def marginals(self) -> Tensor:
        """[T, E] the soft weights p of all experts, which sum to the soft mass k; differentiable."""
        return self._marginals

    @property
    def max_count(self) -> int:
        """The most experts that any token may execute."""
        return self._max_count

    @property
    def distribution(self) -> SubsetDistribution:
        """There is none.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            "a soft routing has no distribution: nothing was drawn. Its soft weights are in .marginals, the executed "
            "experts in .mask; routers with a distribution over subsets are ExactKRouter, DynamicKRouter and Router"
        )

    @property
    def log_prob(self) -> Tensor:
        """There is none.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            "a soft routing has no log_prob: its executed experts follow from the logits, nothing was drawn. Replay "
            "its .mask instead, or use ExactKRouter, DynamicKRouter or Router, whose decisions have a probability"
        )

    def __repr__(self) -> str:
        tokens, experts = self.mask.shape
        return f"SoftRouting({tokens} tokens, {experts} experts, at most {self.max_count} of them executed)"


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
    return route_with(
        logits,
        circuit,
        combine=combine,
        estimator=estimator,
        decide="sample" if training else "mode",
        key=key,
        replay=replay,
        count_potential=count_potential,
        validate_args=validate_args,
    )


def route_with(
    logits: Tensor,
    circuit: Circuit,
    *,
    decide: Decide,
    combine: Combine = "softmax",
    estimator: str | Estimator = "simple",
    key: Tensor | int | None = None,
    replay: Tensor | None = None,
    count_potential: Tensor | None = None,
    validate_args: bool | None = None,
) -> Routing:
    """:func:`route` with the rule of decision by name: ``"sample"``, ``"mode"`` or, for count constraints, ``"count"``.

    The last takes the most probable number of experts (the lower among equals), then the most probable subset of that
    size.
    """
    as_combine(combine)
    crossing = as_estimator(estimator)
    if isinstance(logits, Tensor) and logits.dim() > 0:
        logits, count_potential, key = _flatten(logits, count_potential, key)
    distribution = SubsetDistribution(circuit, logits, count_potential, validate_args=validate_args)
    lost = _lost_rows(distribution)
    mask = _decide(distribution, decide, key) if replay is None else _replayed(distribution, replay, lost)
    if lost is not None:
        mask = mask & ~lost[:, None]
    with torch.autocast(logits.device.type, enabled=False):
        g = crossing(mask.to(distribution.logits.dtype), distribution)
        gates = _weigh(g, mask, distribution, combine)
    if lost is not None:
        gates = torch.where(lost[:, None], torch.nan, gates)
    return Routing(distribution, mask, gates)


def as_combine(combine: Combine) -> Combine:
    """``combine``, or a ValueError that lists the known ones."""
    if combine not in COMBINES:
        raise ValueError(f"combine={combine!r}: choose one of {', '.join(map(repr, COMBINES))}")
    return combine


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


def _lost_rows(distribution: SubsetDistribution) -> Tensor | None:
    """[T] bool, rows without any subset; None where validation has ruled them out."""
    if distribution._validate_args:
        return None
    if cannot_look(distribution.logits):  # what the sweep finds
        return distribution.log_partition.isnan()
    lost = distribution.logits.isnan().any(-1)
    if distribution.count_potential is not None:
        lost = lost | distribution.count_potential.isnan().any(-1)
    return lost | unsatisfiable_rows(distribution.circuit, distribution.logits, distribution.count_potential)


def _decide(distribution: SubsetDistribution, decide: Decide, key: Tensor | int | None) -> Tensor:
    """[T, E] bool."""
    if decide == "sample":
        return distribution.sample_in_sweep(key)
    count = distribution.count_probs.detach().argmax(-1) if decide == "count" else None
    return distribution.mode_mask(count)


def _replayed(distribution: SubsetDistribution, replay: Tensor, lost: Tensor | None) -> Tensor:
    """[T, E] bool, the recorded decision; rows that are lost had none to check."""
    mask = recorded_mask(replay, distribution.logits)
    allowed = boolean.satisfies(distribution.circuit, mask)
    infinite = torch.isinf(distribution.logits)
    allowed &= ((distribution.logits > 0) == mask).logical_or_(~infinite).all(-1)
    if distribution.count_potential is not None:
        potential = distribution.count_potential.expand(len(mask), -1)
        count = mask.sum(-1, keepdim=True).clamp(max=potential.shape[-1] - 1)
        allowed &= potential.gather(-1, count).squeeze(-1) > -torch.inf
    if lost is not None:
        allowed |= lost
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


def _weigh(g: Tensor, mask: Tensor, distribution: SubsetDistribution, combine: Combine) -> Tensor:
    """[T, E] gates: the estimator's mask times each expert's weight."""
    if combine == "marginal":
        return g * distribution.marginals
    return weigh_by_logits(g, mask, distribution.logits, combine)


def weigh_by_logits(
    g: Tensor, mask: Tensor, logits: Tensor, combine: Literal["softmax", "normalized", "sigmoid"]
) -> Tensor:
    """[T, E] g times each expert's weight, for the rules that take it from the logits."""
    if combine == "softmax":
        return g * expert_softmax(logits)
    if combine == "sigmoid":
        return g * torch.sigmoid(logits)
    return _normalized(g, mask, logits)


def expert_softmax(logits: Tensor) -> Tensor:
    """[T, E] softmax over all experts; forced ones (+inf) share all of it, and a row of -inf is left uniform."""
    if not cannot_look(logits) and certainly_finite(logits):
        return torch.softmax(logits, -1)
    forced = logits == torch.inf
    some, none = forced.any(-1, keepdim=True), (logits == -torch.inf).all(-1, keepdim=True)
    logits = torch.where(some, torch.where(forced, 0.0, -torch.inf), logits)
    return torch.softmax(torch.where(none, 0.0, logits), -1)


def _normalized(g: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
    """Softmax over the chosen experts, written with g so that its gradient reaches the unchosen ones."""
    finite = torch.where(logits == torch.inf, torch.finfo(logits.dtype).max, logits)
    top = torch.where(mask, finite, -torch.inf).amax(-1, keepdim=True).detach()
    top = torch.where(torch.isinf(top), 0.0, top)  # nothing chosen
    weights = g * (finite - top).clamp(max=MAX_RELATIVE_LOGIT).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)
