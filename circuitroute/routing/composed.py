"""A routing step composed of its parts: what any engine can do, differentiable to any order.

Legend: T tokens, E experts, S slots.

The plain form of what engines fuse, see :mod:`circuitroute.engines.step`, in terms of distributions, decisions and
weights. Gradients of gradients go through it, and in traced programs it is the step of engines that have none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuitroute.circuit import Compiled
from circuitroute.engines import combine, engine_of
from circuitroute.engines.step import Inputs, Rule, Slopes, Step, Upstream
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.routing.choice import Batch, decide
from circuitroute.routing.decision import Decision, chosen_first
from circuitroute.routing.weights import weigh


class Results(NamedTuple):
    """What a step finds, as functions of its inputs; the fields of :class:`~circuitroute.engines.step.Upstream`."""

    weights: Tensor
    gates: Tensor
    marginals: Tensor
    log_partition: Tensor
    log_prob: Tensor
    count_probs: Tensor


def results(circuit: Compiled, inputs: Inputs, rule: Rule, step: Step) -> Results:
    """Those of a decision that was taken, as functions of logits, choice, temperature and potential."""
    untempered = SubsetDistribution(circuit, inputs.choice, inputs.potential, validate_args=False)
    distribution = untempered.tempered(inputs.temperature)
    decision = Decision(distribution, step.mask, step.invalid, untempered, inputs.logits, inputs.temperature)
    gates = weigh(decision, combine=rule.combine, estimator="simple" if rule.simple else "none")
    weights = torch.where(step.mask.gather(-1, step.indices), gates.gather(-1, step.indices), 0.0)
    log_prob = distribution.log_prob(step.mask)
    return Results(
        weights, gates, distribution.marginals, distribution.log_partition, log_prob, distribution.count_probs
    )


def gradients(
    circuit: Compiled, inputs: Inputs, rule: Rule, step: Step, upstream: Upstream, *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of logits, choice, temperature and potential; None for what requires none.

    Args:
        inputs: of which those are found that require a gradient; a choice that is the logits has its part in theirs.
    """
    one = inputs.choice is inputs.logits
    temperature = inputs.temperature if isinstance(inputs.temperature, Tensor) else None
    candidates = (inputs.logits, None if one else inputs.choice, temperature, inputs.potential)
    leaves = [x for x in candidates if x is not None and x.requires_grad]
    with torch.enable_grad():
        found_again = results(circuit, inputs, rule, step)
    pairs = zip(found_again, upstream, strict=True)
    known = [(x, g.to(x.dtype)) for x, g in pairs if g is not None and x.requires_grad]
    if not known or not leaves:
        return (None,) * len(candidates)
    found = iter(
        torch.autograd.grad(
            [x for x, _ in known], leaves, [g for _, g in known], create_graph=create_graph, allow_unused=True
        )
    )
    return tuple(next(found) if x is not None and x.requires_grad else None for x in candidates)


