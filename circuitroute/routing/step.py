"""Decisions on an engine's fused step: one node of autograd for all that is read of them.

Legend: T tokens, E experts, K the largest allowed count, J = K + 1, S slots of a padded projection.

What is asked of a decision is not known when it is made: a training step reads gates, perhaps the marginals for a
balance loss, perhaps a log-probability. So :class:`Steps` is one function of the logits with all of these as results,
and the way back is one sweep for whatever gradients arrive. The results [T, E] are room that is filled when it is read.

The same composed of its parts stands in :mod:`circuitroute.routing.composed`; gradients of gradients go through that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from circuitroute._tensors import batchable, cannot_look, traced, transformed, without_autocast
from circuitroute._validate import present
from circuitroute.circuit import Compiled
from circuitroute.engines import Inference, engine_of
from circuitroute.engines.step import Inputs, Rule, Slopes, Step, Stepper, Upstream
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.routing import traced as operator
from circuitroute.routing.choice import Batch, replayed
from circuitroute.routing.composed import Results, by_input, gradients
from circuitroute.routing.decision import Pad, Routing
from circuitroute.routing.deferred import watch
from circuitroute.routing.estimators import Estimator, NoEstimator, Score, Simple, as_estimator
from circuitroute.routing.records import RoutingRecord
from circuitroute.routing.weights import Combine

# The estimators that a step knows, and whether their gradient crosses the decision.
_CROSSES = {Simple: True, Score: False, NoEstimator: False}


@dataclass(frozen=True, eq=False)
class Taken:
    """A step that was taken: who took it, of what, and what came out.

    Attributes:
        given: the inputs as functions of what the caller gave.
        inputs: the same as the engine got them, without gradients.
    """

    engine: Stepper
    circuit: Compiled
    given: Inputs
    inputs: Inputs
    rule: Rule
    step: Step

    @cached_property
    def room(self) -> tuple[Tensor, Tensor]:
        """Memory for gates and marginals, [T, E]."""
        like, shape = self.step.weights, self.step.mask.shape
        return like.new_empty(shape), like.new_empty(0 if self.step.shift is None else shape)

    @cached_property
    def gates(self) -> Tensor:
        """[T, E] the weights, scattered; NaN in invalid rows."""
        gates, step = self.room[0], self.step
        gates.zero_().scatter_(-1, step.indices, step.weights)
        if cannot_look(step.invalid) or bool(step.invalid.any()):
            gates.masked_fill_(step.invalid[:, None], math.nan)
        return gates

    @cached_property
    def marginals(self) -> Tensor:
        """[T, E]."""
        marginals = self.room[1]
        self.engine.step_marginals(self.inputs, self.step, marginals)
        return marginals

    def gradient(self, upstream: Upstream) -> Slopes:
        """The way back."""
        return self.engine.step_gradient(self.inputs, self.rule, self.step, upstream)


def routing(
    batch: Batch,
    share: float,
    replay: Tensor | RoutingRecord | None,
    *,
    combine: Combine,
    estimator: str | Estimator,
) -> Routing | None:
    """The decision with its weights, in one step; None where there is none for this engine, estimator or shape."""
    untempered, crosses = batch.untempered, _CROSSES.get(type(as_estimator(estimator)))
    if crosses is None or untempered.circuit.counts is None or transformed():
        return None
    choice, potential = untempered.rows.given()
    theta = choice if batch.logits is untempered.logits else batch.logits
    given = Inputs(theta, choice, _temperatures(batch.temperature, theta), potential, None)
    rule = Rule(combine, share, crosses)
    if traced(*(x for x in given if isinstance(x, Tensor))):
        found = None if replay is not None else _traced(batch, given, rule)
    else:
        found = _found(batch, given, rule, replay)
    return None if found is None else StepRouting(found, untempered, batch.logits, batch.temperature)


def _found(batch: Batch, given: Inputs, rule: Rule, replay: Tensor | RoutingRecord | None) -> Found | None:
    untempered = batch.untempered
    engine = engine_of(untempered.circuit, given.logits.device)
    if not isinstance(engine, Stepper):
        return None
    with torch.no_grad(), without_autocast(given.logits):
        if replay is not None:
            # What is recorded is checked by looking at it, and so the rest may be looked at, too.
            if batch.unchecked:
                untempered.check()
            given = given._replace(mask=replayed(batch, replay, untempered.invalid_rows()))
        inputs = _detached(given)
        if not engine.steps(inputs):
            return None
        if rule.share > 0 and replay is None:
            inputs = inputs._replace(key=untempered.keys(batch.key))
    moments = rule.share > 0 or replay is not None or rule.combine == "marginal" or (rule.simple and _needs_grad(given))
    with torch.no_grad(), without_autocast(given.logits):
        step = engine.step(inputs, rule, moments)
        if batch.unchecked:
            watch(step.invalid, f"{untempered.circuit.constraint!r} over {untempered.circuit.n} experts")
    return Found(Taken(engine, untempered.circuit, given, inputs, rule, step))


def _traced(batch: Batch, given: Inputs, rule: Rule) -> Found:
    keys = batch.untempered.keys(batch.key) if rule.share > 0 else None
    results, step = operator.step(batch.untempered.circuit, given._replace(key=keys), rule)
    return TracedFound(step, results)


def _temperatures(temperature: float | Tensor, logits: Tensor) -> float | Tensor:
    """A number, or a tensor [T]."""
    if not isinstance(temperature, Tensor):
        return temperature
    return temperature.to(logits).expand(logits.shape[0])


def _detached(given: Inputs) -> Inputs:
    logits = given.logits.detach().contiguous()
    by_temperature = isinstance(given.temperature, Tensor) and given.temperature.requires_grad
    # A gradient by temperature is made of that by the choice, which then must come apart from that by the weights.
    one = given.choice is given.logits and not by_temperature
    choice = logits if one else given.choice.detach().contiguous()
    temperature = given.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().contiguous()
    return Inputs(logits, choice, temperature, given.potential.detach().contiguous(), None, given.mask)


def _needs_grad(given: Inputs) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)


# ---------------------------------------------------------------------------------------------- with gradients


class Steps(torch.autograd.Function):
    """(logits, choice, temperature, potential) -> :class:`Results`, of a step that was taken already."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        choice: Tensor | None,
        temperature: Tensor | None,
        potential: Tensor,
        taken: Taken,
        room: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, ...]:
        """``choice`` is None where it is the logits; ``room``, for gates and marginals, is filled later."""
        # Inputs are kept by the context and not by save_for_backward, so that results can be differentiated one by
        # one: they share this node, and saved tensors are gone after its first way back.
        ctx.taken = taken
        ctx.set_materialize_grads(False)
        step = taken.step
        moments = (step.log_partition, step.log_prob, step.count_probs)
        return tuple(_alias(x, logits) for x in (step.weights, *room, *moments))

    @staticmethod
    @batchable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        taken, wanted = ctx.taken, ctx.needs_input_grad[:4]
        again = torch.is_grad_enabled()
        if again or transformed():
            given = (taken.circuit, taken.given, taken.rule, taken.step, Upstream(*upstream))
            return (*gradients(*given, create_graph=again), None, None)
        slopes = taken.gradient(Upstream(*upstream))
        *found, by_potential = by_input(slopes, taken.inputs, one=taken.given.choice is taken.given.logits)
        if wanted[3] and taken.given.potential.dim() == 1:
            by_potential = by_potential.sum(0)
        found = [*found, by_potential]
        return (*(x if want else None for x, want in zip(found, wanted, strict=True)), None, None)


