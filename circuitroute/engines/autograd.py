"""Moments whose values are known already, as differentiable functions of logits and potential.

Legend: T tokens, N variables, J = K + 1 counts. Everything below is per token.

**The function.** Let F(x) = log Z at x = (theta, phi), the logits and the count potential. A sweep gives F and its
gradient, m = dF / dtheta (the marginals) and q = dF / dphi (the count posterior). The operator differentiated here is
x -> (F, m, q) = (F, grad F), whose values are handed in.

**The gradient.** For a loss L with w = dL / dF, u = dL / dm and v = dL / dq the chain rule says

    dL / dx = w grad F + J^T (u, v),    J = d(grad F) / dx = H, the second derivative of F.

H is symmetric, since F is smooth: J^T (u, v) = H (u, v), which is the derivative of (m, q) along the direction (u, v),

    H (u, v) = d/de grad F(x + e (u, v)) at e = 0.

So the backward pass is a sweep in forward mode, on dual numbers, in the memory of a sweep and without a matrix; an
engine supplies it as ``second_derivative``. The block dm / dtheta of H is the covariance of the variables.

**Gradients of gradients** (``create_graph=True``). The two summands above are themselves functions of x, w, u and v:

- w grad F: the factor grad F is (m, q), so this same operator, attached to the same values, gives it a gradient;
- H (u, v) = grad <(u, v), grad F>, with u and v held fixed: autograd takes it through the naive engine, whose moments
  are differentiable to any order. There u and v go in as upstream gradients, so that their own graphs are kept.

**Evidence.** An infinite logit conditions F on its variable and is not an argument of it: its gradient is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        engine, known, again = ctx.engine, ctx.inference, torch.is_grad_enabled()
        by_logits = by_potential = None
        if u_TN is not None or v_TJ is not None:
            if again:
                by_logits, by_potential = naive_second_derivative(engine.naive_moments, logits, potential, u_TN, v_TJ)
            else:
                u = torch.zeros_like(logits) if u_TN is None else u_TN
                by_logits, by_potential = engine.second_derivative(logits, potential, known, u, v_TJ)
        if w_T is not None:
            known = attach(engine, known, logits, potential) if again else known
            by_logits = _plus(by_logits, known.marginals, w_T)
            by_potential = _plus(by_potential, known.count_probs, w_T)
        if by_potential is not None and potential is not None and potential.dim() == 1:
            by_potential = by_potential.sum(0)
        wanted = ctx.needs_input_grad
        by_logits = _without_evidence(by_logits, logits) if wanted[0] else None
        return by_logits, by_potential if wanted[1] else None, None, None


def _plus(total: Tensor | None, values: Tensor | None, w_T: Tensor) -> Tensor | None:
    """total + w values, where what is None is left out."""
    if values is None:
        return total
    return values * w_T[:, None] if total is None else torch.addcmul(total, values, w_T[:, None])


def _without_evidence(gradient: Tensor | None, logits_TN: Tensor) -> Tensor | None:
    # A GPU would have to be waited for to know that there is none.
    if gradient is None or (not logits_TN.is_cuda and certainly_finite(logits_TN)):
        return gradient
    return torch.where(torch.isinf(logits_TN), 0.0, gradient)


def naive_second_derivative(
    moments: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]],
    logits_TN: Tensor,
    potential: Tensor | None,
    u_TN: Tensor | None,
    v_TJ: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """([T, N], [T, J]) H (u, v) through moments that are a graph; itself differentiable.

    Only what depends on an input that requires a gradient is computed; the rest is 0.
    """
    inputs = [logits_TN] if potential is None else [logits_TN, potential.expand(len(logits_TN), -1)]
    _, marginals, count_probs = moments(logits_TN, inputs[1] if potential is not None else None)
    pairs = [(x, g) for x, g in ((marginals, u_TN), (count_probs, v_TJ)) if x is not None and g is not None]
    pairs = [(x, g.to(x.dtype)) for x, g in pairs if x.requires_grad]
    found: Iterator[Tensor] = iter(())
    if pairs:
        outputs, upstream, wanted = [x for x, _ in pairs], [g for _, g in pairs], [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, materialize_grads=True))
    by_input = [next(found) if pairs and x.requires_grad else torch.zeros_like(x) for x in inputs]
    return by_input[0], by_input[1] if potential is not None else None
