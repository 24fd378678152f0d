"""A budget over the tokens of a sequence, kept causally, by :mod:`~circuitroute.routing.budgets.sequence_budget`.

Legend: S sequences, T tokens of each, E experts, K the largest count of a token, J = K + 1; L tokens of a block.

The number of experts is decided token by token, which is a scan of S J numbers; the subsets of those sizes are then
decided for all tokens at once. Both together are one draw of every token's law under its count potential: the one that
:func:`circuitroute.route` makes of the same logits, potential and key.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuitroute._tensors import batched, recorded, untraced, without_numbers
from circuitroute._validate import as_real, int_at_least, present
from circuitroute.constraints import Constraint
from circuitroute.engines.subset.naive import log_count_weights
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution, validating
from circuitroute.inference.evidence import rows_text
from circuitroute.keys import uniform
from circuitroute.routing import choice
from circuitroute.routing.budgets.sequence_budget import DEAD, Total, ahead, block_at, messages
from circuitroute.routing.budgets.wrapped import WrappedRouting
from circuitroute.routing.choice import Batch, Decide
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.records import RoutingRecord
from circuitroute.routing.route import routed
from circuitroute.routing.weights import Combine, as_combine

# How much less likely than the rarest count one is taken to be that was possible to no token so far, in nats.
UNSEEN = 10.0


class SequenceState(NamedTuple):
    """Where sequences stand: handed from call to call, never kept. Its tensors carry no gradient.

    Attributes:
        position: how many tokens of each sequence are decided.
        length: how many the total is for.
        spent: [S] int64, the experts that they have used.
        seen: [S, J] float64, the sum of their log count posteriors without a budget, which those to come are taken for.
        times: [S, J] float64, how many tokens there are in each sum: those to which the count was possible.
        entered: [S] int64, what was spent before the block in hand.
        messages: [S, L + 1, W] float64, V of the block in hand, see
            :mod:`circuitroute.routing.budgets.sequence_budget`.
    """

    position: int
    length: int
    spent: Tensor
    seen: Tensor
    times: Tensor
    entered: Tensor
    messages: Tensor


class SequenceRouting(WrappedRouting):
    """A decision of sequences within a total; see :func:`circuitroute.route_sequence`.

    The rows are tokens, those of the first sequence first. ``distribution`` and ``log_prob`` are those of a token given
    all that was decided before it, so that the log-probability of a sequence is the sum over its tokens.

    Attributes:
        state: where the sequences stand after these tokens.
    """

    def __init__(self, decided: Routing, state: SequenceState) -> None:
        super().__init__(decided)
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceRouting, (self.decided, self.state)

    def __repr__(self) -> str:
        tokens, experts = self.mask.shape
        rule = self.untempered.circuit.constraint
        at = f"{self.state.position} of {self.state.length} decided"
        return f"SequenceRouting({tokens} tokens, {at}, {experts} experts, {rule!r})"


def route_sequence(
    logits: Tensor,
    circuit: Circuit,
    *,
    total: int | Constraint,
    decide: Decide | float | None = None,
    key: Tensor | int | None = None,
    state: SequenceState | None = None,
    length: int | None = None,
    block: int = 32,
    estimate: Tensor | None = None,
    combine: Combine = "softmax",
    estimator: str | Estimator = "simple",
    training: bool = True,
    replay: Tensor | RoutingRecord | None = None,
    temperature: float | Tensor = 1.0,
    price: float | Tensor | None = None,
    bias: Tensor | None = None,
    count_potential: Tensor | None = None,
    validate_args: bool | None = None,
) -> SequenceRouting:
    """Decide which experts each token uses, in order, so that every sequence's experts add up to an allowed total.

    Causal: a token's decision is a function of its logits and key, and of those of the tokens before it. The total is
    kept whatever they are. A sequence can be decided in parts of any sizes, down to one token, with the same result:
    hand ``routing.state`` on as ``state=``, and say at first for how many tokens the total is, ``length=``.

    A token decides under a count potential, its own and what the budget leaves to those after it, about which the law
    of one count is assumed: the mean of the log posteriors of the tokens up to the first of its block, or ``estimate``.
    With ``decide="mode"`` it takes the most probable number of experts, and of that number the best, as budgets over
    layers do.

    Args:
        logits: [..., T, E]; leading dimensions are sequences, each with a budget of its own.
        circuit: a compiled constraint on the count of all E experts.
        total: of every sequence: a number, at most that many; or a constraint on the count such as ``cr.Between(90,
            128)``.
        state: of an earlier call, which these tokens follow; with the same total, block and circuit.
        length: for how many tokens of each sequence the total is; as many as there are here by default.
        block: L: the law of the counts to come is estimated anew for every so many tokens (and after 1, 2, 4, ... at
            first), and is worked with exactly for as many tokens ahead, by a bound beyond; a state holds about S L L K
            numbers.
        estimate: [K + 1] or [..., K + 1], log weights of a coming token's counts, in place of what is learned from the
            tokens so far.
        decide, key, combine, estimator, training, replay, temperature, price, bias, count_potential, validate_args: see
            :func:`circuitroute.route`. Their leading dimensions are [..., T]. No gradient crosses what the budget takes
            from the tokens before.

    Returns:
        A routing of all tokens in one dimension, with ``.state``.

    Raises:
        InfeasibleError: so many tokens cannot have an allowed total.
        TypeError, ValueError: see :func:`circuitroute.route`; a circuit that is no count of all experts; a token whose
            infinite logits, or whose replayed mask, the total leaves no room for, named by row; a state of other
            sequences.
        NotImplementedError: in a traced program or under torch.func.vmap. torch.compile breaks its graph here.
    """
    as_combine(combine)
    share = choice.as_share(decide, estimator)
    share = share if training else 0.0
    _counts_of(circuit)
    logits = as_real("logits", logits, floating=True)
    if logits.dim() < 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: expected [..., tokens, experts]")
    given = {"key": key, "temperature": temperature, "count_potential": count_potential}
    given |= {"price": price, "bias": bias, "validate_args": validate_args}
    along = (total, state, length, int_at_least("block", block, 1), estimate)
    weights = {"combine": combine, "estimator": estimator, "replay": replay}
    routing: SequenceRouting = _along(logits, circuit, share, along, given, weights)
    return routing


@untraced  # type: ignore[untyped-decorator]
def _along(
    logits: Tensor,
    circuit: Circuit,
    share: float,
    along: tuple[int | Constraint, SequenceState | None, int | None, int, Tensor | None],
    given: dict[str, Any],
    weights: dict[str, Any],
) -> SequenceRouting:
    """The decision, of arguments that are options alone; outside of what torch.compile traces."""
    total, state, length, block, estimate = along
    price, bias, replay = given.pop("price"), given.pop("bias"), weights.pop("replay")
    whole = Batch.of(logits, circuit, shift=choice.shift_of(price, bias, logits, circuit.n), **given)
    _refuse_what_cannot_be_looked_at(whole.logits)
    if whole.unchecked:
        whole.untempered.check()
        whole = whole._replace(unchecked=False)
    if share > 0:
        whole = whole._replace(key=whole.untempered.keys(whole.key))
    S, T = logits.shape[:-2].numel(), logits.shape[-2]
    length = _length(length, state, T)
    budget = Total.of(total, length, _counts_of(circuit))
    assumed = None if estimate is None else _estimate(estimate, circuit, logits)
    if state is None:
        state = _start(length, S, circuit.max_count + 1, logits.device)
    _check_state(state, budget, S, T, circuit.max_count + 1)
    scan = _Scan(whole, S, T, share, None if replay is None else _replayed(replay, whole))
    state = scan.run(state, budget, block, assumed)
    if bool(scan.closed.any()) and (replay is not None or validating(given["validate_args"], logits)):
        raise _no_room(scan, total, replay is not None)
    return SequenceRouting(_decided(scan, **weights), state)


class _Scan:
    """Counts of tokens, one after another.

    Args:
        share, replayed: how they are decided; a replayed mask is [S T, E].

    Attributes:
        counts: [S, T] int64.
        offered: [S, T, J] float64, what the budget adds to the potential; -inf where it is closed.
        closed: [S, T] bool, tokens that are left no count; they have none.
    """

    def __init__(self, batch: Batch, S: int, T: int, share: float, replayed: Tensor | None) -> None:
        self.batch, self.share, self.replayed = batch, share, replayed
        self.J = batch.untempered.circuit.max_count + 1
        device = batch.untempered.logits.device
        self.counts = torch.zeros(S, T, dtype=torch.int64, device=device)
        self.offered = torch.full((S, T, self.J), -math.inf, dtype=torch.float64, device=device)
        self.closed = torch.zeros(S, T, dtype=torch.bool, device=device)
        if replayed is not None:
            self.counts = replayed.sum(-1).view(S, T)
        self.untempered = batch.untempered
        self.distribution = batch.untempered.tempered(batch.temperature)
        self.invalid = self.untempered.invalid_rows()
        self.sampled = torch.zeros(S * T, dtype=torch.bool, device=device)
        if share > 0:
            keys = batch.untempered.keys(batch.key)
            self.sampled = choice.sampled_tokens(keys, share) if share < 1 else ~self.sampled
            self.uniforms = uniform(keys, 0, 1, torch.float64)[0].view(S, T)

    @torch.no_grad()
    def run(self, state: SequenceState, total: Total, block: int, assumed: Tensor | None) -> SequenceState:
        """Decide all counts; the state after them."""
        T, first = self.counts.shape[1], state.position
        while state.position < first + T:
            begin = state.position - first
            start, end = block_at(state.position, block)
            end = min(end, state.length)
            rows = slice(begin, min(T, end - first))
            own = self._log_weights(self.distribution if self.share > 0 else self.untempered, rows)
            valid = own.amax(-1) > 0.5 * DEAD
            times = (own > 0.5 * DEAD).double()
            posteriors = torch.where(times > 0, own.log_softmax(-1), 0.0)
            if state.position == start:
                first_too = (state.seen + posteriors[:, 0], state.times + times[:, 0])
                log_q = _expected(*first_too, total.counts) if assumed is None else assumed
                left = state.length - start
                found = messages(total, left, min(block, left), end - start, state.spent, log_q)
                state = state._replace(entered=state.spent, messages=found)
            state = self._within_block(state, rows, state.position - start, own, valid)
            state = state._replace(seen=state.seen + posteriors.sum(1), times=state.times + times.sum(1))
        return state

    def _within_block(self, state: SequenceState, rows: slice, done: int, own: Tensor, valid: Tensor) -> SequenceState:
        """Some tokens, ``done`` of their block before them, of which the weights of counts are known."""
        S, T = self.counts.shape
        begin, tokens = rows.start, own.shape[1]
        ruled = own if self.share in (0, 1) else self._log_weights(self.untempered, rows)
        sampled, spent = self.sampled.view(S, T)[:, rows], state.spent - state.entered
        for i in range(tokens):
            offered = ahead(state.messages, done + i + 1, spent, self.J)
            weights = torch.where(sampled[:, i, None], own[:, i], ruled[:, i]) + offered
            largest = weights.amax(-1, keepdim=True)
            closed = largest[:, 0] <= 0.5 * DEAD
            if self.replayed is None:
                count = torch.where(closed, 0, self._count(weights - largest, sampled[:, i], begin + i))
                self.counts[:, begin + i] = count
            else:
                count = self.counts[:, begin + i]
                closed = weights.gather(1, count[:, None])[:, 0] <= 0.5 * DEAD
            # In float64, where a constant changes nothing, so that float32 can hold the rest.
            self.offered[:, begin + i] = torch.where(
                offered > 0.5 * DEAD, offered - offered.amax(-1, keepdim=True), -math.inf
            )
            self.closed[:, begin + i] = closed & valid[:, i]
            spent = spent + count
        return state._replace(position=state.position + tokens, spent=state.entered + spent)

    def _count(self, weights: Tensor, sampled: Tensor, token: int) -> Tensor:
        """[S] int64, drawn where sampled, else the most probable, the lower among equals."""
        shares = weights.exp()
        if self.share == 0:
            return choice.likeliest(shares)
        below = shares.cumsum(-1)
        drawn = (below[:, :-1] <= self.uniforms[:, token, None] * below[:, -1:]).sum(-1)
        return drawn if self.share == 1 else torch.where(sampled, drawn, choice.likeliest(shares))

    def _log_weights(self, distribution: SubsetDistribution, rows: slice) -> Tensor:
        """[S, tokens, J] float64, log weights of the counts without the budget; ``DEAD`` where there are none."""
        S, T = self.counts.shape
        given, potential = distribution.rows.inputs()
        potential = present(potential, "a circuit with counts has a potential")
        logits = given.detach().reshape(S, T, given.shape[-1])[:, rows]
        own = log_count_weights(logits.flatten(0, 1), self.J - 1).view(*logits.shape[:2], self.J)
        phi = potential.detach().double()
        phi = phi.view(S, T, self.J)[:, rows] if phi.dim() > 1 else phi
        weights = (own + phi).clamp(min=DEAD)
        if self.invalid is not None:
            weights = weights.masked_fill(self.invalid.view(S, T)[:, rows, None], DEAD)
        return weights


def _expected(seen: Tensor, times: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[S, J] log q: the mean of the log posteriors seen. What was possible to no token so far is unlikely, no more."""
    allowed = torch.zeros_like(seen, dtype=torch.bool)
    allowed[:, list(counts)] = True
    mean = torch.where(times > 0, seen / times.clamp(min=1), math.inf)
    mean = torch.where(times > 0, mean, (mean.amin(-1, keepdim=True) - UNSEEN).clamp(max=0))
    return torch.where(allowed, mean, -math.inf).log_softmax(-1)


