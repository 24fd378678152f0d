"""A decision per token: which experts, its projections, and what training, serving and replay need of it.

Legend: T tokens, E experts, K slots of a padded projection; z the 0/1 mask of the chosen experts.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from circuitroute._tensors import batched, recorded, without_numbers
from circuitroute._validate import as_number, int_at_least
from circuitroute.inference.distribution import SubsetDistribution

Pad: TypeAlias = Literal["distinct", "sentinel", "minus_one"]
PADS = get_args(Pad)  # here, since torch 2.6 cannot trace get_args


class Decision(NamedTuple):
    """Which experts, before any weights; see :func:`circuitroute.routing.choice.decide`.

    Attributes:
        distribution: what was decided on, with batch [T]: that of the logits, moved by price and bias, divided by the
            temperature.
        mask: [T, E] bool, the chosen experts; none in invalid rows.
        invalid: [T] bool, rows with NaN or without any subset; None where there are none.
        untempered: the distribution at temperature 1, which has the mode.
        logits: [T, E] as given, in float32 or float64: what the weights are made of.
        temperature: a number, or a tensor [] or [T].
    """

    distribution: SubsetDistribution
    mask: Tensor
    invalid: Tensor | None
    untempered: SubsetDistribution
    logits: Tensor
    temperature: float | Tensor

    def routing(self, gates: Tensor) -> Routing:
        """The decision with its weights, [T, E]."""
        return Routing(self.distribution, self.mask, gates, self.untempered, self.logits, self.temperature)


def chosen_first(mask: Tensor, scores: Tensor, slots: int) -> Tensor:
    """[T, slots] int64, the chosen experts by decreasing score (lower indices among equals), then the others likewise.

    Args:
        mask: [T, E] bool; or uint8, of which larger numbers come first.
        scores: [T, E].
    """
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    # Stable: chosen and unchosen experts each keep the order of the first sort.
    order = mask.gather(-1, by_score).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return by_score.gather(-1, order[:, :slots])


def by_token(decision: object, rows: Tensor) -> Tensor:
    """[T, ...] rows of a decision, put in the order of the tokens' numbers; differentiable.

    Args:
        decision: a :class:`Routing`; whatever else has no numbers, and its rows stay as they are.
        rows: [T, ...] of that decision, such as its mask or log-probabilities.
    """
    token: Tensor | None = getattr(decision, "token", None)
    return rows if token is None else rows.index_select(0, token.argsort().to(rows.device))


class Routing:
    """The chosen experts of T tokens, with what training, serving and replay need of the choice.

    Pickled, sent to another process or copied by ``copy.deepcopy`` it is one of the same values, without the graph that
    autograd has of it, as ``detach()`` gives them; ``copy.copy`` keeps the graph.

    Attributes:
        mask: [T, E] bool, the chosen experts.
        temperature: what the logits were divided by for the decision: a number, or a tensor [] or [T].
        token: [T] int64, the numbers of the rows' tokens, where a host holds them in another order than that of their
            numbers; else None. Records are by number: see :func:`by_token`.
    """

    token: Tensor | None = None

    def __init__(
        self,
        distribution: SubsetDistribution,
        mask: Tensor,
        gates: Tensor,
        untempered: SubsetDistribution | None = None,
        logits: Tensor | None = None,
        temperature: float | Tensor = 1.0,
    ) -> None:
        self._distribution = distribution
        self._untempered = distribution if untempered is None else untempered
        self._logits = self._untempered.logits if logits is None else logits
        self.mask = mask
        self._gates = gates
        self.temperature = temperature if isinstance(temperature, Tensor) else as_number("temperature", temperature)

    @property
    def gates(self) -> Tensor:
        """[T, E] float32, combination weights; 0 off the chosen set in value, with the estimator's gradient."""
        return self._gates

    def weighed(self, gates: Tensor, logits: Tensor | None = None) -> Routing:
        """The same decision with other weights [T, E], and with ``logits`` [T, E] as those it was made of."""
        logits = self.logits if logits is None else logits
        weighed = Routing(self.distribution, self.mask, gates, self.untempered, logits, self.temperature)
        weighed.token = self.token
        return weighed

    @property
    def distribution(self) -> SubsetDistribution:
        """What the decision was drawn from, with batch [T]: that of the logits divided by the temperature."""
        return self._distribution

    @property
    def untempered(self) -> SubsetDistribution:
        """The distribution at temperature 1, which has the mode."""
        return self._untempered

    @property
    def logits(self) -> Tensor:
        """[T, E] float32 router logits, as given."""
        return self._logits

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
        return max(1, self.untempered.circuit.max_count)

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
        experts, slots = self.mask.shape[-1], self._slots(width, pad)
        first = chosen_first if pad == "distinct" else _chosen_alone
        indices = first(self.mask, self.logits.detach(), slots)
        used = self.mask.gather(-1, indices)
        weights = torch.where(used, self.gates.gather(-1, indices), 0.0)
        if pad == "sentinel":
            indices = torch.where(used, indices, experts)
        elif pad == "minus_one":
            indices = torch.where(used, indices, -1)
        return weights, indices

    def _slots(self, width: int | None, pad: Pad) -> int:
        """How many slots that is, or a ValueError that says what is wrong with it."""
        if pad not in PADS:
            raise ValueError(f"pad={pad!r}: choose one of {', '.join(map(repr, PADS))}")
        experts, largest = self.mask.shape[-1], self.max_count
        slots = largest if width is None else int_at_least("width", width, 1)
        if slots > experts:
            raise ValueError(f"width={slots}: there are only {experts} experts")
        if slots >= largest or not self.counts.numel() or without_numbers(self.mask):
            return slots
        if batched() or recorded(self.mask):
            raise ValueError(
                f"width={slots}: in a traced program, or under torch.func.vmap, it cannot be seen whether a token has "
                f"more experts; give max_count={largest}, or more"
            )
        if int(self.counts.max()) > slots:
            raise ValueError(f"width={slots}: a token has {int(self.counts.max())} experts; widen it")
        return slots

    def ragged(self, by: Literal["token", "expert"] = "token") -> tuple[Tensor, Tensor, Tensor]:
        """The decision as a list of (token, expert, weight), one entry per chosen expert.

        Args:
            by: sort by token and then expert, or by expert and then token (what a sparse dispatch wants).

        Returns:
            (token_index [S], expert_index [S], weight [S]) with S the total number of chosen experts.

        Raises:
            ValueError: ``by`` is something else.
        """
        if by not in ("token", "expert"):
            raise ValueError(f"by={by!r}: choose 'token' or 'expert'")
        if batched() or without_numbers(self.mask):
            raise NotImplementedError(
                "ragged(): how long the list is depends on values, which are batched here or not there; use padded()"
            )
        if by == "token":
            token, expert = self.mask.nonzero(as_tuple=True)
        else:
            expert, token = self.mask.t().nonzero(as_tuple=True)
        return token, expert, self.gates[token, expert]

    def __reduce__(self) -> tuple[Any, ...]:
        tempered = None if self.distribution is self.untempered else _parameters(self.distribution)
        temperature = self.temperature.detach() if isinstance(self.temperature, Tensor) else self.temperature
        untempered, values = _parameters(self.untempered), (self.mask, self.gates.detach(), self.logits.detach())
        numbered = {} if self.token is None else {"token": self.token}
        return _restored, (tempered, untempered, *values, temperature), numbered

    def __copy__(self) -> Routing:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __repr__(self) -> str:
        tokens, experts = self.mask.shape
        return f"Routing({tokens} tokens, {experts} experts, {self.untempered.circuit.constraint!r})"


