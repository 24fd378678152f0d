"""Engines as torch operators: for programs that are traced, and for tensors without numbers.

Legend: T tokens, N variables, J = K + 1 counts (0 where a circuit gives none).

A traced program (torch.compile, torch.export, torch.jit.trace, make_fx) can neither look into an engine nor branch on
values, and a fake tensor, or one on the meta device, has none. These operators hide both: ``infer`` is one sweep with
its gradient, ``sample`` and ``mode`` choose a subset, ``satisfies`` checks one. Tracing sees shapes only. A circuit is
passed by its :attr:`~circuitroute.Circuit.handle`, so traced programs belong to the process that holds it.

Operators have gradients, of any order where the tracer takes them, and know how to be batched. Forward mode is for
:mod:`circuitroute.engines.transforms`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuitroute.circuit import Compiled, boolean
from circuitroute.circuit.compiled import of_handle
from circuitroute.engines.autograd import Batch, Direct, Direction, Marks, inference_of, parts_of
from circuitroute.engines.base import Inference
from circuitroute.engines.choice import counting_engine, engine_of

# As :data:`circuitroute.engines.autograd.Found`. Annotations are not strings in this file: torch 2.6 makes an
# operator's schema of them, and would look up the names in a module of its own.
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Operators:
    """The values of moments and their derivatives from operators; see :class:`circuitroute.engines.autograd.Source`.

    Args:
        counting: whether the count posterior must be among the results, whatever the circuit.
    """

    circuit: Compiled
    counting: bool = False

    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Inference:
        """One sweep."""
        return infer(self.circuit, logits_TN, potential, key_T, self.counting)

    def derivative(
        self, logits_TN: Tensor, potential: Tensor | None, marks: Marks, directions: Sequence[Direction]
    ) -> tuple[Tensor, Tensor | None]:
        """D_k; a list of an operator has no gaps, so what is not there is 0."""
        J = _counted(self.circuit.handle, logits_TN.device, self.counting)
        us = [torch.zeros_like(logits_TN) if u is None else u for u, _ in directions]
        vs = [logits_TN.new_zeros(logits_TN.shape[0], J) if v is None else v for _, v in directions]
        given = (logits_TN, potential, *marks, us, vs)
        by_logits, by_potential = _derivative(*given, self.circuit.handle, self.counting)
        return by_logits, by_potential if J else None


def infer(
    circuit: Compiled, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None, counting: bool = False
) -> Inference:
    """One sweep, differentiable once; see :meth:`circuitroute.engines.base.Engine.infer`."""
    found = _infer(logits_TN, potential, key_T, circuit.handle, counting)
    return inference_of(found, sampled=key_T is not None)


def sample(circuit: Compiled, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
    """[T, N] bool."""
    found: Tensor = _sample(logits_TN, potential, key_T, circuit.handle)
    return found


def mode(circuit: Compiled, logits_TN: Tensor, potential: Tensor | None) -> Tensor:
    """[T, N] bool."""
    found: Tensor = _mode(logits_TN, potential, circuit.handle)
    return found


def satisfies(circuit: Compiled, mask: Tensor) -> Tensor:
    """[...] bool, of masks [..., N] bool."""
    found: Tensor = _satisfies(mask, circuit.handle)
    return found


def _engine(handle: str, device: torch.device, counting: bool = False) -> Any:
    circuit = of_handle(handle)
    return counting_engine(circuit, device) if counting else engine_of(circuit, device)


def check_rows(logits: Tensor, **others: Tensor | None) -> None:
    """Refuse inputs of another number of rows than the logits: engines would read on behind them.

    Raises:
        ValueError: a tracer has written down a number of rows that it saw.
    """
    for name, value in others.items():
        if value is not None and value.shape[0] != logits.shape[0]:
            raise ValueError(
                f"{name} has {value.shape[0]} rows and the logits have {logits.shape[0]}: the program was traced with "
                "another number of rows, and holds it as a constant; trace it again, or derive all sizes from inputs"
            )


def _counted(handle: str, device: torch.device, counting: bool) -> int:
    """J, or 0 where a sweep gives no count posterior."""
    circuit = of_handle(handle)
    given = counting or circuit.counts is not None or _engine(handle, device).gives_counts
    return circuit.max_count + 1 if given else 0


def by_row(potential: Tensor | None) -> Tensor | None:
    """A potential that has rows."""
    return potential if potential is not None and potential.dim() == 2 else None


@torch.library.custom_op("circuitroute::infer", mutates_args=())
def _infer(logits: Tensor, potential: Tensor | None, key: Tensor | None, circuit: str, counting: bool) -> Parts:
    check_rows(logits, key=key, potential=by_row(potential))
    return parts_of(_engine(circuit, logits.device, counting).infer(logits, potential, key))


@_infer.register_fake
def _(logits: Tensor, potential: Tensor | None, key: Tensor | None, circuit: str, counting: bool) -> Parts:
    T, N = logits.shape
    row = logits.new_empty(T)
    exact = logits.new_empty(T, dtype=torch.float64)
    mask = logits.new_empty((0,) if key is None else (T, N), dtype=torch.bool)
    counts = logits.new_empty(T, _counted(circuit, logits.device, counting))
    flags = logits.new_empty(T, dtype=torch.bool)
    return row, logits.new_empty(T, N), counts, exact, torch.empty_like(exact), mask, flags


@torch.library.custom_op("circuitroute::derivative", mutates_args=())
def _derivative(
    logits: Tensor,
    potential: Tensor | None,
    shift: Tensor,
    fallback: Tensor,
    counts: Tensor,
    us: list[Tensor],
    vs: list[Tensor],
    circuit: str,
    counting: bool,
) -> tuple[Tensor, Tensor]:
    directions = {f"direction {i}": x for i, x in enumerate([*us, *vs])}
    check_rows(logits, potential=by_row(potential), shift=shift, fallback=fallback, counts=counts, **directions)
    pairs = [(u, v if v.shape[-1] else None) for u, v in zip(us, vs, strict=True)]
    source = Direct(_engine(circuit, logits.device, counting))
    by_logits, by_potential = source.derivative(logits, potential, (shift, fallback, counts), pairs)
    return by_logits, logits.new_empty(len(logits), 0) if by_potential is None else by_potential


@_derivative.register_fake
def _(
    logits: Tensor,
    potential: Tensor | None,
    shift: Tensor,
    fallback: Tensor,
    counts: Tensor,
    us: list[Tensor],
    vs: list[Tensor],
    circuit: str,
    counting: bool,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape[0], _counted(circuit, logits.device, counting))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    logits, potential, _, circuit, counting = inputs
    _, marginals, counts, shift, log_root, mask, fallback = output
    ctx.mark_non_differentiable(shift, log_root, mask, fallback)
    ctx.save_for_backward(logits, potential, marginals, counts, shift, fallback)
    ctx.circuit, ctx.counting = circuit, counting


def _gradients(ctx: Any, w: Tensor, u: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, potential, marginals, counts, shift, fallback = ctx.saved_tensors
    given = (logits, potential, shift, fallback, counts, [u], [v])
    by_logits, by_potential = _derivative(*given, ctx.circuit, ctx.counting)
    by_logits = by_logits + torch.where(torch.isinf(logits), 0.0, w[:, None] * marginals)
    if potential is None:
        return by_logits, None, None, None, None
    by_potential = by_potential + w[:, None] * counts
    return by_logits, by_potential.sum(0) if potential.dim() == 1 else by_potential, None, None, None


_infer.register_autograd(_gradients, setup_context=_remember)


def _remember_directions(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, potential, shift, fallback, counts, us, vs, ctx.circuit, ctx.counting = inputs
    ctx.save_for_backward(logits, potential, shift, fallback, counts, *us, *vs)


def _next_derivative(ctx: Any, a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """As :class:`circuitroute.engines.autograd.Derivative` has it."""
    logits, potential, shift, fallback, counts, *flat = ctx.saved_tensors
    half = len(flat) // 2
    us, vs = flat[:half], flat[half:]

    def along(us: list[Tensor], vs: list[Tensor]) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _derivative(
            logits, potential, shift, fallback, counts, us, vs, ctx.circuit, ctx.counting
        )
        return found

    by_logits, by_potential = along([*us, a], [*vs, b])
    if potential is not None and potential.dim() == 1:
        by_potential = by_potential.sum(0)
    by_directions = [along([*us[:i], a, *us[i + 1 :]], [*vs[:i], b, *vs[i + 1 :]]) for i in range(half)]
    by_us, by_vs = [u for u, _ in by_directions], [v for _, v in by_directions]
    return by_logits, None if potential is None else by_potential, None, None, None, by_us, by_vs, None, None


_derivative.register_autograd(_next_derivative, setup_context=_remember_directions)


@torch.library.custom_op("circuitroute::sample", mutates_args=())
def _sample(logits: Tensor, potential: Tensor | None, key: Tensor, circuit: str) -> Tensor:
    check_rows(logits, key=key, potential=by_row(potential))
    drawn: Tensor = _engine(circuit, logits.device).sample(logits, potential, key)
    return drawn


@_sample.register_fake
def _(logits: Tensor, potential: Tensor | None, key: Tensor, circuit: str) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.bool)


@torch.library.custom_op("circuitroute::mode", mutates_args=())
def _mode(logits: Tensor, potential: Tensor | None, circuit: str) -> Tensor:
    from circuitroute.engines.subset.mode import mode as subset_mode

    check_rows(logits, potential=by_row(potential))
    if potential is not None:
        return subset_mode(logits, potential)
    best: Tensor = _engine(circuit, logits.device).mode(logits)
    return best


@_mode.register_fake
def _(logits: Tensor, potential: Tensor | None, circuit: str) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.bool)


@torch.library.custom_op("circuitroute::satisfies", mutates_args=())
def _satisfies(mask: Tensor, circuit: str) -> Tensor:
    return boolean.satisfies(of_handle(circuit), mask).clone()  # an operator must not return a view of its input


@_satisfies.register_fake
def _(mask: Tensor, circuit: str) -> Tensor:
    return mask.new_empty(mask.shape[:-1], dtype=torch.bool)


# ---------------------------------------------------------------------------------------------- batches

# What an operator of torch.func.vmap gives: results, and where the batch is in each.
Batched = tuple[Any, Any]


def _batched_infer(
    info: Any, in_dims: Any, logits: Tensor, potential: Tensor | None, key: Tensor | None, circuit: str, counting: bool
) -> Batched:
    batch, given = _as_rows(info, in_dims, logits, potential, key)
    found = _infer(*given, circuit, counting)
    return tuple(map(batch.apart, found)), (0,) * len(found)


def _batched_derivative(
    info: Any,
    in_dims: Any,
    logits: Tensor,
    potential: Tensor | None,
    shift: Tensor,
    fallback: Tensor,
    counts: Tensor,
    us: list[Tensor],
    vs: list[Tensor],
    circuit: str,
    counting: bool,
) -> Batched:
    batch, given = _as_rows(info, in_dims, logits, potential, shift)
    lists = ([batch(x, dim) for x, dim in zip(*both, strict=True)] for both in ((us, in_dims[5]), (vs, in_dims[6])))
    marks = (batch(fallback, in_dims[3]), batch(counts, in_dims[4]))
    found = _derivative(*given, *marks, *lists, circuit, counting)
    return tuple(map(batch.apart, found)), (0, 0)


def _batched_sample(
    info: Any, in_dims: Any, logits: Tensor, potential: Tensor | None, key: Tensor, circuit: str
) -> Batched:
    batch, given = _as_rows(info, in_dims, logits, potential, key)
    return batch.apart(_sample(*given, circuit)), 0


def _batched_mode(info: Any, in_dims: Any, logits: Tensor, potential: Tensor | None, circuit: str) -> Batched:
    batch, (rows, phi, _) = _as_rows(info, (*in_dims[:2], None), logits, potential, None)
    return batch.apart(_mode(rows, phi, circuit)), 0


def _batched_satisfies(info: Any, in_dims: Any, mask: Tensor, circuit: str) -> Batched:
    return _satisfies(mask.movedim(in_dims[0], 0), circuit), 0


def _as_rows(
    info: Any, in_dims: Any, logits: Tensor, potential: Tensor | None, by_row: Tensor | None
) -> tuple[Batch, tuple[Tensor | None, ...]]:
    """The first three inputs of an operator as more rows."""
    batch = Batch(info.batch_size, in_dims[0], logits)
    given = (batch(logits, in_dims[0]), batch(potential, in_dims[1], shared=True), batch(by_row, in_dims[2]))
    return batch, given


_infer.register_vmap(_batched_infer)
_derivative.register_vmap(_batched_derivative)
_sample.register_vmap(_batched_sample)
_mode.register_vmap(_batched_mode)
_satisfies.register_vmap(_batched_satisfies)