def _alias(found: Tensor | None, like: Tensor) -> Tensor:
    """The same memory as a tensor of its own; of what was not asked for there is nothing."""
    return like.new_empty(0) if found is None else found.detach()


def _attached(taken: Taken) -> Results:
    logits, choice, temperature, potential, *_ = taken.given
    inputs = (
        logits,
        None if choice is logits else choice,
        temperature if isinstance(temperature, Tensor) else None,
        potential,
    )
    return Results(*Steps.apply(*inputs, taken, taken.room))  # type: ignore[no-untyped-call]


class Found:
    """What a step found, as values and, if gradients were recorded when it was taken, as functions of its inputs.

    A distribution keeps this as what is known of it, so this knows no distribution: a circle would outlive its use.
    """

    def __init__(self, taken: Taken) -> None:
        self.taken, self.step = taken, taken.step
        self.results = _attached(taken) if _needs_grad(taken.given) else None

    @property
    def recorded(self) -> Results | None:
        """The functions, if gradients are recorded now."""
        return self.results if torch.is_grad_enabled() else None

    def values(self) -> Inference:
        """See :class:`circuitroute.inference.distribution.Known`."""
        return inference(self.step, self.step, self._marginals())

    def functions(self) -> Inference | None:
        """See :class:`circuitroute.inference.distribution.Known`."""
        if self.recorded is None:
            return None
        self._marginals()  # fills what is returned
        return inference(self.step, self.recorded, self.recorded.marginals)

    def log_prob(self, mask: Tensor) -> Tensor | None:
        """See :class:`circuitroute.inference.distribution.Known`."""
        if mask is not self.step.mask:
            return None
        return self.step.log_prob if self.recorded is None else self.recorded.log_prob

    def gates(self) -> Tensor:
        """[T, E]."""
        with torch.no_grad():
            gates = self.taken.gates
        return gates if self.recorded is None else self.recorded.gates

    def _marginals(self) -> Tensor:
        with torch.no_grad():
            return self.taken.marginals


