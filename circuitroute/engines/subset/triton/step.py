"""A routing step on the device: which kernels, with which arguments. See :mod:`circuitroute.engines.step`.

Legend: T tokens, N experts, K the largest allowed count, J = K + 1, S = max(1, K) slots.

A step is one kernel of :mod:`.routing_step` over all rows, then two over the rows that it lists: the sweep in float64
of :mod:`.memory`, and the weights anew. The way back is one, and one over the rows that underflowed. The host never
waits for the device.

Rows that do not fit into lanes have no step here: they are composed of an inference and torch's own operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuitroute.engines.step import Inputs, Rule, Slopes, Step, Upstream
from circuitroute.engines.subset.triton import engine
from circuitroute.engines.subset.triton.engine import Swept, lane_shape, lanes_fit, row_shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tempered(NamedTuple):
    """The rows of a step; the first fields are those of :class:`~.engine.Rows`.

    ``logits`` are those that are decided on, divided by the temperature, which is ``temperature_stride`` apart;
    ``theta`` those of the weights, None where they are the same; ``below`` the largest word of a sampled token's
    uniform, as a signed one.
    """

    logits: Tensor
    potential: Tensor
    key: Tensor | None
    potential_stride: int
    tokens: int
    temperature: Tensor | None
    temperature_stride: int
    theta: Tensor | None
    below: int


class Decided(NamedTuple):
    """What a step finds beyond a sweep."""

    weights: Tensor
    indices: Tensor
    invalid: Tensor
    log_prob: Tensor | None


class Into(NamedTuple):
    """Where gradients go: by theta, by the choice (None: both into ``logits``), by the potential; and u on the way."""

    logits: Tensor
    choice: Tensor | None
    count_probs: Tensor
    u: Tensor


class Again(NamedTuple):
    """The same for :func:`.memory.backward`; the first fields are those of :class:`~.engine.Slopes`.

    The next are what reaches the decision's logits past the second derivative, and ``choice`` says whether their
    gradient stands alone.
    """

    u: Tensor
    v: Tensor | None
    marginals: Tensor
    count_probs: Tensor
    log_partition: Tensor | None
    log_prob: Tensor | None
    mask: Tensor
    choice: Tensor | None


@dataclass(frozen=True)
class TritonStep(Step):
    """A step with its list, see :class:`~.engine.Sweep`, and with the marginals where the weights are made of them."""

    marginals: Tensor | None = None
    todo: Tensor | None = None
    length: Tensor | None = None


def takes(inputs: Inputs) -> bool:
    """Whether rows fit into lanes, in dtypes that are read as they are."""
    J, temperature = inputs.potential.shape[-1], inputs.temperature
    tensors = [inputs.logits, inputs.choice, *([temperature] if isinstance(temperature, Tensor) else [])]
    fits = lanes_fit(inputs.logits.shape[1], J - 1) and all(x.dtype in DTYPES for x in tensors)
    return fits and inputs.potential.dtype == torch.float32 and (inputs.logits.is_cuda or engine.interpreter_runs())


@torch.no_grad()
def step(inputs: Inputs, rule: Rule, moments: bool) -> Step:
    """See :class:`circuitroute.engines.step.Stepper`."""
    from circuitroute.engines.subset.triton import memory, routing_step

    sampled, below = _sampled(rule.share)
    if sampled != "none" and inputs.key is None:
        raise ValueError(f"share={rule.share}: sampled tokens need keys, and key is None")
    moments = moments or sampled != "none" or rule.combine == "marginal"
    problem = _problem(inputs)
    T, N, J = problem.shape
    rows = _rows(problem, inputs, below)
    swept, decided = _room(problem, moments, rule.combine == "marginal")
    how = {"COMBINE": rule.combine, "SAMPLED": sampled}
    _in_lanes(problem, routing_step.step_forward, (rows, swept, decided), {**how, "MOMENTS": moments})
    if moments and T > 0:
        drawn = swept if sampled != "none" else swept._replace(mask=None)
        problem._launch_rows(memory.forward, (rows, drawn), dual=False, log=True)
        shape = {name: size for name, size in row_shape(N, J).items() if name != "SIZE"}
        problem._run(routing_step.settle, min(T, engine.LIST_PROGRAMS), (rows, swept, decided), {**shape, **how})
    return TritonStep(**{**swept._asdict(), **decided._asdict()})


@torch.no_grad()
def step_marginals(inputs: Inputs, found: Step, out_TN: Tensor) -> None:
    """See :class:`circuitroute.engines.step.Stepper`."""
    from circuitroute.engines.subset.triton import memory, routing_step

    known = _known(found)
    if known.marginals is not None:
        out_TN.copy_(known.marginals)
        return
    problem = _problem(inputs)
    rows, swept = _rows(problem, inputs, 0), _swept(known)._replace(marginals=out_TN, mask=None)
    _in_lanes(problem, routing_step.marginals, (rows, swept, known.invalid), {})
    if len(inputs.logits) > 0:
        problem._launch_rows(memory.forward, (rows, swept), dual=False, log=True)


@torch.no_grad()
def step_gradient(inputs: Inputs, rule: Rule, found: Step, upstream: Upstream) -> Slopes:
    """See :class:`circuitroute.engines.step.Stepper`."""
    from circuitroute.engines.subset.triton import memory, routing_step

    known, problem = _known(found), _problem(inputs)
    T, N, J = problem.shape
    new = problem._new(torch.float32)
    rows, swept = _rows(problem, inputs, 0), _swept(known)
    decided = Decided(known.weights, known.indices, known.invalid, known.log_prob)
    given = Upstream(*(None if x is None else x.contiguous() for x in upstream))
    apart = inputs.choice is not inputs.logits
    into = Into(
        torch.empty_like(problem.logits, dtype=inputs.logits.dtype),
        torch.empty_like(problem.logits) if apart else None,
        new(T, J),
        new(T, N),
    )
    sweeps = _sweeps(rule, given)
    how = {"COMBINE": rule.combine, "SIMPLE": rule.simple, "SWEEPS": sweeps}
    _in_lanes(problem, routing_step.step_backward, (rows, swept, decided, given, into), how, dual=True)
    if sweeps and T > 0:
        to = into.logits if into.choice is None else into.choice
        past = (given.log_partition, given.log_prob, found.mask)
        again = Again(into.u, given.count_probs, to, into.count_probs, *past, into.choice)
        problem._launch_rows(memory.backward, (rows, swept, again), dual=True, log=True)
    return Slopes(into.logits, into.choice, into.count_probs)


def _sampled(share: float) -> tuple[str, int]:
    """Who is sampled, and the largest word, as a signed one, whose uniform, (word + 1/2) / 2^32, is below the share."""
    below = math.ceil(Fraction(share) * 2**32 - Fraction(1, 2)) - 1
    if below < 0:
        return "none", 0
    return ("all", 0) if below >= 2**32 - 1 else ("some", below - 2**31)


def _sweeps(rule: Rule, upstream: Upstream) -> bool:
    """Whether anything reaches the logits of the decision."""
    gates = upstream.weights is not None or upstream.gates is not None
    moments = (upstream.marginals, upstream.log_partition, upstream.log_prob, upstream.count_probs)
    return (gates and (rule.simple or rule.combine == "marginal")) or any(x is not None for x in moments)


def _problem(inputs: Inputs) -> engine._Problem:
    return engine._Problem.of(inputs.choice, inputs.potential)


def _rows(problem: engine._Problem, inputs: Inputs, below: int) -> Tempered:
    given, temperature = inputs.temperature, None
    if isinstance(given, Tensor):
        temperature = given.contiguous()
    elif given != 1.0:
        temperature = torch.full((1,), given, dtype=torch.float32, device=problem.logits.device)
    theta = None if inputs.choice is inputs.logits else inputs.logits.contiguous()
    stride = 1 if isinstance(given, Tensor) else 0
    return Tempered(*problem.rows(inputs.key)[:5], temperature, stride, theta, below)


def _room(problem: engine._Problem, moments: bool, marginals: bool) -> tuple[Swept, Decided]:
    """Memory for the outcome."""
    T, N, J = problem.shape
    new, S = problem._new(torch.float32), max(1, J - 1)
    if moments:
        swept = problem.room(with_moments=True, with_sample=True)
        swept = swept if marginals else swept._replace(marginals=None)
    else:
        nothing: dict[str, Any] = dict.fromkeys(Swept._fields)
        swept = Swept(**{**nothing, "mask": problem._new(torch.bool)(T, N)})
    decided = Decided(
        new(T, S), problem._new(torch.int64)(T, S), problem._new(torch.bool)(T), new(T) if moments else None
    )
    return swept, decided


def _known(found: Step) -> TritonStep:
    if not isinstance(found, TritonStep) or found.shift is None:
        raise ValueError("step: only a step with moments, of this engine, has marginals and gradients")
    return found


def _swept(found: TritonStep) -> Swept:
    return Swept(*(getattr(found, name) for name in Swept._fields))


def _in_lanes(
    problem: engine._Problem, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], dual: bool = False
) -> None:
    T, N, J = problem.shape
    if T > 0:
        shape = lane_shape(N, J, dual)
        problem._run(kernel, -(-T // shape["BT"]), arguments, {**shape, **constants})