def _decided(scan: _Scan, combine: Combine, estimator: str | Estimator) -> Routing:
    """The subsets of the counts that were decided, as a decision of every token under its count potential."""
    batch, J = scan.batch, scan.J
    circuit, choosing = batch.untempered.circuit, batch.untempered.logits
    offered = scan.offered.view(-1, J)
    own = batch.untempered.count_potential
    potential = offered.to(choosing.dtype) if own is None else own + offered.to(own.dtype)
    untempered = SubsetDistribution(circuit, choosing, potential, validate_args=False)
    mask = scan.replayed if scan.replayed is not None else _subsets(scan)
    untempered._validate_args = batch.untempered._validate_args and not bool(scan.closed.any())
    return routed(batch._replace(untempered=untempered), scan.share, combine=combine, estimator=estimator, replay=mask)


@torch.no_grad()
def _subsets(scan: _Scan) -> Tensor:
    """[S T, E] bool: of each token's count, drawn or the best."""
    count = scan.counts.view(-1)
    mask = torch.zeros_like(scan.untempered.logits, dtype=torch.bool)
    if scan.share < 1:
        mask = scan.untempered.mode_mask(count)
    if scan.share > 0:
        only = torch.arange(scan.J, device=count.device) == count[:, None]
        fixed = torch.where(only, 0.0, -math.inf).to(scan.distribution.logits)
        law = SubsetDistribution(scan.untempered.circuit, scan.distribution.logits, fixed, validate_args=False)
        mask = torch.where(scan.sampled[:, None], law.sample(key=scan.batch.key) == 1, mask)
    lost = scan.closed.view(-1) if scan.invalid is None else scan.closed.view(-1) | scan.invalid
    return mask & ~lost[:, None]