class TracedFound(Found):
    """The same in a traced program, where all is made at once."""

    def __init__(self, step: Step, results: Results) -> None:
        self.step, self.results = step, results
        self._made = results

    def values(self) -> Inference:
        """See :class:`circuitroute.inference.distribution.Known`."""
        return inference(self.step, self._made, self._made.marginals)

    def functions(self) -> Inference:
        """See :class:`circuitroute.inference.distribution.Known`."""
        return self.values()

    def log_prob(self, mask: Tensor) -> Tensor | None:
        """See :class:`circuitroute.inference.distribution.Known`."""
        return self._made.log_prob if mask is self.step.mask else None

    def gates(self) -> Tensor:
        """[T, E]."""
        return self._made.gates


def inference(step: Step, found: Step | Results, marginals: Tensor) -> Inference:
    """What a sweep would find."""
    why = "a step with moments knows its distribution"
    log_partition = present(found.log_partition, why)
    shift, log_root = present(step.shift, why), present(step.log_root, why)
    return Inference(log_partition, marginals, found.count_probs, shift, log_root, step.mask, step.fallback)


# ---------------------------------------------------------------------------------------------- the decision


class StepRouting(Routing):
    """A :class:`Routing` whose numbers come from one step, and are made when they are read."""

    def __init__(
        self, found: Found, untempered: SubsetDistribution, logits: Tensor, temperature: float | Tensor
    ) -> None:
        self.mask = found.step.mask
        self.temperature = temperature
        self._untempered, self._logits = untempered, logits
        self._found = found
        self._tempered: SubsetDistribution | None = None

    @property
    def distribution(self) -> SubsetDistribution:
        """See :class:`Routing`."""
        # Made when it is read. No cached_property: torch.compile cannot trace that of Python 3.11, which has a lock.
        if self._tempered is None:
            self._tempered = self._untempered.tempered(self.temperature)
            if self._found.step.shift is not None:
                self._tempered.known = self._found
        return self._tempered

    @property
    def gates(self) -> Tensor:
        """See :class:`Routing`."""
        return self._found.gates()

    def padded(self, width: int | None = None, pad: Pad = "distinct") -> tuple[Tensor, Tensor]:
        """See :class:`Routing`."""
        step, slots = self._found.step, self._slots(width, pad)
        recorded = self._found.recorded
        weights, indices = step.weights if recorded is None else recorded.weights, step.indices
        if slots > weights.shape[-1]:
            return super().padded(width, pad)
        if pad != "distinct":
            used = torch.arange(weights.shape[-1], device=weights.device) < self.counts[:, None]
            indices = torch.where(used, indices, self.mask.shape[-1] if pad == "sentinel" else -1)
        return weights[:, :slots], indices[:, :slots]
