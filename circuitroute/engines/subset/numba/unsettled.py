"""The few rows of a routing step that float32 does not settle: see :mod:`circuitroute.engines.sweep` for the policy.

Legend: T tokens, N variables, J counts, S slots; R such rows.

Which subset, and all numbers, come from the engine's own inference, which has the policy; what else the step does with
them is written out here with torch, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute.engines.step import MAX_RELATIVE_LOGIT, SHARE, Inputs, Rule, Slopes, Step, Upstream
from circuitroute.engines.sweep import SweepEngine
from circuitroute.keys import fold_in, uniform


def at(inputs: Inputs, rows: Tensor) -> Inputs:
    """Some of the rows."""
    theta, t, phi = inputs.logits[rows], inputs.temperature, inputs.potential
    return Inputs(
        theta,
        theta if inputs.choice is inputs.logits else inputs.choice[rows],
        t[rows] if isinstance(t, Tensor) and t.dim() else t,
        phi[rows] if phi.dim() == 2 else phi,
        None if inputs.key is None else inputs.key[rows],
        None if inputs.mask is None else inputs.mask[rows],
    )


def divided(inputs: Inputs) -> Tensor:
    """[T, N] a / t, in float32 as it is decided on."""
    t = inputs.temperature
    t = t.to(inputs.choice)[..., None] if isinstance(t, Tensor) else t
    return inputs.choice / t


def drawn(inputs: Inputs, share: float) -> Tensor:
    """[T] bool, the tokens that are sampled."""
    T = len(inputs.logits)
    if inputs.key is None or share in (0.0, 1.0):
        return torch.full((T,), inputs.key is not None and share == 1.0)
    folded = fold_in(inputs.key, inputs.key.new_tensor(SHARE))
    return uniform(folded, 0, 1, torch.float64)[0] < share


def log_prob(inputs: Inputs, mask: Tensor, shift: Tensor, log_root: Tensor) -> Tensor:
    """[T] float64 log p(z), as :meth:`circuitroute.SubsetDistribution.log_prob` sums it."""
    x = divided(inputs)
    centred = x.double() - shift[:, None]
    coins = -F.softplus(torch.where(mask, -centred, centred))
    coins = torch.where(torch.isinf(x), 0.0, coins).sum(-1)
    free = (mask & ~torch.isinf(x)).sum(-1)
    phi = inputs.potential.double().expand(len(x), -1).gather(-1, mask.sum(-1, keepdim=True)).squeeze(-1)
    return coins + phi + shift * free - log_root


def slopes(engine: SweepEngine, inputs: Inputs, rule: Rule, step: Step, upstream: Upstream) -> Slopes:
    """The way back of these rows, by the formulas of :mod:`circuitroute.engines.step`; all rows are valid."""
    x, phi, z = divided(inputs).double(), inputs.potential.double(), step.mask.double()
    found = engine.naive.infer(x, phi)
    if found.count_probs is None:
        raise RuntimeError("engines of the count family give the posterior")  # cannot happen
    m, q, theta = found.marginals, found.count_probs, inputs.logits.double()
    v = torch.zeros_like(x) if upstream.gates is None else upstream.gates.double()
    if upstream.weights is not None:
        used = step.mask.gather(-1, step.indices)
        v = v.scatter_add(-1, step.indices, torch.where(used, upstream.weights.double(), 0.0))
    w, by_theta = _weights(theta, step.mask, rule.combine, m), torch.zeros_like(x)
    inner = (v * z * w).sum(-1, keepdim=True)
    if rule.combine == "softmax":
        by_theta = w * (v * z - inner)
    elif rule.combine == "normalized":
        by_theta = z * w * (v - inner)
    elif rule.combine == "sigmoid":
        by_theta = v * z * w * (1 - w)
    u = torch.zeros_like(x) if upstream.marginals is None else upstream.marginals.double()
    if rule.simple:
        u = u + w * (v - inner if rule.combine == "normalized" else v)
    if rule.combine == "marginal":
        u = u + v * z
    by_q = None if upstream.count_probs is None else upstream.count_probs.double()
    dm, dq = engine.naive.second_derivative(x, phi, found, u, by_q)
    dq = torch.zeros_like(q) if dq is None else dq
    c = x.new_zeros(len(x), 1) if upstream.log_prob is None else upstream.log_prob.double()[:, None]
    less = -c if upstream.log_partition is None else upstream.log_partition.double()[:, None] - c
    t = inputs.temperature
    t = t.double()[..., None] if isinstance(t, Tensor) else t
    by_choice = torch.where(torch.isinf(x), 0.0, (dm + less * m + c * z) / t)
    by_theta = torch.where(torch.isinf(theta), 0.0, by_theta)
    by_phi = dq + less * q + c * F.one_hot(step.mask.sum(-1), q.shape[-1])
    if inputs.choice is inputs.logits:
        return Slopes(by_theta + by_choice, None, by_phi)
    return Slopes(by_theta, by_choice, by_phi)


def _weights(theta: Tensor, mask: Tensor, combine: str, marginals: Tensor) -> Tensor:
    """[R, N] what every variable weighs, or would if it were chosen."""
    if combine == "marginal":
        return marginals
    if combine == "sigmoid":
        return torch.sigmoid(theta)
    if combine == "softmax":
        forced = theta == math.inf
        some, none = forced.any(-1, keepdim=True), (theta == -math.inf).all(-1, keepdim=True)
        theta = torch.where(some, torch.where(forced, 0.0, -math.inf), theta)
        return torch.softmax(torch.where(none, 0.0, theta), -1)
    finite = torch.where(theta == math.inf, torch.finfo(torch.float32).max, theta)
    top = torch.where(mask, finite, -math.inf).amax(-1, keepdim=True)
    e = (finite - torch.where(torch.isinf(top), 0.0, top)).clamp(max=MAX_RELATIVE_LOGIT).exp()
    total = torch.where(mask, e, 0.0).sum(-1, keepdim=True)
    return e / torch.where(total > 0, total, 1.0)
