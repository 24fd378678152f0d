"""LapSum's soft top-k (Struski et al., "LapSum - One Method to Differentiate Them All", ICML 2025), and budgets on it.

Legend: T rows (all leading dimensions), N variables; a suffix 1 is a dimension of size one. L layers.

    p_i = F(r_i / alpha - b),    F the distribution function of Laplace(0, 1),    b such that sum_i p_i = k

k is any real number from 0 to N; alpha > 0 is the temperature: p tends to the 0/1 mask of the k largest as alpha goes
to 0. It is a relaxation, not a distribution over subsets: p has the sum k, and nothing is drawn.

**The threshold in closed form.** With x = r / alpha sorted from the largest down, the sum falls as b grows, so the
number m of x_i >= b is the number of x_i at which the sum is at most k. For that m the condition is a quadratic in
e^b,

    m - e^b U / 2 + e^-b L / 2 = k,    U = sum_{i <= m} e^-x_i,    L = sum_{i > m} e^x_i,

whose positive root is (c + sqrt(c^2 + U L)) / U, or L / (sqrt(c^2 + U L) - c), with c = m - k: one for each sign of
c, so that nothing cancels.

**Why nothing overflows.** With hi = ceil(k) and lo = floor(k) + 1 in the sorted order, b is at most log(N / q) above
x_hi or below x_lo, q being the distance of a fractional k from the integers around it. So U is measured from x_hi and L
from x_lo, and what is further off than REACH is as good as infinitely far: clamping it changes the sums by less than
their last digit. For an integer k there may be a gap of any size between the two references; then m = k, c = 0, and b
is the middle of the gap up to log(L / U) / 2.

**Evidence.** Logits of +inf are forced (p = 1), those of -inf forbidden (p = 0); the others share what is left of k.
Where nothing or everything is left, they get 0 or 1 exactly, with the gradients of the limit from inside.

**The gradient.** With d_i = F'(x_i - b) = exp(-|x_i - b|) / 2, D = sum_i d_i and w_i = d_i / D, the condition gives
db = sum_i w_i dx_i - dk / D, so for an upstream u and its mean v = sum_i w_i u_i

    dr_i = d_i (u_i - v) / alpha,    dk = v,    dalpha = -sum_i dr_i (x_i - b).

w is a softmax, finite also where every d_i underflows. The gradient in r sums to 0 over the row, which is why b
does not matter in that of alpha.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitroute._tensors import batchable, nestable, plain, traced, transformed
from circuitroute._validate import as_number
from circuitroute.inference.evidence import rows_text

# By dtype: how far from a reference logits are distinguished, with N e^REACH far from overflow; and from where on F' is
# taken for 0: e^-VANISH is still a normal number, since CPUs take ten times as long for others.
REACH = {torch.float32: 60.0, torch.float64: 300.0}
VANISH = {torch.float32: 86.0, torch.float64: 700.0}


def far(dtype: torch.dtype) -> float:
    """A distance that stands for infinity, with room for sums."""
    return torch.finfo(dtype).max / 8


def soft_topk(logits: Tensor, k: float | Tensor, alpha: float | Tensor) -> Tensor:
    """Soft top-k weights: numbers in [0, 1] that sum to ``k``, the larger the larger the logit.

    Differentiable in all three arguments, any number of times. Values and gradients are finite at any scale.

    Args:
        logits: [..., N], any floating dtype; computed in float32 (float64 for float64). -inf forbids a variable
            (weight 0), +inf forces it (weight 1).
        k: the sum of the weights, a real number from 0 to N; where there is evidence, from the number of forced
            variables to that of those not forbidden. A number, or a tensor that broadcasts to the leading dimensions
            of the logits.
        alpha: the temperature, likewise; positive.

    Returns:
        [..., N] float32, or float64.

    Raises:
        TypeError: logits that are not a floating-point tensor; k or alpha that are neither numbers nor tensors of them.
        ValueError: shapes that do not fit; NaN, a k out of range or an alpha that is not positive, named by row.
            A traced program (torch.compile) checks shapes only.
    """
    wide = _as_logits(logits)
    k_T, alpha_T = _per_row("k", k, wide), _per_row("alpha", alpha, wide)
    if traced(wide, k_T, alpha_T) and not transformed():
        return _traced(wide, k_T, alpha_T)
    weights, _ = _SoftTopK.apply(wide, k_T, alpha_T)  # type: ignore[no-untyped-call]
    result: Tensor = weights
    return result


def laplace_cdf(x: Tensor) -> Tensor:
    """The distribution function of Laplace(0, 1), exactly 0 and 1 from about ``VANISH`` on."""
    vanish = VANISH[x.dtype]
    tail = torch.threshold(x.abs().clamp_(max=vanish).neg_().exp_(), 1.01 * math.exp(-vanish), 0.0).mul_(0.5)
    # tail left of 0 and 1 - tail right of it, without the branch that costs more than all the rest.
    return torch.copysign(tail.new_full((), 0.5), x).add_(0.5).sub_(tail).abs_()


# ---------------------------------------------------------------------------------------------- arguments


def _as_logits(logits: Tensor) -> Tensor:
    logits = plain("logits", logits)
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits have dtype {logits.dtype}: expected a floating-point dtype")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: the last dimension must hold a variable at least")
    return logits if logits.dtype == torch.float64 else logits.float()


def _per_row(name: str, value: float | Tensor, logits: Tensor) -> Tensor:
    """[...] in the dtype of the logits; a number is filled in where they are, without waiting for a GPU."""
    batch = logits.shape[:-1]
    if isinstance(value, Tensor):
        value = plain(name, value)
        if value.dtype == torch.bool or value.dtype.is_complex:
            raise TypeError(f"{name} has dtype {value.dtype}: expected real numbers")
        try:
            return value.to(device=logits.device, dtype=logits.dtype).expand(batch)
        except RuntimeError:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: it must broadcast to the leading dimensions of the logits, "
                f"{tuple(batch)}"
            ) from None
    return logits.new_full((), as_number(name, value)).expand(batch)


def _check_rows(sorted_TN: Tensor, k_T: Tensor, alpha_T: Tensor, forced_T: Tensor, forbidden_T: Tensor) -> None:
    """One look at the values, and on a GPU one wait, unless something is wrong."""
    n = sorted_TN.shape[-1]
    unknown = sorted_TN[..., 0].isnan()  # sorts before everything
    low, high = forced_T, n - forbidden_T
    outside = ~((k_T >= low) & (k_T <= high))
    frozen = ~((alpha_T > 0) & (alpha_T < math.inf))
    if not bool((unknown | outside | frozen).any()):
        return
    if bool(unknown.any()):
        raise ValueError(f"logits hold NaN in {rows_text(unknown)}")
    if bool(frozen.any()):
        raise ValueError(
            f"alpha={_first(alpha_T, frozen)} in {rows_text(frozen)}: the temperature must be positive and finite in "
            f"{sorted_TN.dtype}"
        )
    raise ValueError(
        f"k={_first(k_T, outside)} in {rows_text(outside)}: k must lie between the number of forced logits (+inf) and "
        f"that of those not forbidden (-inf), here {int(_first(low, outside))} and {int(_first(high, outside))}"
    )


def _first(values: Tensor, where: Tensor) -> float:
    return float(values[where][0])


# ---------------------------------------------------------------------------------------------- the threshold


@torch.no_grad()
def _solved(logits_TN: Tensor, k_T: Tensor, alpha_T: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold of checked rows, see :func:`_threshold`; values that cannot be looked at go unchecked."""
    sorted_TN = _sorted(logits_TN.detach())
    forced_T, forbidden_T = _evidence(sorted_TN)
    if not traced(sorted_TN):
        _check_rows(sorted_TN, k_T, alpha_T, forced_T, forbidden_T)
    return _threshold(sorted_TN, k_T, alpha_T, forced_T, forbidden_T)


