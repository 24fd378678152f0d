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
from circuitroute.engines.step import Inputs, Rule, Slopes, Step, Upstream
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.routing.choice import Batch, decided
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
    pairs = zip(results(circuit, inputs, rule, step), upstream, strict=True)
    known = [(x, g.to(x.dtype)) for x, g in pairs if g is not None and x.requires_grad]
    if not known or not leaves:
        return (None,) * len(candidates)
    found = iter(
        torch.autograd.grad(
            [x for x, _ in known], leaves, [g for _, g in known], create_graph=create_graph, allow_unused=True
        )
    )
    return tuple(next(found) if x is not None and x.requires_grad else None for x in candidates)


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
        decision = decided(Batch(untempered, inputs.logits, inputs.temperature, inputs.key), share=rule.share)
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
        """See :class:`~circuitroute.engines.step.Stepper`."""
        with torch.enable_grad():
            logits = inputs.logits.detach().requires_grad_()
            choice = logits if inputs.choice is inputs.logits else inputs.choice.detach().requires_grad_()
            potential = inputs.potential.expand(len(logits), -1).detach().requires_grad_()
            leaves = inputs._replace(logits=logits, choice=choice, potential=potential)
            found = gradients(self.circuit, leaves, rule, step, upstream, create_graph=False)
        by_logits, by_choice, _, by_potential = found
        return Slopes(
            logits=torch.zeros_like(logits) if by_logits is None else by_logits,
            choice=None if choice is logits else torch.zeros_like(choice) if by_choice is None else by_choice,
            potential=torch.zeros_like(potential) if by_potential is None else by_potential,
        )

    def _distribution(self, inputs: Inputs) -> SubsetDistribution:
        return SubsetDistribution(self.circuit, inputs.choice, inputs.potential, validate_args=False)
