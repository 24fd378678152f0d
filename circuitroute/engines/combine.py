"""The rules of combination weights in plain torch: what fused steps are held to, and what they do with odd rows.

Legend: T tokens, E experts; z the 0/1 mask of the chosen experts, theta the logits of the weights, w each expert's
weight or what it would be if it were chosen, v the gradient that reaches the gates z w. The rules, and the derivation
of the slopes, stand in :mod:`circuitroute.engines.step`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from circuitroute.engines.step import MAX_RELATIVE_LOGIT, Combine, Step, Upstream


def evidence_softmax(logits: Tensor) -> Tensor:
    """[T, E] softmax over all experts; forced ones (+inf) share all of it, and a row of -inf is left uniform."""
    return torch.softmax(_softmax_input(logits), -1)


def evidence_log_softmax(logits: Tensor) -> Tensor:
    """[T, E] its logarithm, which tells apart weights that underflow; -inf where there is none."""
    return torch.log_softmax(_softmax_input(logits), -1)


def _softmax_input(logits: Tensor) -> Tensor:
    """[T, E] logits without +inf and with a number in every row, of which softmax makes what evidence says."""
    forced = logits == math.inf
    some, none = forced.any(-1, keepdim=True), (logits == -math.inf).all(-1, keepdim=True)
    logits = torch.where(some, torch.where(forced, 0.0, -math.inf), logits)
    return torch.where(none, 0.0, logits)


def relative(mask: Tensor, logits: Tensor) -> Tensor:
    """[T, E] each expert's weight over that of the largest chosen one."""
    finite = torch.where(logits == math.inf, torch.finfo(torch.float32).max, logits)
    top = torch.where(mask, finite, -math.inf).amax(-1, keepdim=True).detach()
    top = torch.where(torch.isinf(top), 0.0, top)  # nothing chosen
    return (finite - top).clamp(max=MAX_RELATIVE_LOGIT).exp()


def weights(logits: Tensor, mask: Tensor, combine: Combine, marginals: Tensor) -> Tensor:
    """[T, E] w of every expert."""
    if combine == "marginal":
        return marginals
    if combine == "sigmoid":
        return torch.sigmoid(logits)
    if combine == "softmax":
        return evidence_softmax(logits)
    e = relative(mask, logits)
    total = torch.where(mask, e, 0.0).sum(-1, keepdim=True)
    return e / torch.where(total > 0, total, 1.0)


def slopes(
    logits: Tensor, mask: Tensor, marginals: Tensor, v: Tensor, combine: Combine, simple: bool
) -> tuple[Tensor, Tensor]:
    """[T, E] each: what of v reaches the marginals, and what reaches theta."""
    z, w = mask.to(v.dtype), weights(logits, mask, combine, marginals)
    mean = (v * z * w).sum(-1, keepdim=True)
    u = w * (v - mean if combine == "normalized" else v) if simple else torch.zeros_like(v)
    if combine == "marginal":
        return u + v * z, torch.zeros_like(v)
    if combine == "softmax":
        by_theta = w * (v * z - mean)
    elif combine == "normalized":
        by_theta = z * w * (v - mean)
    else:
        by_theta = v * z * w * (1 - w)
    return u, torch.where(torch.isinf(logits), 0.0, by_theta)


def gates_gradient(step: Step, upstream: Upstream) -> Tensor:
    """[T, E] v, from what reaches the slots and the gates."""
    v = step.weights.new_zeros(step.mask.shape)
    if upstream.weights is not None:
        used = step.mask.gather(-1, step.indices)
        v.scatter_(-1, step.indices, torch.where(used, upstream.weights, 0.0).to(v.dtype))
    return v if upstream.gates is None else v + upstream.gates
