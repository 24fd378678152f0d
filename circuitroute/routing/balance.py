"""Balance by a bias: each expert's logit is moved for the choice, and the weights are left alone.

Three rules, from a step's decisions to the bias of the next one. The state is the caller's::

    balance = cr.balance.ExactBalance(num_experts)
    state = balance.init()
    for hidden in batches:
        routing = router(hidden, bias=state.bias)
        state = balance.update(state, routing)

A decision must have been made with the state's bias, since what the rules find is relative to it. Nothing has a
gradient. Pages: ``docs/balance.md``.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute._tensors import cannot_look
from circuitroute._validate import as_flag, as_number, as_real, int_at_least
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.inference.temperature import as_temperature
from circuitroute.routing.bias.needed import needed_bias, quantile_bias
from circuitroute.routing.bias.solver import Part, System, approached, solve
from circuitroute.routing.bias.targets import Reach, as_target
from circuitroute.routing.control import (
    Routings,
    checked_state,
    checked_values,
    decided_rows,
    distributions_of,
    refuse_traces,
    routings_of,
    summed,
)
from circuitroute.routing.decision import Routing

KINDS = {1: "LossFree", 2: "Quantile", 3: "ExactBalance"}
TOLERANCE = 1e-10  # of mean marginals
STEPS = 100  # of Newton
FINEST = 1e11  # temperatures, among which float64 still tells ties apart


class BalanceState(NamedTuple):
    """What a rule of balance knows, as plain tensors: ``state._asdict()`` goes into a checkpoint, and
    ``BalanceState(**values)`` comes back.

    Attributes:
        bias: [E] float32 (or float64), for a router's ``bias=``.
        kind: [] int64, which rule it belongs to.
    """

    bias: Tensor
    kind: Tensor


class _Rule:
    """What the rules share: a number of experts, and states."""

    kind = 0

    def __init__(self, num_experts: int, target: object) -> None:
        self.num_experts = int_at_least("num_experts", num_experts, 1)
        self.target = as_target(target, self.num_experts)

    def init(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> BalanceState:
        """The state before the first step: no bias.

        Args:
            device: of its tensors.
            dtype: of the bias, float32 or float64.

        Raises:
            TypeError: another dtype.
        """
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype={dtype}: a bias is summed up over many steps; torch.float32 or torch.float64")
        bias = torch.zeros(self.num_experts, device=device, dtype=dtype)
        return BalanceState(bias, torch.tensor(self.kind, device=device))

    def _checked(self, state: BalanceState, routing: Routings) -> tuple[Tensor, tuple[Routing, ...]]:
        """The bias and the decisions, or an error before anything is done."""
        made_by = f"cr.balance.{type(self).__name__}"
        checked_state(state, BalanceState, made_by)
        why = f"the state is of a run with another number of experts than num_experts={self.num_experts}"
        bias = checked_values("state.bias", state.bias, (self.num_experts,), why)
        kind = as_real("state.kind", state.kind)
        if kind.dim() or kind.is_floating_point():
            raise TypeError(f"state.kind is {kind.dtype} of shape {tuple(kind.shape)}: expected what init() made")
        if not cannot_look(kind) and int(kind) != self.kind:
            other = KINDS.get(int(kind))
            of = "no rule" if other is None else f"cr.balance.{other}"
            raise ValueError(f"state.kind={int(kind)}: the state is of {of}, and this is {made_by}; start from init()")
        return bias, routings_of(routing, self.num_experts)

    def _next(self, state: BalanceState, bias: Tensor) -> BalanceState:
        return BalanceState(bias.detach().to(state.bias), state.kind)

    def _shown(self, *options: str) -> str:
        target = [] if self.target is None else [f"target={self.target.tolist()}"]
        return f"{type(self).__name__}({', '.join([str(self.num_experts), *target, *options])})"


class LossFree(_Rule):
    """Auxiliary-loss-free balancing (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3): bias += step * sign(mean load -
    load), load being how many tokens chose each expert.

    It looks at executed experts alone, so it works with every router that takes a bias, and needs as many steps as the
    bias is steps away.

    Args:
        num_experts: E.
        step: how far an entry moves, in units of logits; where they adapted it to sigmoid scores, 1e-3.
        target: [E], what part of the load each expert is to have, in any proportion to one another; None for equal
            parts.
        centre: whether to take the mean off the bias. Where the constraint fixes the count that changes nothing; a
            range router's count would drift along with the mean.

    Raises:
        TypeError, ValueError: arguments of other kinds, a step that is not positive, a target of 0 for all.
    """

    kind = 1

    def __init__(
        self,
        num_experts: int,
        step: float = 1e-3,
        *,
        target: Tensor | Sequence[float] | None = None,
        centre: bool = False,
    ) -> None:
        super().__init__(num_experts, target)
        self.step, self.centre = as_number("step", step), as_flag("centre", centre)
        if not 0 < self.step < float("inf"):
            raise ValueError(f"step={self.step}: must be positive and finite")
        if self.target is not None and not bool(self.target.sum() > 0):
            raise ValueError("target is 0 for all experts: some of them have to take the load")

    @torch.no_grad()
    def update(self, state: BalanceState, routing: Routings, group: dist.ProcessGroup | None = None) -> BalanceState:
        """The state for the next step.

        Args:
            state: from :meth:`init` or the step before.
            routing: T decisions, made with ``bias=state.bias``; or several, of micro-batches. Tokens without a decision
                (NaN) have no load, and a step without any load moves nothing.
            group: processes whose loads are added up, all of which must call this; they get the same bias.

        Raises:
            TypeError, ValueError: a state of another rule or number of experts, of another dtype, or not finite; a
                routing of another number of experts.
        """
        bias, routings = self._checked(state, routing)
        load = torch.stack([each.mask.sum(0).to(bias.device) for each in routings]).sum(0)
        load = summed(load, group).double()
        wanted = torch.full_like(load, 1 / self.num_experts)
        if self.target is not None:
            wanted = self.target.to(load) / self.target.sum()
        # A load that is met is met but for the rounding of a target in float32.
        less = wanted * load.sum() - load
        direction = torch.where(less.abs() > 1e-7 * load.sum(), less.sign(), 0.0)
        moved = bias.double() + self.step * direction
        return self._next(state, moved - moved.mean() if self.centre else moved)

    def __repr__(self) -> str:
        return self._shown(f"step={self.step}", f"centre={self.centre}")


class Quantile(_Rule):
    """Quantile balancing (Su 2026, kexue.fm/archives/11619; Megatron-LM's ``quantile_balancing``; Kimi K3): the bias at
    which a share of the tokens chooses each expert, by this step's thresholds.

    A token's *needed bias* for an expert is the one at which it would just choose it, all else as it is; for exactly k,
    the (k + 1)-th largest biased logit minus the expert's own logit. An expert's new bias lies midway between the n-th
    and the (n + 1)-th smallest needed bias of all tokens, n = T times its target: so n tokens reach it. Exact order
    statistics, over processes too. This is one round of coordinate descent on the dual of the most probable decisions
    with prescribed loads, and it is the *mode* that it balances, whatever was sampled. For other constraints than a
    count see :mod:`circuitroute.routing.bias.needed`.

    Args:
        num_experts: E.
        target: [E], the fraction of the tokens that is to choose each expert; None for equal parts of what is chosen.
        rate: how much of the way to go, in 0..1; 1 keeps nothing of the bias before.
        centre: whether to take the mean off the bias; None does where the constraint fixes the count.

    Raises:
        TypeError, ValueError: arguments of other kinds, a rate outside of (0, 1].
    """

    kind = 2

    def __init__(
        self,
        num_experts: int,
        target: Tensor | Sequence[float] | None = None,
        *,
        rate: float = 1.0,
        centre: bool | None = None,
    ) -> None:
        super().__init__(num_experts, target)
        self.rate = _as_rate(rate)
        self.centre = None if centre is None else as_flag("centre", centre)

    @torch.no_grad()
    def update(self, state: BalanceState, routing: Routings, group: dist.ProcessGroup | None = None) -> BalanceState:
        """The state for the next step; arguments and errors as of :meth:`LossFree.update`, and further

        Raises:
            TypeError: a soft routing, which has no distribution.
            ValueError: a target that more tokens are forced to, or fewer are allowed to, than it says.
            NotImplementedError: in a traced program.
        """
        bias, routings = self._checked(state, routing)
        _one_rule(routings, f"cr.balance.{type(self).__name__}")
        needed = [needed_bias(each.untempered, bias, decided_rows(each)) for each in routings]
        circuit = routings[0].untempered.circuit
        chosen = torch.stack([load for _, load in needed]).sum()
        found = quantile_bias(torch.cat([rows for rows, _ in needed]), chosen, self.target, bias, group)
        moved = bias.double() + self.rate * (found - bias.double())
        fixed = circuit.min_count == circuit.max_count
        return self._next(state, moved - moved.mean() if (fixed if self.centre is None else self.centre) else moved)

    def __repr__(self) -> str:
        return self._shown(f"rate={self.rate}", f"centre={self.centre}")


class ExactBalance(_Rule):
    """The bias at which the mean exact marginals of a step's tokens are the target; see :func:`bias_for`.

    Args:
        num_experts: E.
        target: [E], the fraction of the tokens that is to choose each expert; None for the constraint's own balance.
        rate: how much of the way to go, in 0..1: the next batch is another one, and less than 1 averages over batches.
        steps: of Newton, at most, for each update; None for all that it takes. From the bias before, one or two do.
        temperature: of the distribution to balance; None for that of the decision. Colder is nearer to the mode.

    Raises:
        TypeError, ValueError: arguments of other kinds, a rate outside of (0, 1], less than one step.
    """

    kind = 3

    def __init__(
        self,
        num_experts: int,
        target: Tensor | Sequence[float] | None = None,
        *,
        rate: float = 1.0,
        steps: int | None = None,
        temperature: float | None = None,
    ) -> None:
        super().__init__(num_experts, target)
        self.rate = _as_rate(rate)
        self.steps = None if steps is None else int_at_least("steps", steps, 1)
        self.temperature = None if temperature is None else as_number("temperature", as_temperature(temperature))

    @torch.no_grad()
    def update(self, state: BalanceState, routing: Routings, group: dist.ProcessGroup | None = None) -> BalanceState:
        """The state for the next step; arguments and errors as of :meth:`LossFree.update`, and further

        Raises:
            TypeError: a soft routing, which has no distribution.
            ValueError: a target that no bias reaches, with what is wrong with it.
            NotImplementedError: in a traced program.
        """
        bias, routings = self._checked(state, routing)
        _one_rule(routings, f"cr.balance.{type(self).__name__}")
        parts = [_part_of(each, bias, self.temperature) for each in routings]
        found = _solved(parts, self.target, bias, group, self.steps)
        return self._next(
            state, bias.double() if found is None else bias.double() + self.rate * (found - bias.double())
        )

    def __repr__(self) -> str:
        return self._shown(f"rate={self.rate}", f"steps={self.steps}", f"temperature={self.temperature}")


@torch.no_grad()
def bias_for(
    distribution: SubsetDistribution,
    target: Tensor | Sequence[float] | None = None,
    *,
    temperature: float | Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The bias b at which the mean over the batch of the exact marginals of (logits + b) / temperature is the target.

    By Newton with the exact second derivative, to 1e-10, in float64 (:mod:`circuitroute.routing.bias.solver`). Where
    the constraint leaves b undetermined, as by a constant for exactly k experts, or one for every group that always
    has as many, it is the one of smallest norm.

    Args:
        distribution: that of the logits, such as ``circuit(logits)``, over E experts; NaN rows count for nothing.
        target: [E], the fraction of the tokens that is to choose each expert; None for the constraint's own balance:
            what they would be if all logits were equal, at the mean count of the batch. That is k / E for exactly k.
        temperature: as in :func:`circuitroute.route`.
        group: processes whose tokens count together, all of which must call this; they get the same bias.

    Returns:
        [E], in the dtype of the logits; no gradient.

    Raises:
        TypeError: anything but a distribution.
        ValueError: no tokens; or a target that no bias reaches: one whose sum, or entries, or sums over groups, the
            constraint and the infinite logits do not have on average, or only in the limit of an infinite bias.
        NotImplementedError: in a traced program.
    """
    if not isinstance(distribution, SubsetDistribution):
        raise TypeError(f"distribution is a {type(distribution).__name__}: expected one, such as circuit(logits)")
    refuse_traces("cr.balance.bias_for", distribution.logits)
    flat = distribution.logits.detach().reshape(-1, distribution.circuit.n)
    given = as_temperature(temperature)
    if isinstance(given, Tensor):
        given = given.detach().expand(distribution.batch_shape).reshape(-1)
    keep = ~distribution.inference().log_partition.detach().isnan()
    part = _part(distribution, keep, torch.zeros_like(flat[0] if len(flat) else flat.new_zeros(flat.shape[-1])), given)
    found = _solved([part], as_target(target, distribution.circuit.n), part.base.new_zeros(flat.shape[-1]), group, None)
    if found is None:
        raise ValueError(
            f"distribution has a batch of {tuple(distribution.batch_shape)}: there are no tokens to balance"
        )
    return found.to(distribution.logits)


def _as_rate(rate: object) -> float:
    number = as_number("rate", rate)
    if not 0 < number <= 1:
        raise ValueError(f"rate={number}: must lie in (0, 1]")
    return number


def _one_rule(routings: Sequence[Routing], who: str) -> None:
    """Raises where decisions have no distribution, values cannot be looked at, or constraints differ."""
    distributions_of(routings, who)
    refuse_traces(f"{who}.update", *(each.untempered.logits for each in routings))
    rules = {each.untempered.circuit.constraint for each in routings}
    if len(rules) > 1:
        raise ValueError(
            f"routing holds decisions by different constraints, {' and '.join(map(repr, rules))}: a bias is of one "
            "layer; keep a state for each"
        )


def _part_of(routing: Routing, bias: Tensor, temperature: float | None) -> Part:
    given = routing.temperature if temperature is None else temperature
    return _part(routing.untempered, decided_rows(routing), bias, given)


def _part(distribution: SubsetDistribution, keep: Tensor, bias: Tensor, temperature: float | Tensor) -> Part:
    """The rows to keep, the bias that they were decided with taken off."""
    flat = distribution.logits.detach().reshape(-1, distribution.circuit.n).double()
    base = (flat - bias.to(flat))[keep]
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().double().to(flat.device).expand(len(flat))[keep][:, None]
    potential = distribution.count_potential
    if potential is not None:
        potential = potential.detach().double()
        potential = potential if potential.dim() == 1 else potential.reshape(-1, potential.shape[-1])[keep]
    return Part(distribution.circuit, base, temperature, potential)


def _solved(
    parts: Sequence[Part], target: Tensor | None, start: Tensor, group: dist.ProcessGroup | None, steps: int | None
) -> Tensor | None:
    """[E] float64, the bias; None where no process has a token.

    Raises:
        ValueError: there is none; with a number of ``steps``, only where that is certain.
    """
    device = parts[0].base.device
    system = System(parts, len(start), group, device)
    if not system.tokens:
        return None
    reach = Reach.of(parts, system.tokens, group, device)
    bias = start.to(device, torch.float64)
    mean = system.mean(bias)
    wanted = reach.law(float(mean.sum())) if target is None else target.to(device)
    wanted = reach.agreed(wanted, mean)
    coldest, warmest, spread = _scales(parts, group, device)
    if spread > FINEST * coldest:
        raise ValueError(
            f"the logits differ by {spread / coldest:.3g} temperatures, and float64 cannot hold a bias to a "
            "temperature beside that; raise the temperature, or limit the logits"
        )
    if steps is None:
        bias = approached(system, wanted, bias, reach.fixed, warmest=warmest, coldest=coldest, spread=spread)
    found = solve(
        system,
        wanted,
        bias,
        reach.fixed,
        warmth=coldest,
        span=spread + 50 * warmest,
        tolerance=TOLERANCE,
        steps=STEPS if steps is None else steps,
        impossible=lambda b: reach.proof(wanted, b),
    )
    if not found.settled and (steps is None or reach.proof(wanted, found.bias)):
        raise reach.unreached(wanted, found)
    return found.bias


def _scales(parts: Sequence[Part], group: dist.ProcessGroup | None, device: torch.device) -> tuple[float, float, float]:
    """The lowest and the highest temperature, and the largest difference of two logits."""
    low, high, cold, warm = [], [], [], []
    for part in parts:
        finite = part.base[part.base.isfinite()]
        if finite.numel():
            low.append(float(finite.min()))
            high.append(float(finite.max()))
        t = part.temperature
        if not isinstance(t, Tensor) or t.numel():
            cold.append(float(t.min()) if isinstance(t, Tensor) else t)
            warm.append(float(t.max()) if isinstance(t, Tensor) else t)
    inf = float("inf")
    bounds = [-min(low, default=inf), max(high, default=-inf), -min(cold, default=inf), max(warm, default=-inf)]
    found = torch.tensor(bounds, dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    most, least, coldest, warmest = float(found[1]), -float(found[0]), -float(found[2]), float(found[3])
    return coldest, warmest, max(most - least, 0.0)
