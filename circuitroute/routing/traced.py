"""A routing step as a torch operator, for programs that are traced: torch.compile, torch.export.

Legend: T tokens, E experts, S slots, J = K + 1 counts.

As :mod:`circuitroute.engines.ops` has it: tracing sees shapes only, a circuit goes by its handle, and there are first
gradients only. The operator takes the engine's fused step, or composes one. What is read of the decision later cannot
be known, so all is made.
"""

from typing import Any

import torch
from torch import Tensor

from circuitroute.circuit import Compiled
from circuitroute.circuit.compiled import of_handle
from circuitroute.engines import engine_of
from circuitroute.engines.ops import by_row, check_rows
from circuitroute.engines.step import Inputs, Rule, Step, Stepper, Upstream
from circuitroute.routing.composed import ComposedSteps, Results, by_input

# Weights, gates, marginals, log Z, log p(z), count posterior; then indices, mask, invalid, shift, log root, fallback.
# Annotations are not strings in this file: torch 2.6 makes an operator's schema of them.
Parts = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # fmt: skip


def step(circuit: Compiled, inputs: Inputs, rule: Rule) -> tuple[Results, Step]:
    """The step of a count constraint, differentiable once in all its inputs."""
    logits, choice, temperature, potential, key, _ = inputs
    number, tensor = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
    moved = None if choice is logits else choice
    parts = _step(logits, moved, tensor, potential, key, circuit.handle, number, *rule)
    return Results(*parts[:6]), _step_of(parts)


def _step_of(parts: Parts) -> Step:
    weights, _, _, log_partition, log_prob, counts, indices, mask, invalid, shift, log_root, fallback = parts
    return Step(weights, indices, mask, invalid, counts, log_partition, log_prob, shift, log_root, fallback)


def stepper(circuit: Compiled, inputs: Inputs) -> Stepper:
    """Who takes a step: the engine, or its parts."""
    engine = engine_of(circuit, inputs.logits.device)
    return engine if isinstance(engine, Stepper) and engine.steps(inputs) else ComposedSteps(circuit)


def _inputs(
    logits: Tensor, choice: Tensor | None, temperature: Tensor | None, potential: Tensor, number: float
) -> Inputs:
    """What a stepper is given; a gradient by the temperature wants the choice apart from the logits."""
    apart = logits.view_as(logits) if choice is None and temperature is not None else choice
    moved = logits if apart is None else apart.contiguous()
    times = number if temperature is None else temperature.contiguous()
    return Inputs(logits.contiguous(), moved, times, potential.contiguous(), None)


@torch.library.custom_op("circuitroute::step", mutates_args=())
def _step(
    logits: Tensor,
    choice: Tensor | None,
    temperature: Tensor | None,
    potential: Tensor,
    key: Tensor | None,
    circuit: str,
    number: float,
    combine: str,
    share: float,
    simple: bool,
) -> Parts:
    rule = Rule(combine, share, simple)  # type: ignore[arg-type]
    check_rows(logits, choice=choice, temperature=temperature, potential=by_row(potential), key=key)
    inputs = _inputs(logits, choice, temperature, potential, number)._replace(key=key)
    bad = None if logits.is_cuda else _nan_rows(inputs)
    inputs = inputs if bad is None else _without(inputs, bad)
    taker = stepper(of_handle(circuit), inputs)
    found = taker.step(inputs, rule, moments=True)
    marginals = torch.empty_like(logits)
    taker.step_marginals(inputs, found, marginals)
    return _spoiled(_parts(found, marginals), bad)


def _parts(found: Step, marginals: Tensor) -> Parts:
    gates = found.weights.new_zeros(found.mask.shape).scatter_(-1, found.indices, found.weights)
    gates.masked_fill_(found.invalid[:, None], torch.nan)
    moments = (found.log_partition, found.log_prob, found.count_probs)
    rest = (found.indices, found.mask, found.invalid, found.shift, found.log_root, found.fallback)
    made = (found.weights, gates, marginals, *moments, *rest)
    return tuple(x.contiguous() for x in made if x is not None)  # type: ignore[return-value]


def _nan_rows(inputs: Inputs) -> Tensor | None:
    """[T] bool, rows with NaN, which engines on the CPU are not given; None where there are none."""
    bad = (inputs.logits.isnan() | inputs.choice.isnan()).any(-1) | inputs.potential.isnan().any(-1)
    return bad if bool(bad.any()) else None


