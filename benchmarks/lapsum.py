"""LapSum's soft top-k (Struski et al., "LapSum - One Method to Differentiate Them All", ICML 2025), in eager torch.

Shapes: T rows (all leading dimensions), N variables, B = N + 1 places for the threshold.

    p_i = F(r_i / alpha - b),    F the distribution function of Laplace(0, 1),    b such that sum_i p_i = k

k is any real number strictly between 0 and N; alpha > 0 is the temperature: p tends to the 0/1 mask of the k largest
as alpha goes to 0. It is a relaxation, not a distribution over subsets: p has the sum k and nothing is drawn.

**The threshold in closed form.** With x = r / alpha sorted from the largest down, the sum falls as b grows, so the
number m of x_i >= b is the number of x_i at which the sum is at most k. For that m the condition is a quadratic in
e^b,

    m - e^b U / 2 + e^-b L / 2 = k,    U = sum_{i <= m} e^-x_i,    L = sum_{i > m} e^x_i,

whose positive root is (c + sqrt(c^2 + U L)) / U, or L / (sqrt(c^2 + U L) - c), with c = m - k: one for each sign of
c, so that nothing cancels. U and L are kept as logarithms (running logsumexps from either end), so gaps of any size
between logits stay finite; x is measured from the k-th largest, so large logits lose no digits.

**The gradient.** With d_i = F'(x_i - b) = exp(-|x_i - b|) / 2 and D = sum_i d_i, the condition gives
db = (sum_i d_i dx_i - dk) / D, so for an upstream u and its mean v = sum_i d_i u_i / D

    dr_i = d_i (u_i - v) / alpha,    dk = v,    dalpha = -sum_i dr_i r_i / alpha.

v is a softmax-weighted mean, finite also where every d_i underflows; the gradient in r sums to 0 over the row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def soft_topk(logits_TN: Tensor, k: float | Tensor, alpha: float | Tensor) -> Tensor:
    """Soft top-k weights [..., N] in (0, 1) that sum to ``k``; differentiable once in all three arguments.

    logits_TN: [..., N], finite. k, alpha: numbers, or tensors that broadcast to the leading dimensions.

    Raises:
        ValueError: k is not strictly between 0 and N, or alpha is not positive.
    """
    n = logits_TN.shape[-1]
    # Numbers are checked where they are, so that only tensors on a GPU wait for it.
    if not ((torch.as_tensor(k) > 0) & (torch.as_tensor(k) < n)).all():
        raise ValueError(f"k must be strictly between 0 and {n}, got {k}")
    if not (torch.as_tensor(alpha) > 0).all():
        raise ValueError(f"alpha must be positive, got {alpha}")
    k_T, alpha_T = _per_row(k, logits_TN), _per_row(alpha, logits_TN)
    weights_TN: Tensor = _SoftTopK.apply(logits_TN, k_T, alpha_T)  # type: ignore[no-untyped-call]
    return weights_TN


def _per_row(value: float | Tensor, logits_TN: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=logits_TN.dtype, device=logits_TN.device).expand(logits_TN.shape[:-1])


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TN: Tensor, k_T: Tensor, alpha_T: Tensor) -> Tensor:
        sorted_TN = logits_TN.sort(dim=-1, descending=True).values
        kth_T1 = sorted_TN.gather(-1, (k_T.ceil().long() - 1)[..., None])
        alpha_T1 = alpha_T[..., None]
        threshold_T1 = _threshold((sorted_TN - kth_T1) / alpha_T1, k_T)[..., None]
        centred_TN = logits_TN - kth_T1
        distance_TN = centred_TN / alpha_T1 - threshold_T1
        ctx.save_for_backward(centred_TN, distance_TN, alpha_T1)
        return laplace_cdf(distance_TN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred_TN, distance_TN, alpha_T1 = ctx.saved_tensors
        exponent_TN = -distance_TN.abs()
        mean_T1 = (torch.softmax(exponent_TN, dim=-1) * upstream_TN).sum(-1, keepdim=True)
        to_logits_TN = 0.5 * exponent_TN.exp() * (upstream_TN - mean_T1) / alpha_T1
        # The gradient in the logits sums to 0, so it does not matter what the logits are measured from.
        to_alpha_T = -(to_logits_TN * centred_TN / alpha_T1).sum(-1)
        return to_logits_TN, mean_T1[..., 0], to_alpha_T


def laplace_cdf(x: Tensor) -> Tensor:
    """The distribution function of Laplace(0, 1)."""
    tail = 0.5 * torch.exp(-x.abs())
    return torch.where(x < 0, tail, 1 - tail)


def _threshold(x_TN: Tensor, k_T: Tensor) -> Tensor:
    """b with sum_i F(x_i - b) = k, for x sorted from the largest down."""
    never_T1 = torch.full_like(x_TN[..., :1], -math.inf)
    # At place m: the logarithms of the sums over the m largest and over the others.
    log_upper_TB = torch.cat([never_T1, torch.logcumsumexp(-x_TN, dim=-1)], dim=-1)
    log_lower_TB = torch.cat([torch.logcumsumexp(x_TN.flip(-1), dim=-1).flip(-1), never_T1], dim=-1)
    places_N = torch.arange(1, x_TN.shape[-1] + 1, device=x_TN.device, dtype=x_TN.dtype)
    sums_TN = places_N - 0.5 * (x_TN + log_upper_TB[..., 1:]).exp() + 0.5 * (log_lower_TB[..., 1:] - x_TN).exp()
    above_T = (sums_TN <= k_T[..., None]).sum(-1)
    log_upper_T = log_upper_TB.gather(-1, above_T[..., None])[..., 0]
    log_lower_T = log_lower_TB.gather(-1, above_T[..., None])[..., 0]
    excess_T = above_T - k_T
    root_T = torch.hypot(excess_T, (0.5 * (log_upper_T + log_lower_T)).exp())
    from_above_T = (excess_T + root_T).log() - log_upper_T
    from_below_T = log_lower_T - (root_T - excess_T).log()
    # The middle, apart from the others because the root underflows where the gap is wide.
    middle_T = 0.5 * (log_lower_T - log_upper_T)
    return torch.where(excess_T > 0, from_above_T, torch.where(excess_T < 0, from_below_T, middle_T))
