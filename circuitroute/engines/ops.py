"""Engines as torch operators, for programs that are traced: torch.compile, torch.export.

Legend: T tokens, N variables, J = K + 1 counts (0 where a circuit gives none).

A traced program can neither look into an engine nor branch on values. These operators hide both: ``infer`` is one
sweep with its gradient, ``sample`` and ``mode`` choose a subset, ``satisfies`` checks one. Tracing sees shapes only. A
circuit is passed by its :attr:`~circuitroute.Circuit.handle`, so traced programs belong to the process that holds it.

Untraced programs call engines directly, with gradients of any order. Operators have first gradients only (of log Z,
marginals and count posterior), which is what training needs.
"""

from typing import Any

import torch
from torch import Tensor

from circuitroute.circuit import Compiled, boolean
from circuitroute.circuit.compiled import of_handle
from circuitroute.engines.base import Inference
from circuitroute.engines.choice import engine_of

# (log Z, marginals, count posterior, shift, log root, mask, fallback). Annotations are not strings in this file: torch
# 2.6 makes an operator's schema of them, and would look up the names in a module of its own.
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def infer(circuit: Compiled, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Inference:
    """One sweep, differentiable once; see :meth:`circuitroute.engines.base.Engine.infer`."""
    parts = _infer(logits_TN, potential, key_T, circuit.handle)
    log_partition, marginals, counts, shift, log_root, mask, fallback = parts
    posterior, drawn = counts if counts.shape[1] else None, None if key_T is None else mask
    return Inference(log_partition, marginals, posterior, shift, log_root, drawn, fallback)


def sample(circuit: Compiled, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
    """[T, N] bool."""
    found: Tensor = _sample(logits_TN, potential, key_T, circuit.handle)
    return found


def mode(circuit: Compiled, logits_TN: Tensor, potential: Tensor | None) -> Tensor:
    """[T, N] bool."""
    found: Tensor = _mode(logits_TN, potential, circuit.handle)
    return found


def satisfies(circuit: Compiled, mask_TN: Tensor) -> Tensor:
    """[T] bool."""
    found: Tensor = _satisfies(mask_TN, circuit.handle)
    return found


def _engine(handle: str, device: torch.device) -> Any:
    return engine_of(of_handle(handle), device)


def _counted(handle: str, device: torch.device) -> int:
    """J, or 0 where a sweep gives no count posterior."""
    circuit, engine = of_handle(handle), _engine(handle, device)
    return circuit.max_count + 1 if circuit.counts is not None or engine.gives_counts else 0


@torch.library.custom_op("circuitroute::infer", mutates_args=())
def _infer(logits: Tensor, potential: Tensor | None, key: Tensor | None, circuit: str) -> Parts:
    found = _engine(circuit, logits.device).infer(logits, potential, key)
    T = len(logits)
    counts = logits.new_empty(T, 0) if found.count_probs is None else found.count_probs
    mask = logits.new_empty(0, dtype=torch.bool) if found.mask is None else found.mask
    fallback = torch.zeros(T, dtype=torch.bool, device=logits.device) if found.fallback is None else found.fallback
    return found.log_partition, found.marginals, counts, found.shift, found.log_root, mask, fallback


@_infer.register_fake
def _(logits: Tensor, potential: Tensor | None, key: Tensor | None, circuit: str) -> Parts:
    T, N = logits.shape
    row = logits.new_empty(T)
    exact = logits.new_empty(T, dtype=torch.float64)
    mask = logits.new_empty((0,) if key is None else (T, N), dtype=torch.bool)
    counts = logits.new_empty(T, _counted(circuit, logits.device))
    flags = logits.new_empty(T, dtype=torch.bool)
    return row, logits.new_empty(T, N), counts, exact, torch.empty_like(exact), mask, flags


@torch.library.custom_op("circuitroute::infer_backward", mutates_args=())
def _infer_backward(
    logits: Tensor,
    potential: Tensor | None,
    marginals: Tensor,
    counts: Tensor,
    shift: Tensor,
    log_root: Tensor,
    fallback: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    circuit: str,
) -> tuple[Tensor, Tensor]:
    posterior = counts if counts.shape[1] else None
    known = Inference(marginals.new_empty(len(marginals)), marginals, posterior, shift, log_root, None, fallback)
    leaves = [logits.detach().requires_grad_()]
    if potential is not None:
        leaves.append(potential.detach().requires_grad_())
    with torch.enable_grad():
        phi = None if potential is None else leaves[1]
        attached = _engine(circuit, logits.device).attach(known, leaves[0], phi)
        outputs, upstream = [attached.log_partition, attached.marginals], [w, u]
        if posterior is not None and attached.count_probs is not None:
            outputs, upstream = [*outputs, attached.count_probs], [*upstream, v]
        found = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
    return found[0], found[1] if potential is not None else logits.new_empty(0)


@_infer_backward.register_fake
def _(logits: Tensor, potential: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty((0,) if potential is None else potential.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    logits, potential, _, circuit = inputs
    _, marginals, counts, shift, log_root, mask, fallback = output
    ctx.mark_non_differentiable(shift, log_root, mask, fallback)
    ctx.save_for_backward(logits, potential, marginals, counts, shift, log_root, fallback)
    ctx.circuit = circuit


def _gradients(ctx: Any, w: Tensor, u: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, potential, *known = ctx.saved_tensors
    by_logits, by_potential = _infer_backward(logits, potential, *known, w, u, v, ctx.circuit)
    return by_logits, None if potential is None else by_potential, None, None


_infer.register_autograd(_gradients, setup_context=_remember)


@torch.library.custom_op("circuitroute::sample", mutates_args=())
def _sample(logits: Tensor, potential: Tensor | None, key: Tensor, circuit: str) -> Tensor:
    drawn: Tensor = _engine(circuit, logits.device).sample(logits, potential, key)
    return drawn


@_sample.register_fake
def _(logits: Tensor, potential: Tensor | None, key: Tensor, circuit: str) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.bool)


@torch.library.custom_op("circuitroute::mode", mutates_args=())
def _mode(logits: Tensor, potential: Tensor | None, circuit: str) -> Tensor:
    from circuitroute.engines.subset.mode import mode as subset_mode

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
