"""Known moments as differentiable functions of logits and potential, for engines that are no autograd graph.

Legend: T tokens, N variables, J = K + 1 counts.

With theta the logits and phi the count potential, m = d log Z / d theta and q = d log Z / d phi, so for upstream
gradients (w, u, v) of (log Z, m, q) the backward pass is w m and w q plus the derivative of (m, q) along (u, v): the
second derivative of log Z is symmetric. An engine supplies that derivative; in particular dm/dtheta is Cov(z).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from circuitroute.engines.base import Inference, certainly_finite


class Differentiable(Protocol):
    """What an engine must know for its results to have gradients."""

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """([T, N], [T, J]) the derivative of (m, q) along (u, v); None for q where the circuit has no counts."""
        ...

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log Z, m, q) by plain autograd, differentiable to any order."""
        ...


def attach(engine: Differentiable, inference: Inference, logits_TN: Tensor, potential: Tensor | None) -> Inference:
    """The same results, with gradients of their own."""
    log_partition, marginals, *rest = _Moments.apply(logits_TN, potential, inference, engine)  # type: ignore[no-untyped-call]
    return replace(inference, log_partition=log_partition, marginals=marginals, count_probs=rest[0] if rest else None)


class _Moments(torch.autograd.Function):
    """(logits, potential) -> (log Z, marginals, count posterior if any), whose values are known already."""

    @staticmethod
    def forward(
        ctx: Any, logits_TN: Tensor, potential: Tensor | None, inference: Inference, engine: Differentiable
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits_TN, potential)
        ctx.inference, ctx.engine = inference, engine
        ctx.set_materialize_grads(False)
        values = (inference.log_partition, inference.marginals, inference.count_probs)
        return tuple(x.detach() for x in values if x is not None)

    @staticmethod
    def backward(
        ctx: Any, w_T: Tensor | None, u_TN: Tensor | None, v_TJ: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        logits, potential = ctx.saved_tensors
        backward = _differentiable_backward if torch.is_grad_enabled() else _backward
        grad_logits, grad_phi = backward(ctx.engine, logits, potential, ctx.inference, w_T, u_TN, v_TJ)
        wanted = ctx.needs_input_grad
        return grad_logits if wanted[0] else None, grad_phi if wanted[1] else None, None, None


def _backward(
    engine: Differentiable,
    logits_TN: Tensor,
    potential: Tensor | None,
    inference: Inference,
    w_T: Tensor | None,
    u_TN: Tensor | None,
    v_TJ: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients in logits and potential: w m + dm and w q + dq."""
    marginals, count_probs = inference.marginals, inference.count_probs
    if u_TN is None and v_TJ is None:
        grad_logits = torch.zeros_like(marginals)
        grad_phi = None if count_probs is None else torch.zeros_like(count_probs)
    else:
        u = torch.zeros_like(marginals) if u_TN is None else u_TN
        grad_logits, grad_phi = engine.second_derivative(logits_TN, potential, inference, u, v_TJ)
    if w_T is not None:
        grad_logits.addcmul_(marginals, w_T[:, None])
        if grad_phi is not None and count_probs is not None:
            grad_phi.addcmul_(count_probs, w_T[:, None])
    # Infinite logits are evidence: nothing is a function of them. (A GPU would have to be waited for to know.)
    if logits_TN.is_cuda or not certainly_finite(logits_TN):
        grad_logits.masked_fill_(torch.isinf(logits_TN), 0.0)
    if potential is None or grad_phi is None:
        return grad_logits, None
    return grad_logits, grad_phi if potential.dim() == 2 else grad_phi.sum(0)


def _differentiable_backward(
    engine: Differentiable,
    logits: Tensor,
    potential: Tensor | None,
    inference: Inference,
    w: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated again (create_graph=True).

    Those of log Z are the engine's own differentiable marginals; second derivatives go through the naive engine.
    """
    grads: list[Tensor | None] = [None, None]
    if u is not None or v is not None:
        grads = _naive_gradients(engine, logits, potential, u, v)
    if w is not None:
        known = attach(engine, inference, logits, potential)
        by_logits = (known.marginals * w[:, None]).masked_fill(torch.isinf(logits), 0.0)
        by_phi = None
        if potential is not None and known.count_probs is not None:
            by_phi = known.count_probs * w[:, None]
            by_phi = by_phi if potential.dim() == 2 else by_phi.sum(0)
        grads = [x if g is None else x if x is None else x + g for g, x in zip(grads, (by_logits, by_phi), strict=True)]
    return grads[0], grads[1]


def _naive_gradients(
    engine: Differentiable, logits: Tensor, potential: Tensor | None, u: Tensor | None, v: Tensor | None
) -> list[Tensor | None]:
    _, marginals, count_probs = engine.naive_moments(logits, potential)
    # As upstream gradients, not as factors: u and v may be functions of the logits themselves.
    pairs = [(x, g) for x, g in ((marginals, u), (count_probs, v)) if x is not None and g is not None]
    pairs = [(x, g) for x, g in pairs if x.requires_grad]
    inputs = [x for x in (logits, potential) if x is not None and x.requires_grad]
    if not pairs:
        return [None if x is None or not x.requires_grad else torch.zeros_like(x) for x in (logits, potential)]
    outputs, upstream = [x for x, _ in pairs], [g.to(x.dtype) for x, g in pairs]
    found = iter(torch.autograd.grad(outputs, inputs, upstream, create_graph=True, materialize_grads=True))
    return [next(found) if x is not None and x.requires_grad else None for x in (logits, potential)]
