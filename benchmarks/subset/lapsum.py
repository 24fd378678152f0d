"""LapSum's soft top-k in the place of the marginals: a relaxation, so nothing is drawn.

Shapes: T tokens, N variables.

Gates are softmax(logits) * p with the p of ``cr.soft_topk``; backward is its analytic gradient. p is no
marginal of any distribution that the op asks for: what its rows call an error is, forward, how far the sum of p is
from k, and backward, the distance of the gradient from that of the same relaxation solved by bisection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Forward, Outputs, UnavailableError, provider
from benchmarks.subset.workload import SubsetCase
from circuitroute.routing.soft_topk import soft_topk


@provider("subset", "lapsum", note="a soft relaxation, no sample")
def build(case: SubsetCase) -> Forward:
    """Float32, eager, at temperature 1."""
    if case.kmin != case.k:
        raise UnavailableError(f"LapSum relaxes one k, not a range {case.kmin}..{case.k}")
    if case.k == case.n:
        raise UnavailableError(f"LapSum needs k < n, and both are {case.k}")

    def forward(logits_TN: Tensor) -> Outputs:
        soft_TN = soft_topk(logits_TN, case.k, alpha=1.0)
        return Outputs(torch.softmax(logits_TN, dim=-1) * soft_TN, {"soft": soft_TN})

    return forward
