"""Newton's method for many small convex problems at once: logits whose exact marginals are given.

Legend: T rows, N variables; theta [T, N] logits, t targets, m(theta) marginals, C(theta) = Cov(z) their derivative.

    F(theta) = log Z(theta) - <theta, t>,    grad F = m(theta) - t,    grad^2 F = C(theta).

Every row is a problem of its own, convex, with a minimum exactly where the target is in the relative interior of the
polytope of marginals. Along fixed directions F does not change; theta has no part along them.

Steps solve C x = r exactly as a matrix for small circuits that are not of counts, and otherwise by preconditioned
conjugate gradients, whose products C u are sweeps over all rows at once. For a count constraint the preconditioner is
the covariance of independent coins, D = diag(m (1 - m)), corrected to the right variance V of the count:

    P = D + (V - s) d d' / s^2,    d = m (1 - m), s = sum d,    P^-1 r = r / d - (V - s) / (s V) <1, r> 1.

For exactly k, V = 0: D - d d' / s, the approximation of Hajek (1964), to which C tends as the design grows; so a few
products do. Line search looks at the slope alone, which near the minimum is known better than F. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from circuitroute.deadline import tick
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.statistics.targets import Targets

DENSE = 64  # variables, up to which the covariance of a circuit that is not of counts is a matrix
CHUNK = 1 << 22  # numbers of the covariances that are made at once
STEPS = 200  # of Newton
RESIDUAL = 1e-10  # the largest |m - t| of a solution
SETTLED = 1e-9  # a step after which nothing moves
NOISE = 1e-3  # steps of rounding alone, which do not grow smaller any more
LINGERING = 12  # steps that are not settled although nothing is missing: the logits run away
FAR = 25.0  # logits beyond which a row is asked whether it can arrive at all
SPAN = 50.0  # no entry of a step is larger
SLOPE = 0.25  # of the slope before, that may be left after a line search beyond the minimum
SLOW = 0.9  # and short of it
TRIES = 60  # of a line search
LONGEST = 8.0  # steps that it takes at once
TIGHT = 1e-15  # of the energy of a residual, that is left of a linear system


def solve(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """([T, N] finite logits without evidence, [T, N] what is missing, [T] bool settled)."""
    theta = targets.project(targets.target.clamp(1e-300, 1 - 1e-16).logit())
    missing = _missing(targets, theta)
    settled = torch.zeros(len(theta), dtype=torch.bool, device=theta.device)
    size = torch.full((len(theta),), math.inf, dtype=theta.dtype, device=theta.device)
    lingering = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
    for _ in range(STEPS):
        rows = (~settled & (lingering <= LINGERING)).nonzero().squeeze(1)
        if not len(rows):
            break
        tick(1000)
        part, x, r = targets.at(rows), theta[rows], missing[rows]
        step = _newton_step(part, x, r)
        step = step * (SPAN / step.abs().amax(-1, keepdim=True).clamp(min=SPAN))
        taken, r = _line_search(part, x, step, r)
        theta[rows], missing[rows] = x + taken * step, r
        length = (taken * step).abs().amax(-1)
        arrived = r.abs().amax(-1) <= RESIDUAL
        settled[rows] = arrived & ((length <= SETTLED) | ((length <= NOISE) & (length > 0.25 * size[rows])))
        lingering[rows] += arrived.long()
        lingering[rows] += LINGERING * _impossible(part, theta[rows]).long() * 2
        size[rows] = length
    return theta, missing, settled


def _impossible(targets: Targets, theta: Tensor) -> Tensor:
    """[T] bool, whether logits prove that no distribution has the target: <theta, t> is more than any subset has."""
    proved = torch.zeros(len(theta), dtype=torch.bool, device=theta.device)
    rows = (theta.abs().amax(-1) > FAR).nonzero().squeeze(1)
    if len(rows):
        x, part = theta[rows], targets.at(rows)
        best = distribution(part, x).mode_mask().double()
        gain = torch.where(part.moving, x * (part.target - best), 0.0).sum(-1)
        proved[rows] = gain > 1e-9 * x.abs().sum(-1)
    return proved


def pseudo_solve(targets: Targets, theta: Tensor, upstream: Tensor) -> Tensor:
    """[T, N] C(theta)^+ u: the solution of C x = u without a part along what is fixed, as far as rounding goes."""
    return _linear(targets, theta, targets.project(upstream), lambda energy: TIGHT**2 * energy)


def distribution(targets: Targets, theta: Tensor) -> SubsetDistribution:
    """Of finite logits, with the evidence that the targets of 0 and 1 are."""
    return SubsetDistribution(targets.circuit, theta + targets.row, validate_args=False)


def _missing(targets: Targets, theta: Tensor) -> Tensor:
    """[T, N] target - marginals, 0 where logits do nothing."""
    with torch.no_grad():
        return torch.where(targets.moving, targets.target - distribution(targets, theta).marginals, 0.0)


def _newton_step(targets: Targets, theta: Tensor, missing: Tensor) -> Tensor:
    """The solution of C x = missing; as far as a step is worth, so that convergence stays quadratic."""
    return _linear(targets, theta, targets.project(missing), lambda energy: energy * energy.clamp(max=0.01))


def _linear(targets: Targets, theta: Tensor, r: Tensor, enough: Callable[[Tensor], Tensor]) -> Tensor:
    if targets.basis is not None and theta.shape[-1] <= DENSE:
        rows = max(1, CHUNK // theta.shape[-1] ** 2)
        parts = [slice(start, start + rows) for start in range(0, len(theta), rows)]
        every = torch.arange(len(theta), device=theta.device)
        return torch.cat([_dense(targets.at(every[part]), theta[part], r[part]) for part in parts])
    return _conjugate_gradients(targets, theta, r, enough)


def _dense(targets: Targets, theta: Tensor, r: Tensor) -> Tensor:
    """By the eigenvectors of the matrix of correlations, without those that are fixed."""
    with torch.no_grad():
        found = distribution(targets, theta)
        covariance, scale = found.covariance_matrix, _inverse_variances(targets, found.marginals).sqrt()
    correlation = covariance * scale[:, :, None] * scale[:, None, :]
    # As marginals have it, to more digits than the second derivative.
    correlation.diagonal(dim1=-2, dim2=-1).copy_(targets.moving)
    values, vectors = torch.linalg.eigh((correlation + correlation.mT) / 2)
    along = (vectors.mT @ (scale * r)[..., None])[..., 0]
    dead = 0 if targets.basis is None else targets.basis.shape[1]
    live = torch.arange(theta.shape[-1], device=theta.device) >= dead
    least = values[:, -1:].clamp(min=1e-300) * 1e-15
    along = torch.where(live, along / torch.maximum(values, least), 0.0)
    x = targets.project(scale * (vectors @ along[..., None])[..., 0])
    return _or_else(x, r, targets.project(scale**2 * r))


def _conjugate_gradients(targets: Targets, theta: Tensor, r: Tensor, enough: Callable[[Tensor], Tensor]) -> Tensor:
    """For all rows at once; those that are done wait."""
    product, preconditioned = _operators(targets, theta)
    x, start = torch.zeros_like(r), r
    z = first = preconditioned(r)
    direction, energy = z, (r * z).sum(-1, keepdim=True)
    goal = enough(energy)
    best = energy
    for _ in range(2 * theta.shape[-1] + 10):
        tick(1000)
        going = (energy > goal) & (energy > 0)
        if not bool(going.any()):
            break
        image = product(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        going = going & (curvature > 0)  # else flat, as far as rounding can tell
        taken = torch.where(going, energy / torch.where(going, curvature, 1.0), 0.0)
        x, r = x + taken * direction, r - taken * image
        z = preconditioned(r)
        now = (r * z).sum(-1, keepdim=True)
        direction = z + torch.where(going, now / torch.where(going, energy, 1.0), 0.0) * direction
        # Rounding has the last word: what does not fall any more is as small as it gets.
        energy = torch.where(going, now, 0.0)
        best = torch.minimum(best, torch.where(energy > 0, energy, best))
        energy = torch.where(energy > 1e6 * best, 0.0, energy)
    return _or_else(targets.project(x), start, first)


def _inverse_variances(targets: Targets, m: Tensor) -> Tensor:
    """[T, N] 1 / (m (1 - m)), 0 where logits do nothing. Next to 1 a marginal is known to its last bit only."""
    return torch.where(targets.moving, 1 / (m.clamp(min=1e-290) * (1 - m).clamp(min=1e-17)), 0.0)


def _or_else(x: Tensor, r: Tensor, other: Tensor) -> Tensor:
    """A step, if it goes down. Where products are rounding alone it need not; the preconditioner knows the way then,
    and line search how far."""
    return torch.where((x * r).sum(-1, keepdim=True) > 0, x, other)


def _operators(targets: Targets, theta: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The product with C, and the inverse of its preconditioner."""
    with torch.inference_mode(False), torch.enable_grad():
        logits = theta.detach().clone().requires_grad_()
        found = distribution(targets, logits)
        m = found.marginals
    moving = targets.moving
    with torch.no_grad():
        inverse = _inverse_variances(targets, m)
        d = torch.where(moving, 1 / torch.where(moving, inverse, 1.0), 0.0)
        shift = torch.zeros_like(d[:, :1])
        if targets.basis is None:
            count = torch.arange(found.circuit.max_count + 1, dtype=d.dtype, device=d.device)
            q, s = found.count_probs.detach(), d.sum(-1, keepdim=True).clamp(min=1e-300)
            mean = (q * count).sum(-1, keepdim=True)
            variance = (q * (count - mean) ** 2).sum(-1, keepdim=True)
            known = ~targets.single[:, None] & (variance > 0)
            shift = torch.where(known, (variance - s) / (s * torch.where(known, variance, 1.0)), 0.0)

    def product(u: Tensor) -> Tensor:
        with torch.inference_mode(False):
            (along,) = torch.autograd.grad(m, logits, u.clone(), retain_graph=True)
        return targets.project(along) if targets.basis is not None else torch.where(moving, along, 0.0)

    def preconditioned(r: Tensor) -> Tensor:
        return targets.project(inverse * r - shift * r.sum(-1, keepdim=True))

    return product, preconditioned


