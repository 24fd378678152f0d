"""The few rows of a routing step that float32 does not settle: see :mod:`circuitroute.engines.sweep` for the policy.

Legend: T tokens, N variables, J counts, S slots; R such rows.

Which subset, and all numbers, come from the engine's own inference, which has the policy; what else the step does with
them is written out here with torch, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute._validate import present
from circuitroute.engines import combine
from circuitroute.engines.logspace import log_coin_flips
from circuitroute.engines.step import SHARE, Inputs, Rule, Slopes, Step, Upstream
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
        return torch.full((T,), inputs.key is not None and share == 1.0, device="cpu")
    folded = fold_in(inputs.key, inputs.key.new_tensor(SHARE))
    return uniform(folded, 0, 1, torch.float64)[0] < share


def log_prob(inputs: Inputs, mask: Tensor, shift: Tensor, log_root: Tensor) -> Tensor:
    """[T] float64 log p(z), as :meth:`circuitroute.SubsetDistribution.log_prob` sums it."""
    x = divided(inputs)
    centred = x.double() - shift[:, None]
    coins = log_coin_flips(centred, mask)
    coins = torch.where(torch.isinf(x), 0.0, coins).sum(-1)
    free = (mask & ~torch.isinf(x)).sum(-1)
    phi = inputs.potential.double().expand(len(x), -1).gather(-1, mask.sum(-1, keepdim=True)).squeeze(-1)
    return coins + phi + shift * free - log_root


def slopes(engine: SweepEngine, inputs: Inputs, rule: Rule, step: Step, upstream: Upstream) -> Slopes:
    """The way back of these rows, by the formulas of :mod:`circuitroute.engines.step`; all rows are valid."""
    x, phi, z = divided(inputs).double(), inputs.potential.double(), step.mask.double()
    found = engine.naive.infer(x, phi)
    q = present(found.count_probs, "engines of the count family give the posterior")
    m, theta = found.marginals, inputs.logits.double()
    v = combine.gates_gradient(step, upstream).double()
    u, by_theta = combine.slopes(theta, step.mask, m, v, rule.combine, rule.simple)
    u = u if upstream.marginals is None else u + upstream.marginals.double()
    by_q = None if upstream.count_probs is None else upstream.count_probs.double()
    dm, dq = engine.naive.second_derivative(x, phi, found, u, by_q)
    dq = torch.zeros_like(q) if dq is None else dq
    c = x.new_zeros(len(x), 1) if upstream.log_prob is None else upstream.log_prob.double()[:, None]
    less = -c if upstream.log_partition is None else upstream.log_partition.double()[:, None] - c
    t = inputs.temperature
    t = t.double()[..., None] if isinstance(t, Tensor) else t
    by_choice = torch.where(torch.isinf(x), 0.0, (dm + less * m + c * z) / t)
    by_phi = dq + less * q + c * F.one_hot(step.mask.sum(-1), q.shape[-1])
    if inputs.choice is inputs.logits:
        return Slopes(by_theta + by_choice, None, by_phi)
    return Slopes(by_theta, by_choice, by_phi)