# ---------------------------------------------------------------------------------------------- arguments


def _refuse_what_cannot_be_looked_at(logits: Tensor) -> None:
    if batched() or recorded(logits) or without_numbers(logits):
        raise NotImplementedError(
            "logits: route_sequence() decides token by token, and looks at what is left: it cannot be recorded for "
            "other values, or be batched; call it outside, with sequences as leading dimensions"
        )


def _counts_of(circuit: Circuit) -> tuple[int, ...]:
    if not isinstance(circuit, Circuit):
        raise TypeError(f"circuit={circuit!r}: expected a circuit, such as cr.compile(cr.Between(1, 8), 64)")
    if circuit.counts is None:
        raise TypeError(
            f"circuit of {circuit.constraint!r}: a sequence's budget needs a constraint on the count of all experts, "
            "such as cr.Between(1, 8), whose subsets of every size it can weigh"
        )
    return circuit.counts


def _length(length: int | None, state: SequenceState | None, tokens: int) -> int:
    """How many tokens the total is for."""
    given = None if length is None else int_at_least("length", length, 0)
    known = tokens if state is None else state.length
    if state is not None and given not in (None, known):
        raise ValueError(f"length={given}: the state is of sequences of {known} tokens; give what they began with")
    return known if given is None else given


def _start(length: int, S: int, J: int, device: torch.device) -> SequenceState:
    spent = torch.zeros(S, dtype=torch.int64, device=device)
    seen = torch.zeros(S, J, dtype=torch.float64, device=device)
    return SequenceState(0, length, spent, seen, seen, spent, seen.new_zeros(S, 0, 0))


