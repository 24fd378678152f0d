"""Expectation maximisation for a latent tree: expected counts, which are derivatives, and the weights they make.

The expected number of times that a weight w is used, summed over the data, is d log-likelihood / d log w (Darwiche, A
differential approach to inference in Bayesian networks, 2003; the *flow* of an edge in the literature on circuits). The
next weights are these counts, normalised.

Legend: T masks, N variables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitroute.circuit.vtree import Vtree
from circuitroute.deadline import tick
from circuitroute.priors.distribution import log_prior
from circuitroute.priors.sweep import Weights

# Values held at once, which bounds memory for any number of masks.
MAX_VALUES = 1 << 24


@torch.inference_mode(False)
@torch.enable_grad()
def flows(weights: Weights, vtree: Vtree, selected_TN: Tensor, counted_T: Tensor) -> tuple[Tensor, Weights]:
    """([], counts): the mean log-likelihood, and the expected counts of all weights, summed over weighted masks.

    A mask that occurs often is looked at once.
    """
    # Clones, since tensors that were made in inference mode have no gradient.
    rows, which = torch.unique(selected_TN.clone(), dim=0, return_inverse=True)
    counts = torch.zeros(len(rows), dtype=counted_T.dtype, device=rows.device).index_add(0, which, counted_T.clone())
    free = Weights(*(each.detach().clone().requires_grad_() for each in weights))
    total = counts.new_zeros(())
    found = [torch.zeros_like(each) for each in free]
    most = max(1, MAX_VALUES // (2 * selected_TN.shape[1] * (len(weights.root) + weights.coins[0].numel())))
    for some, weight in zip(rows.split(most), counts.split(most), strict=True):
        tick(1000)
        log_prob = (log_prior(free, vtree, some) * weight).sum()
        total += log_prob.detach()
        parts = torch.autograd.grad(log_prob, free, materialize_grads=True)
        found = [so_far + part for so_far, part in zip(found, parts, strict=True)]
    return total / counts.sum(), Weights(*found)


def maximised(before: Weights, flows: Weights, step_size: float, smoothing: float) -> Weights:
    """Log-weights moved by ``step_size`` towards the expected shares; a distribution that is never used stays."""
    moved = []
    for old, counts in zip(before, flows, strict=True):
        counts = counts + smoothing / counts.shape[-1]
        total = counts.sum(-1, keepdim=True)
        shares = torch.where(total > 0, counts / torch.where(total > 0, total, 1.0), old.detach().exp())
        moved.append(((1 - step_size) * old.detach().exp() + step_size * shares).log())
    return Weights(*moved)