def by_input(slopes: Slopes, inputs: Inputs, one: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The gradients of logits, choice, temperature and potential that slopes are; None for what is no tensor.

    Args:
        one: whether the choice is the logits, even where they were given as two.
    """
    by_logits, by_choice, by_potential = slopes
    by_temperature = None
    if by_choice is not None and isinstance(inputs.temperature, Tensor):
        # a / t moves by -a / t^2 along t, and its slope is t times that of a.
        moved = torch.where(torch.isinf(inputs.choice), 0.0, inputs.choice)
        by_temperature = -(by_choice * moved).sum(-1) / inputs.temperature
    if by_choice is not None and one:
        by_logits, by_choice = by_logits + by_choice, None
    return by_logits, by_choice, by_temperature, by_potential


class ComposedSteps:
    """The steps of a circuit on whatever engine it has; a :class:`~circuitroute.engines.step.Stepper`."""

    def __init__(self, circuit: Compiled) -> None:
        self.circuit = circuit

    def steps(self, inputs: Inputs) -> bool:
        """See :class:`~circuitroute.engines.step.Stepper`."""
        return True

    def step(self, inputs: Inputs, rule: Rule, moments: bool) -> Step:
        """See :class:`~circuitroute.engines.step.Stepper`; moments are found in any case."""
        untempered = self._distribution(inputs)
        batch = Batch(untempered, inputs.logits, inputs.temperature, inputs.key)
        decision = decide(batch, share=rule.share, replay=inputs.mask)
        gates = weigh(decision, combine=rule.combine, estimator="none")
        mask, distribution = decision.mask, decision.distribution
        indices = chosen_first(mask, inputs.logits, max(1, self.circuit.max_count))
        found = distribution.inference()
        return Step(
            weights=torch.where(mask.gather(-1, indices), gates.gather(-1, indices), 0.0),
            indices=indices,
            mask=mask,
            invalid=mask.new_zeros(len(mask)) if decision.invalid is None else decision.invalid,
            count_probs=distribution.count_probs,
            log_partition=found.log_partition,
            log_prob=distribution.log_prob(mask),
            shift=found.shift,
            log_root=found.log_root,
            fallback=mask.new_zeros(len(mask)) if found.fallback is None else found.fallback,
        )

    def step_marginals(self, inputs: Inputs, step: Step, out_TN: Tensor) -> None:
        """See :class:`~circuitroute.engines.step.Stepper`."""
        out_TN.copy_(self._distribution(inputs).tempered(inputs.temperature).marginals)

    def step_gradient(self, inputs: Inputs, rule: Rule, step: Step, upstream: Upstream) -> Slopes:
        """See :class:`~circuitroute.engines.step.Stepper`; the formulas are those of its module."""
        tempered = self._distribution(inputs).tempered(inputs.temperature)
        v, settings = combine.gates_gradient(step, upstream), (rule.combine, rule.simple)
        u, by_weights = combine.slopes(inputs.logits, step.mask, tempered.marginals, v, *settings)
        u = u if upstream.marginals is None else u + upstream.marginals
        moments = (upstream.log_partition, upstream.log_prob, u, upstream.count_probs)
        by_logits, by_potential = moments_gradient(tempered, step.mask, *moments)
        temperature = inputs.temperature
        by_choice = by_logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
        lost = step.invalid[:, None]
        by_weights, by_choice, by_potential = (x.masked_fill(lost, 0.0) for x in (by_weights, by_choice, by_potential))
        if inputs.choice is inputs.logits:
            return Slopes(by_weights + by_choice, None, by_potential)
        return Slopes(by_weights, by_choice, by_potential)

    def _distribution(self, inputs: Inputs) -> SubsetDistribution:
        return SubsetDistribution(self.circuit, inputs.choice, inputs.potential, validate_args=False)


# ---------------------------------------------------------------------------------------------- the way back, plainly


def moments_gradient(
    distribution: SubsetDistribution,
    mask: Tensor,
    w_T: Tensor | None,
    c_T: Tensor | None,
    u_TE: Tensor,
    v_TJ: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """([T, E], [T, J]) the gradients of logits and potential, of what reaches log Z, log p(z), marginals, posterior."""
    logits, potential = (x.detach() for x in distribution.rows.inputs() if x is not None)
    potential = potential.expand(len(logits), -1)
    zeros = u_TE.new_zeros(len(u_TE))
    score = zeros if c_T is None else c_T
    leaves = [logits.requires_grad_(), potential.requires_grad_()]
    engine = engine_of(distribution.circuit, logits.device)
    with torch.enable_grad():
        found = engine.attach(engine.infer(logits.detach(), potential.detach()), leaves[0], leaves[1])
        outputs = [found.log_partition, found.marginals, found.count_probs]
        upstream = [(zeros if w_T is None else w_T) - score, u_TE, v_TJ]
        pairs = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x is not None and g is not None]
        by_logits, by_potential = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs])
    by_logits = by_logits + torch.where(torch.isinf(logits), 0.0, score[:, None] * mask)
    chosen = mask.sum(-1, keepdim=True)
    return by_logits.detach(), by_potential.scatter_add(-1, chosen, score[:, None]).detach()