def _check_state(state: SequenceState, total: Total, S: int, T: int, J: int) -> None:
    left = state.length - state.position
    if left < T:
        raise ValueError(
            f"logits hold {T} tokens of each sequence, and {left} of length={state.length} are left; give the "
            "length that the total is for"
        )
    if state.seen.shape != (S, J):
        raise ValueError(
            f"state is of {len(state.seen)} sequences, {state.seen.shape[-1] - 1} experts per token at most; logits "
            f"and circuit have {S} and {J - 1}: give the state of these sequences"
        )
    shut = ~total.open(left, state.spent)
    if bool(shut.any()):
        raise ValueError(
            f"state: total={total.constraint!r} cannot be met any more by {rows_text(shut)} of its sequences, with "
            f"{left} tokens left; give the total that they began with"
        )


def _estimate(estimate: Tensor, circuit: Circuit, logits: Tensor) -> Tensor:
    """[J] or [S, J] float64 log weights."""
    given = as_real("estimate", estimate).detach().to(logits.device, torch.float64)
    J, batch = circuit.max_count + 1, logits.shape[:-2]
    if given.dim() == 0 or given.shape[-1] != J:
        raise ValueError(f"estimate has shape {tuple(given.shape)}: its last dimension must be max_count + 1 = {J}")
    try:
        given = given.expand(*batch, J).reshape(-1, J)
    except RuntimeError:
        raise ValueError(f"estimate has shape {tuple(given.shape)}: it must broadcast to {(*batch, J)}") from None
    allowed = torch.zeros_like(given, dtype=torch.bool)
    allowed[:, list(circuit.counts or ())] = True
    if not bool((given.isfinite() | ~allowed).all()):
        raise ValueError("estimate: expected finite log weights for all counts that the circuit allows")
    return torch.where(allowed, given, -math.inf).log_softmax(-1).expand(batch.numel(), -1)


def _replayed(replay: Tensor | RoutingRecord, batch: Batch) -> Tensor:
    """[S T, E] bool, a recorded decision that the constraint and the evidence of its tokens allow."""
    return choice.replayed(batch, replay, batch.untempered.invalid_rows())


def _no_room(scan: _Scan, total: int | Constraint, replayed: bool) -> ValueError:
    rows = rows_text(scan.closed.view(-1))
    if replayed:
        return ValueError(f"replay leaves the total={total!r} at {rows}: replay what was decided within this total")
    return ValueError(
        f"total={total!r} leaves no room for the infinite logits (or the count potential) of {rows}, given what the "
        "tokens before have; force fewer experts, or raise the total"
    )