def _sorted(values: Tensor) -> Tensor:
    """[..., N] from the largest down, NaN first."""
    if values.device.type != "cpu" or traced(values):
        return values.sort(dim=-1, descending=True).values
    # Ten times as fast as torch's, which also keeps the order's indices.
    return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)


def _evidence(sorted_TN: Tensor) -> tuple[Tensor, Tensor]:
    """[T] int64 each: how many logits are +inf, how many are -inf."""
    ends = sorted_TN[..., :: max(1, sorted_TN.shape[-1] - 1)]
    if sorted_TN.device.type == "cpu" and not traced(sorted_TN) and not bool(ends.isinf().any()):
        none = torch.zeros(sorted_TN.shape[:-1], dtype=torch.int64, device="cpu")
        return none, none
    return (sorted_TN == math.inf).sum(-1), (sorted_TN == -math.inf).sum(-1)


def _threshold(
    sorted_TN: Tensor, k_T: Tensor, alpha_T: Tensor, forced_T: Tensor, forbidden_T: Tensor
) -> tuple[Tensor, Tensor]:
    """[..., 1] each: a logit o of every row, and b - o / alpha. The closed form of the module's docstring."""
    n, alpha_T1 = sorted_TN.shape[-1], alpha_T[..., None]
    high_T1, low_T1 = _references(sorted_TN, k_T, forced_T, n - 1 - forbidden_T)
    upper_T1, lower_T1, m_T1 = _sides(sorted_TN, k_T[..., None], alpha_T1, high_T1, low_T1)
    gap_T1 = ((high_T1 - low_T1) / alpha_T1).clamp(max=far(sorted_TN.dtype))
    threshold_T1 = _root(upper_T1, lower_T1, m_T1 - k_T[..., None], gap_T1)
    # With nothing left to share, or everything, b is beyond all of the free ones.
    beyond = 1.25 * VANISH[sorted_TN.dtype]
    threshold_T1 = torch.where((k_T >= n - forbidden_T)[..., None], -beyond, threshold_T1)
    return high_T1, torch.where((k_T <= forced_T)[..., None], beyond, threshold_T1)