# A circuit, logits and count potential.
Parameters: TypeAlias = tuple[Any, Tensor, Tensor | None]


def _parameters(distribution: SubsetDistribution) -> Parameters:
    """What a distribution is of, without a graph."""
    potential = distribution.count_potential
    return distribution.circuit, distribution.logits.detach(), None if potential is None else potential.detach()


def _restored(
    tempered: Parameters | None,
    untempered: Parameters,
    mask: Tensor,
    gates: Tensor,
    logits: Tensor,
    temperature: float | Tensor,
) -> Routing:
    """A pickled decision."""
    first = SubsetDistribution(*untempered, validate_args=False)
    distribution = first if tempered is None else SubsetDistribution(*tempered, validate_args=False)
    return Routing(distribution, mask, gates, first, logits, temperature)


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
        self._max_count = int_at_least("max_count", max_count, 0)
        self.mask = mask
        self._gates = gates
        self.temperature = 1.0

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
    def untempered(self) -> SubsetDistribution:
        """There is none; see :attr:`distribution`."""
        return self.distribution

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

    def __reduce__(self) -> tuple[Any, ...]:
        values = self.logits.detach(), self.marginals.detach(), self.mask, self.gates.detach()
        return SoftRouting, (*values, self.max_count)

    def __repr__(self) -> str:
        tokens, experts = self.mask.shape
        return f"SoftRouting({tokens} tokens, {experts} experts, at most {self.max_count} of them executed)"


def _chosen_alone(mask: Tensor, scores: Tensor, slots: int) -> Tensor:
    """As :func:`chosen_first` where a row has no more chosen experts than slots; the others are any, in any order.

    Without a sort of all experts, which takes several times as long.
    """
    # Chosen experts exceed the others, whatever their scores.
    candidates = torch.where(mask, scores.clamp(min=torch.finfo(scores.dtype).min), -torch.inf)
    indices = candidates.topk(slots, dim=-1, sorted=False).indices.sort(dim=-1).values
    # Stable, so that lower indices come first among equals, as topk does not promise.
    order = candidates.gather(-1, indices).argsort(dim=-1, descending=True, stable=True)
    return indices.gather(-1, order)