def _line_search(targets: Targets, theta: Tensor, step: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """[T, 1] how much of each step to take, and what is missing there.

    The slope along a step only rises, from below 0; where it is 0 is the least value.
    """
    slope = -(missing * step).sum(-1)
    taken, low = torch.ones_like(slope), torch.zeros_like(slope)
    high = torch.full_like(slope, math.inf)
    there = missing.clone()
    rows = torch.arange(len(theta), device=theta.device)
    for _ in range(TRIES):
        part = targets.at(rows)
        there[rows] = _missing(part, theta[rows] + taken[rows, None] * step[rows])
        now = -(there[rows] * step[rows]).sum(-1)
        was, t = slope[rows], taken[rows]
        wrong = (was < 0) & ~((SLOW * was <= now) & (now <= -SLOPE * was))
        # Where rounding is all that is left, any step will do.
        wrong = wrong & (was < -1e-28)
        if not bool(wrong.any()):
            break
        beyond = now > 0
        lo, hi = torch.where(beyond, low[rows], t), torch.where(beyond, t, high[rows])
        guess = lo + (hi - lo) * (was / (was - now)).clamp(0.1, 0.9)
        inside = torch.where((guess > lo) & (guess < hi), guess, (lo + hi) / 2)
        further = torch.where(hi.isinf(), 2 * t, (lo + hi) / 2)
        new = torch.where(beyond, torch.maximum(inside, 0.1 * t), further)
        low[rows], high[rows] = torch.where(wrong, lo, low[rows]), torch.where(wrong, hi, high[rows])
        wrong = wrong & (new <= LONGEST)
        taken[rows] = torch.where(wrong, new, t)
        rows = rows[wrong]
        tick(1000)
    return taken[:, None], there
