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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from circuitroute.engines.step import Inputs, Rule, Slopes, Step, Upstream
from circuitroute.engines.subset.triton.addresses import aligned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Problem(Protocol):
    """Rows laid out for the kernels, and their launches: the engine's."""

    @property
    def logits(self) -> Tensor:
        """[T, N], those that are decided on."""
        ...

    @property
    def potential(self) -> Tensor:
        """[J] or [T, J]."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, N, J)."""
        ...

    def room(self, with_moments: bool, with_sample: bool) -> Any:
        """Memory for a sweep."""
        ...

    def launch_lanes(
        self, kernel: Any, arguments: tuple[Any, ...], dual: bool = False, constants: dict[str, Any] | None = None
    ) -> None:
        """All rows, in lanes."""
        ...

    def launch_list(self, kernel: Any, arguments: tuple[Any, ...], dual: bool = False) -> None:
        """The listed rows, in float64, with scratch memory."""
        ...

    def launch_settling(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """The listed rows, one per program."""
        ...


class Swept(NamedTuple):
    """The fields of the engine's own."""

    log_partition: Tensor | None = None
    marginals: Tensor | None = None
    count_probs: Tensor | None = None
    shift: Tensor | None = None
    log_root: Tensor | None = None
    mask: Tensor | None = None
    fallback: Tensor | None = None
    todo: Tensor | None = None
    length: Tensor | None = None


class Tempered(NamedTuple):
    """The rows of a step; the first fields are those of :class:`~.engine.Rows`.

    ``logits`` are those that are decided on, divided by the temperature, one of each row;
    ``theta`` those of the weights, None where they are the same.
    """

    logits: Tensor
    potential: Tensor
    key: Tensor | None
    temperature: Tensor | None
    theta: Tensor | None


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


def readable(inputs: Inputs) -> bool:
    """Whether the kernels read these dtypes as they are."""
    temperature = inputs.temperature
    tensors = [inputs.logits, inputs.choice, *([temperature] if isinstance(temperature, Tensor) else [])]
    return all(x.dtype in DTYPES for x in tensors) and inputs.potential.dtype == torch.float32


@torch.no_grad()
def step(problem: Problem, inputs: Inputs, rule: Rule, moments: bool) -> Step:
    """See :class:`circuitroute.engines.step.Stepper`."""
    from circuitroute.engines.subset.triton import memory, routing_step

    sampled, below = _sampled(rule.share)
    if sampled != "none" and inputs.key is None:
        raise ValueError(f"share={rule.share}: sampled tokens need keys, and key is None")
    moments = moments or sampled != "none" or rule.combine == "marginal"
    rows = _rows(problem, inputs)
    swept, decided = _room(problem, moments, rule.combine == "marginal")
    how = {"COMBINE": rule.combine, "SAMPLED": sampled}
    problem.launch_lanes(
        routing_step.step_forward, (rows, swept, decided, below), constants={**how, "MOMENTS": moments}
    )
    if moments:
        drawn = swept if sampled != "none" else swept._replace(mask=None)
        problem.launch_list(memory.forward, (rows, drawn))
        problem.launch_settling(routing_step.settle, (rows, swept, decided, below), how)
    return TritonStep(**{**swept._asdict(), **decided._asdict()})


@torch.no_grad()
def step_marginals(problem: Problem, inputs: Inputs, found: Step, out_TN: Tensor) -> None:
    """See :class:`circuitroute.engines.step.Stepper`."""
    from circuitroute.engines.subset.triton import memory, routing_step

    known = _known(found)
    if known.marginals is not None:
        out_TN.copy_(known.marginals)
        return
    rows, swept = _rows(problem, inputs), _swept(known)._replace(marginals=out_TN, mask=None)
    problem.launch_lanes(routing_step.marginals, (rows, swept, known.invalid))
    problem.launch_list(memory.forward, (rows, swept))


@torch.no_grad()
def step_gradient(problem: Problem, inputs: Inputs, rule: Rule, found: Step, upstream: Upstream) -> Slopes:
    """See :class:`circuitroute.engines.step.Stepper`."""
    from circuitroute.engines.subset.triton import memory, routing_step

    known = _known(found)
    T, N, J = problem.shape
    rows, swept = _rows(problem, inputs), _swept(known)
    decided = Decided(known.weights, known.indices, known.invalid, known.log_prob)
    given = Upstream(*(None if x is None else aligned(x) for x in upstream))
    apart = inputs.choice is not inputs.logits
    into = Into(
        torch.empty_like(problem.logits, dtype=inputs.logits.dtype),
        torch.empty_like(problem.logits) if apart else None,
        known.weights.new_empty(T, J),
        known.weights.new_empty(T, N),
    )
    sweeps = _sweeps(rule, given)
    how = {"COMBINE": rule.combine, "SIMPLE": rule.simple, "SWEEPS": sweeps}
    problem.launch_lanes(routing_step.step_backward, (rows, swept, decided, given, into), dual=True, constants=how)
    if sweeps:
        to = into.logits if into.choice is None else into.choice
        past = (given.log_partition, given.log_prob, found.mask)
        again = Again(into.u, given.count_probs, to, into.count_probs, *past, into.choice)
        problem.launch_list(memory.backward, (rows, swept, again), dual=True)
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


def _rows(problem: Problem, inputs: Inputs) -> Tempered:
    given, temperature = inputs.temperature, None
    if isinstance(given, Tensor):
        temperature = aligned(given)
    elif given != 1.0:
        temperature = torch.full((len(problem.logits),), given, dtype=torch.float32, device=problem.logits.device)
    theta = None if inputs.choice is inputs.logits else aligned(inputs.logits)
    key = None if inputs.key is None else aligned(inputs.key)
    return Tempered(problem.logits, problem.potential, key, temperature, theta)


def _room(problem: Problem, moments: bool, marginals: bool) -> tuple[Swept, Decided]:
    """Memory for the outcome."""
    T, N, J = problem.shape
    device, shape = problem.logits.device, (T, max(1, J - 1))
    if moments:
        swept = Swept(**problem.room(with_moments=True, with_sample=True)._asdict())
        swept = swept if marginals else swept._replace(marginals=None)
    else:
        swept = Swept(mask=torch.empty(T, N, dtype=torch.bool, device=device))
    decided = Decided(
        weights=torch.empty(shape, dtype=torch.float32, device=device),
        indices=torch.empty(shape, dtype=torch.int64, device=device),
        invalid=torch.empty(T, dtype=torch.bool, device=device),
        log_prob=torch.empty(T, dtype=torch.float32, device=device) if moments else None,
    )
    return swept, decided


def _known(found: Step) -> TritonStep:
    if not isinstance(found, TritonStep) or found.shift is None:
        raise ValueError("step: only a step with moments, of this engine, has marginals and gradients")
    return found


def _swept(found: TritonStep) -> Swept:
    return Swept(*(getattr(found, name) for name in Swept._fields))
