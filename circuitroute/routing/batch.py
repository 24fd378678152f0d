"""A batch of tokens within a number of distinct experts: a decode step costs what it loads.

Legend: T tokens, E experts, M experts of the batch.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from circuitroute._tensors import batched, plain, recorded, untraced, without_numbers
from circuitroute._validate import index_tuple, int_at_least, one_of
from circuitroute.errors import InfeasibleError
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.inference.evidence import rows_text, unsatisfiable_rows
from circuitroute.routing import choice
from circuitroute.routing.budgets.batch_choice import by_weights, greedy, key_of_batch, law_of_experts
from circuitroute.routing.budgets.wrapped import WrappedRouting
from circuitroute.routing.choice import Batch, Decide
from circuitroute.routing.decision import Pad, Routing, chosen_first
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.records import RoutingRecord
from circuitroute.routing.route import routed
from circuitroute.routing.weights import Combine, as_combine

Choose: TypeAlias = Literal["greedy", "sample"]
By: TypeAlias = Literal["weights", "logits"]
CHOOSE, BY = get_args(Choose), get_args(By)


class BatchRouting(WrappedRouting):
    """A decision of tokens that share a set of experts; see :func:`circuitroute.route_batch`.

    ``distribution``, ``marginals`` and ``log_prob`` are those given the set: of the tokens' laws with everything
    outside it forbidden. ``logits`` are as given.

    Attributes:
        experts: [M] int64, the set, increasing.
    """

    def __init__(self, decided: Routing, experts: Tensor, law: SubsetDistribution | None = None) -> None:
        super().__init__(decided)
        self.experts = experts
        self._law = law

    @property
    def experts_log_prob(self) -> Tensor | None:
        """[] float64, the exact log-probability of a set that was drawn, differentiable; None of one that was not."""
        return None if self._law is None else self._law.log_prob(self._within())

    @property
    def max_count(self) -> int:
        """The most experts that any token may have; at least 1, so that there is a slot."""
        return max(1, min(self.decided.max_count, len(self.experts)))

    def padded(self, width: int | None = None, pad: Pad = "distinct") -> tuple[Tensor, Tensor]:
        """See :meth:`Routing.padded`; ``"distinct"`` fills up with experts of the set, so that no other is loaded.

        Raises:
            ValueError: see there; more ``"distinct"`` slots than the set has experts.
        """
        slots = self._slots(width, pad)
        if pad != "distinct":
            return self.decided.padded(slots, pad)
        if slots > len(self.experts):
            raise ValueError(
                f"width={slots}: the batch has {len(self.experts)} experts to fill slots with; pad by 'sentinel' or "
                "'minus_one', or give a smaller width"
            )
        first = self.mask.to(torch.uint8) + self._within().to(torch.uint8)
        indices = chosen_first(first, self.logits.detach(), slots)
        used = self.mask.gather(-1, indices)
        return torch.where(used, self.gates.gather(-1, indices), 0.0), indices

    def _within(self) -> Tensor:
        """[E] bool."""
        within = torch.zeros(self.mask.shape[-1], dtype=torch.bool, device=self.mask.device)
        within[self.experts] = True
        return within

    def __reduce__(self) -> tuple[Any, ...]:
        law = None if self._law is None else (self._law.circuit, self._law.logits.detach())
        return _restored, (self.decided, self.experts, law)

    def __repr__(self) -> str:
        tokens, experts = self.mask.shape
        rule = self.untempered.circuit.constraint
        return f"BatchRouting({tokens} tokens, {len(self.experts)} of {experts} experts, {rule!r})"


def _restored(decided: Routing, experts: Tensor, law: tuple[Circuit, Tensor] | None) -> BatchRouting:
    """A pickled decision."""
    return BatchRouting(decided, experts, None if law is None else SubsetDistribution(*law, validate_args=False))


def route_batch(
    logits: Tensor,
    circuit: Circuit,
    *,
    max_distinct: int,
    decide: Decide | float | None = None,
    key: Tensor | int | None = None,
    choose: Choose | None = None,
    by: By = "weights",
    exchanges: int = 0,
    experts: Tensor | None = None,
    combine: Combine = "softmax",
    estimator: str | Estimator = "simple",
    training: bool = True,
    replay: Tensor | RoutingRecord | None = None,
    temperature: float | Tensor = 1.0,
    price: float | Tensor | None = None,
    bias: Tensor | None = None,
    count_potential: Tensor | None = None,
    validate_args: bool | None = None,
) -> BatchRouting:
    """Decide which experts each token uses, no more than ``max_distinct`` of them between all tokens.

    A set of experts is chosen for the batch, and every token is routed exactly within it: for the choice, and for the
    choice alone, everything else is forbidden by evidence. Weights are those of :func:`circuitroute.route`, of the
    logits as given: with ``combine="softmax"`` over all E experts, whether or not the batch has them. (``"normalized"``
    is over the chosen ones, and ``"marginal"`` has the marginals of the law that is decided on, within the set.)

    How the set is chosen, and how far that is from the best one, is told in
    :mod:`circuitroute.routing.budgets.batch_choice` and on ``docs/batch-budgets.md``. No gradient crosses its
    choice. A token's decision depends on the other tokens through the set alone; the set depends on all of them.

    Args:
        logits: [T, E]; more leading dimensions are flattened into one batch of tokens.
        circuit: the compiled constraint over E experts, of any kind; every token keeps it.
        max_distinct: M. The set has min(M, E) experts; those that no token wants fill it up.
        choose: ``"greedy"``, a deterministic rule, or ``"sample"``, drawn with an exact log-probability. None: drawn
            if tokens are, too.
        by: what the set is to keep: the ``"weights"`` that tokens give their experts, or by ``"logits"`` the
            log-probability of the decisions that tokens would make with all experts.
        exchanges: of the greedy rule, how many times an exchange of one expert is tried after the first pick. Each
            takes one sweep or two.
        experts: the set to use, in place of choosing one: indices of at most M experts, or a mask [E]; as to replay a
            decision with the ``experts`` that it was recorded with.
        decide, key, combine, estimator, training, replay, temperature, price, bias, count_potential, validate_args: see
            :func:`circuitroute.route`. The draw of the set has a key of its own, made of those of all tokens.

    Raises:
        InfeasibleError: M is below what a token needs, or no set of M experts holds a subset for every token (or none
            was found); says which rows need what.
        ValueError: see :func:`circuitroute.route`; given ``experts`` that leave a token without a subset, or a replayed
            mask outside the set, named by row.
        NotImplementedError: in a traced program or under torch.func.vmap, where values cannot be looked at.
            torch.compile breaks its graph here.
    """
    if not isinstance(circuit, Circuit):
        raise TypeError(f"circuit={circuit!r}: expected a circuit, such as cr.compile(cr.Exactly(8), 64)")
    as_combine(combine)
    share = choice.as_share(decide, estimator)
    share = share if training else 0.0
    most = int_at_least("max_distinct", max_distinct, 0)
    exchanges, by = int_at_least("exchanges", exchanges, 0), one_of("by", by, BY)
    drawn = (share > 0 if choose is None else one_of("choose", choose, CHOOSE) == "sample") and experts is None
    given = {"key": key, "temperature": temperature, "count_potential": count_potential}
    given |= {"price": price, "bias": bias, "validate_args": validate_args}
    sets = (min(most, circuit.n), drawn, by, exchanges, experts)
    weights = {"combine": combine, "estimator": estimator, "replay": replay}
    routing: BatchRouting = _in_a_set(logits, circuit, share, sets, given, weights)
    return routing


@untraced  # type: ignore[untyped-decorator]
def _in_a_set(
    logits: Tensor,
    circuit: Circuit,
    share: float,
    sets: tuple[int, bool, By, int, Tensor | None],
    given: dict[str, Any],
    weights: dict[str, Any],
) -> BatchRouting:
    """The decision, of arguments that are options alone; outside of what torch.compile traces."""
    most, drawn, by, exchanges, experts = sets
    price, bias = given.pop("price"), given.pop("bias")
    whole = Batch.of(logits, circuit, shift=choice.shift_of(price, bias, logits, circuit.n), **given)
    _refuse_what_cannot_be_looked_at(whole.logits)
    if whole.unchecked:
        whole.untempered.check()
        whole = whole._replace(unchecked=False)
    distribution = whole.untempered
    if share > 0 or drawn:
        whole = whole._replace(key=distribution.keys(whole.key))
        distribution = distribution.tempered(whole.temperature)
    law = None
    wanted = by_weights(whole.untempered, weights["combine"]) if by == "weights" else distribution
    if experts is not None:
        within = _given(experts, most, distribution)
    elif drawn:
        law = law_of_experts(wanted, most)
        within = law.sample(key=key_of_batch(distribution.keys(whole.key))) == 1
    else:
        within = greedy(wanted, most, exchanges)
    if weights["replay"] is not None:
        weights["replay"] = _replayed(weights["replay"], within, whole)
    inside = torch.where(within, whole.untempered.logits, -math.inf)
    invalid = whole.untempered.invalid_rows()
    if invalid is not None:  # and stay so without the +inf that nothing satisfies
        inside = torch.where(invalid[:, None], math.nan, inside)
    restricted = SubsetDistribution(circuit, inside, whole.untempered.count_potential, given["validate_args"])
    decided = routed(whole._replace(untempered=restricted), share, **weights)
    return BatchRouting(decided, within.nonzero()[:, 0], law)


def _refuse_what_cannot_be_looked_at(logits: Tensor) -> None:
    if batched() or recorded(logits) or without_numbers(logits):
        raise NotImplementedError(
            "logits: route_batch() looks at their values to choose the experts of the batch, which are batched here, "
            "recorded for other values, or not there; choose them outside, and route by cr.route on logits with -inf "
            "elsewhere"
        )


def _given(experts: Tensor, most: int, distribution: SubsetDistribution) -> Tensor:
    """[E] bool, a set that the caller gave."""
    n, device = distribution.circuit.n, distribution.logits.device
    given = plain("experts", experts)
    if given.is_complex() or given.is_floating_point():
        raise TypeError(f"experts has dtype {given.dtype}: expected integer indices, or a mask of bools")
    within = torch.zeros(n, dtype=torch.bool, device=device)
    if given.dtype == torch.bool:
        if given.shape != (n,):
            raise ValueError(f"experts has shape {tuple(given.shape)}: a mask must be ({n},), indices integers")
        within |= given.to(device)
    elif given.numel():
        if given.dim() != 1:
            raise ValueError(
                f"experts has shape {tuple(given.shape)}: expected indices in one dimension, or a mask ({n},)"
            )
        indices = index_tuple("experts", given.tolist())
        if max(indices) >= n:
            raise ValueError(f"experts holds index {max(indices)}: indices must lie in 0..{n - 1}")
        within[list(indices)] = True
    if int(within.sum()) > most:
        raise ValueError(f"experts are {int(within.sum())}: more than max_distinct={most}; give fewer, or raise it")
    evidence = distribution.logits.detach().masked_fill(~within, -math.inf)
    lost = (~within & (distribution.logits == math.inf)).any(-1)
    lost = lost | unsatisfiable_rows(distribution.circuit, evidence, distribution.count_potential, finite=False)
    invalid = distribution.invalid_rows()
    lost = lost if invalid is None else lost & ~invalid
    if bool(lost.any()):
        raise InfeasibleError(
            f"experts hold no subset that {distribution.circuit.constraint!r}, the infinite logits and the count "
            f"potential allow in {rows_text(lost)}; give others, or leave the choice to max_distinct"
        )
    return within


def _replayed(replay: Tensor | RoutingRecord, within: Tensor, batch: Batch) -> Tensor:
    """[T, E] bool, the recorded decision, which must be within the set [E] bool."""
    mask = choice.recorded_mask(replay, batch.untempered.logits, batch.temperature)
    outside = (mask & ~within).any(-1)
    if bool(outside.any()):
        raise ValueError(
            f"replay holds experts outside the batch's set {within.nonzero()[:, 0].tolist()} in {rows_text(outside)}; "
            "give experts=..., those that it was recorded with, or the same key and max_distinct"
        )
    return mask