def _references(sorted_TN: Tensor, k_T: Tensor, first_T: Tensor, last_T: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 1] each: the logits x_hi and x_lo of the module's docstring, among the free ones, first to last."""
    places_T2 = torch.stack([k_T.ceil().long() - 1, k_T.floor().long()], dim=-1)
    places_T2 = places_T2.clamp(min=first_T[..., None]).clamp(max=last_T[..., None]).clamp(min=0)
    references_T2 = sorted_TN.gather(-1, places_T2)
    # Infinite only where no variable is free, and any number does.
    high_T1, low_T1 = torch.where(references_T2.isinf(), 0.0, references_T2).split(1, dim=-1)
    return high_T1, low_T1


def _sides(
    sorted_TN: Tensor, k_T1: Tensor, alpha_T1: Tensor, high_T1: Tensor, low_T1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[..., 1] each: U measured from x_hi, L measured from x_lo, and m, how many x_i lie above the threshold."""
    n, reach = sorted_TN.shape[-1], REACH[sorted_TN.dtype]
    rising_TN = ((high_T1 - sorted_TN) / alpha_T1).clamp_(-reach, reach).exp_()  # e^-(x - x_hi)
    falling_TN = ((sorted_TN - low_T1) / alpha_T1).clamp_(-reach, reach).exp_()  # e^(x - x_lo)
    upper_TN = rising_TN.cumsum(-1)
    lower_TN = falling_TN.flip(-1).cumsum(-1).flip(-1)
    # Twice the sum of p at b = x_j, which counts x_j among both sides: it grows with j, so m is found by bisection.
    places_N = torch.arange(1, 2 * n, 2, device=sorted_TN.device, dtype=sorted_TN.dtype)
    sums_TN = (lower_TN / falling_TN).sub_(upper_TN / rising_TN).add_(places_N)
    m_T1 = torch.searchsorted(sums_TN, 2 * k_T1.contiguous(), right=True)
    upper_T1 = torch.where(m_T1 > 0, upper_TN.gather(-1, (m_T1 - 1).clamp(min=0)), 0.0)
    lower_T1 = torch.where(m_T1 < n, lower_TN.gather(-1, m_T1.clamp(max=n - 1)), 0.0)
    return upper_T1, lower_T1, m_T1


def _root(upper_T1: Tensor, lower_T1: Tensor, c_T1: Tensor, gap_T1: Tensor) -> Tensor:
    """b - x_hi of the quadratic, with c = m - k and the gap between the references, in the form that c calls for."""
    root_T1 = torch.hypot(c_T1, (upper_T1 * lower_T1).sqrt() * (-0.5 * gap_T1).exp())
    from_above_T1 = (c_T1 + root_T1).log() - upper_T1.log()
    from_below_T1 = lower_T1.log() - (root_T1 - c_T1).log() - gap_T1
    middle_T1 = 0.5 * (lower_T1.log() - upper_T1.log() - gap_T1)
    return torch.where(c_T1 > 0, from_above_T1, torch.where(c_T1 < 0, from_below_T1, middle_T1))


class _SoftTopK(torch.autograd.Function):
    """The weights and the distances x - b from the threshold; the latter so that the derivative has one itself.

    Both modes are written in differentiable operations on the distances. Being an output, they carry the dependence on
    the arguments into the second derivative. With t = (dlogits - (x - b) dalpha) / alpha, and w and D those of
    :func:`_densities`,

        d(x - b) = t - <w, t> + dk / D,    dp = w D (t - <w, t>) + w dk.
    """

    @staticmethod
    def forward(logits_TN: Tensor, k_T: Tensor, alpha_T: Tensor) -> tuple[Tensor, Tensor]:
        distance_TN = _distances(logits_TN, alpha_T, *_solved(logits_TN, k_T, alpha_T))
        return laplace_cdf(distance_TN), distance_TN

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        kept = (output[1], inputs[2])
        ctx.save_for_backward(*kept)
        if transformed():  # only then is it asked for, and results that are kept so keep themselves alive
            ctx.save_for_forward(*kept)

    @staticmethod
    @batchable
    def backward(ctx: Any, to_weights_TN: Tensor | None, to_distance_TN: Tensor | None) -> tuple[Tensor | None, ...]:
        distance_TN, alpha_T = ctx.saved_tensors
        share_TN, total_T1, pinned_T1 = _densities(distance_TN)
        to_logits_TN = to_k_T1 = None
        if to_weights_TN is not None:
            mean_T1 = (share_TN * to_weights_TN).sum(-1, keepdim=True)
            to_logits_TN = share_TN * (to_weights_TN - mean_T1) * total_T1
            to_k_T1 = torch.where(pinned_T1, 0.0, mean_T1)
        if to_distance_TN is not None:
            sum_T1 = to_distance_TN.sum(-1, keepdim=True)
            moves = total_T1 > torch.finfo(total_T1.dtype).tiny
            to_logits_TN = _plus(to_distance_TN - share_TN * sum_T1, to_logits_TN)
            to_k_T1 = _plus(torch.where(moves, sum_T1 / torch.where(moves, total_T1, 1.0), 0.0), to_k_T1)
        if to_logits_TN is None or to_k_T1 is None:
            return None, None, None
        to_logits_TN = to_logits_TN / alpha_T[..., None]
        to_alpha_T = -(to_logits_TN * distance_TN).sum(-1) if ctx.needs_input_grad[2] else None
        return to_logits_TN, to_k_T1[..., 0], to_alpha_T

    @staticmethod
    @nestable
    def jvp(ctx: Any, logits_TN: Tensor | None, k_T: Tensor | None, alpha_T: Tensor | None) -> tuple[Tensor, Tensor]:
        distance_TN, at_alpha_T = ctx.saved_tensors
        share_TN, total_T1, pinned_T1 = _densities(distance_TN)
        moved_TN = torch.zeros_like(distance_TN) if logits_TN is None else logits_TN
        if alpha_T is not None:
            moved_TN = moved_TN - distance_TN * alpha_T[..., None]
        moved_TN = moved_TN / at_alpha_T[..., None]
        moved_TN = moved_TN - (share_TN * moved_TN).sum(-1, keepdim=True)
        weights_TN = share_TN * total_T1 * moved_TN
        if k_T is not None:
            k_T1, moves = k_T[..., None], total_T1 > torch.finfo(total_T1.dtype).tiny
            weights_TN = weights_TN + torch.where(pinned_T1, 0.0, share_TN * k_T1)
            moved_TN = moved_TN + torch.where(moves, k_T1 / torch.where(moves, total_T1, 1.0), 0.0)
        return weights_TN, moved_TN

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        pairs = zip(inputs, in_dims, strict=True)
        batches = [x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs]
        found: tuple[Tensor, Tensor] = _SoftTopK.apply(*batches)  # type: ignore[no-untyped-call]
        return found, (0, 0)


def _distances(logits_TN: Tensor, alpha_T: Tensor, origin_T1: Tensor, threshold_T1: Tensor) -> Tensor:
    """x - b; finite also for forced and forbidden ones, whose gradients are then plain zeros."""
    limit = far(logits_TN.dtype)
    return ((logits_TN - origin_T1) / alpha_T[..., None]).sub_(threshold_T1).clamp_(-limit, limit)


def _densities(distance_TN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w [T, N] and D [T, 1], with d = w D; and [T, 1] bool, where no variable is free and k is what it must be."""
    closeness_TN = -distance_TN.abs()
    share_TN = torch.softmax(closeness_TN, dim=-1)
    # D from the closest one, which spares the exponentials of the others.
    closest_T1 = closeness_TN.amax(-1, keepdim=True)
    total_T1 = 0.5 * closest_T1.exp() / share_TN.amax(-1, keepdim=True)
    return share_TN, total_T1, closest_T1 <= -far(distance_TN.dtype)


def _plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def _traced(logits_TN: Tensor, k_T: Tensor, alpha_T: Tensor) -> Tensor:
    """The same for a compiler, which knows no second derivatives: a constant, and 0 with the gradient."""
    alpha_T1, limit = alpha_T[..., None], far(logits_TN.dtype)
    with torch.no_grad():
        distance_TN = _distances(logits_TN, alpha_T, *_solved(logits_TN, k_T, alpha_T))
        share_TN, total_T1, pinned_T1 = _densities(distance_TN)
        slope_TN = share_TN * total_T1 / alpha_T1
        in_alpha_TN = -slope_TN * (distance_TN - (share_TN * distance_TN).sum(-1, keepdim=True))
        in_k_TN = torch.where(pinned_T1, 0.0, share_TN)
        weights_TN = laplace_cdf(distance_TN)
    bounded_TN = logits_TN.clamp(-limit, limit)
    centred_TN = bounded_TN - (share_TN * bounded_TN).sum(-1, keepdim=True)
    linear_TN = slope_TN * centred_TN + in_k_TN * k_T[..., None] + in_alpha_TN * alpha_T1
    return weights_TN + (linear_TN - linear_TN.detach())