def _without(inputs: Inputs, bad: Tensor) -> Inputs:
    one = inputs.choice is inputs.logits
    logits = torch.where(bad[:, None], 0.0, inputs.logits)
    choice = logits if one else torch.where(bad[:, None], 0.0, inputs.choice)
    return inputs._replace(logits=logits, choice=choice, potential=inputs.potential.nan_to_num(0.0, None, -torch.inf))


def _spoiled(parts: Parts, bad: Tensor | None) -> Parts:
    """The results with those of bad rows marked as what they are."""
    if bad is None:
        return parts
    (weights, *numbers), (_, mask, invalid, *_) = parts[:6], parts[6:]
    weights[bad], mask[bad], invalid[bad] = 0.0, False, True
    for values in numbers:
        values[bad] = torch.nan
    return parts


@_step.register_fake
def _(
    logits: Tensor,
    choice: Tensor | None,
    temperature: Tensor | None,
    potential: Tensor,
    key: Tensor | None,
    circuit: str,
    number: float,
    combine: str,
    share: float,
    simple: bool,
) -> Parts:
    T, E = logits.shape
    J = potential.shape[-1]
    slots = max(1, J - 1)
    new, exact, flag = logits.new_empty, torch.float64, torch.bool
    return (
        new(T, slots),
        new(T, E),
        new(T, E),
        new(T),
        new(T),
        new(T, J),
        new(T, slots, dtype=torch.int64),
        new(T, E, dtype=flag),
        new(T, dtype=flag),
        new(T, dtype=exact),
        new(T, dtype=exact),
        new(T, dtype=flag),
    )


@torch.library.custom_op("circuitroute::step_backward", mutates_args=())
def _step_backward(
    logits: Tensor,
    choice: Tensor | None,
    temperature: Tensor | None,
    potential: Tensor,
    found: list[Tensor],
    upstream: list[Tensor],
    circuit: str,
    number: float,
    combine: str,
    share: float,
    simple: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of logits, choice, temperature and potential; empty for what is not there."""
    step = Step(*found)
    rule = Rule(combine, share, simple)  # type: ignore[arg-type]
    inputs = _inputs(logits, choice, temperature, potential, number)
    bad = None if logits.is_cuda else _nan_rows(inputs)
    if bad is not None:
        inputs = _without(inputs, bad)
        upstream = [torch.where(bad.reshape(-1, *[1] * (u.dim() - 1)), 0.0, u) for u in upstream]
    slopes = stepper(of_handle(circuit), inputs).step_gradient(inputs, rule, step, Upstream(*upstream))
    nothing = logits.new_empty(0)
    by_logits, *others, by_potential = by_input(slopes, inputs, one=choice is None)
    by_potential = by_potential.sum(0) if potential.dim() == 1 else by_potential
    by_choice, by_temperature = (nothing.clone() if x is None else x for x in others)
    return by_logits, by_choice, by_temperature, by_potential


@_step_backward.register_fake
def _(
    logits: Tensor, choice: Tensor | None, temperature: Tensor | None, potential: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = logits.new_empty(0)
    return (
        torch.empty_like(logits),
        nothing if choice is None else torch.empty_like(choice),
        torch.empty_like(nothing) if temperature is None else torch.empty_like(temperature),
        torch.empty_like(potential),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    logits, choice, temperature, potential, _, *settings = inputs
    (weights, _, _, log_partition, log_prob, counts), marks = output[:6], output[6:]
    ctx.mark_non_differentiable(*marks)
    ctx.save_for_backward(logits, choice, temperature, potential, weights, log_partition, log_prob, counts, *marks)
    ctx.settings = settings


def _gradients(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    logits, choice, temperature, potential, weights, log_partition, log_prob, counts, *marks = ctx.saved_tensors
    indices, mask, invalid, shift, log_root, fallback = marks
    found = [weights, indices, mask, invalid, counts, log_partition, log_prob, shift, log_root, fallback]
    given = (logits, choice, temperature, potential)
    by_input = _step_backward(*given, found, list(upstream[:6]), *ctx.settings)
    wanted = (None if x is None else gradient for x, gradient in zip(given, by_input, strict=True))
    return (*wanted, *[None] * 6)


_step.register_autograd(_gradients, setup_context=_remember)
