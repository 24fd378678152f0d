"""The bias at which the mean exact marginals of a batch are a target: a convex problem, by Newton's method.

Legend: T tokens, E experts; theta_t [E] a token's logits, s its temperature, b [E] the bias, m_t the exact marginals of
(theta_t + b) / s, C_t = Cov(z) their covariance, q [E] the target.

    F(b) = mean_t s log Z((theta_t + b) / s) - <b, q>,    grad F = mean_t m_t - q,    grad^2 F = mean_t C_t / s.

F is convex, so a b with grad F = 0 is a minimum, and there is one for every q in the interior of the polytope of
marginals (relative to its affine hull); for no other. Along directions v in which <v, z> is the same for every allowed
subset, such as all ones for exactly k experts, or the ones of a group that always has as many, F is linear: q must
agree with it there, and b is not determined; what is returned has no part along them, and so the smallest norm.

A step of Newton solves with the exact second derivative: up to ``DENSE`` experts as a matrix, of E products C u, and
beyond by conjugate gradients, preconditioned by its diagonal mean_t m_t (1 - m_t) / s, in as many products as it takes.
A product is one sweep in forward mode, so that memory is that of a sweep over ``CHUNK`` numbers. Line search looks at
the slope alone, which near the minimum is known better than F. All of it in float64.

Over processes, sums of marginals and of products are added up, once each; every process then takes the same steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute.circuit import Compiled
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.routing.control import summed

DENSE = 32  # experts, up to which the second derivative is a matrix
CHUNK = 1 << 21  # tokens times experts of one sweep
COLD = 20.0  # spread of the logits, in units of the temperature, beyond which a solution is approached from warmer ones
COOLING = 4.0  # by how much at once
NEAR = 0.02  # what may be missing for a bias to be near enough
SETTLED = 0.1  # a step, in units of the temperature, after which convergence is quadratic
SLOPE = 0.25  # of the slope before, that may be left after a line search beyond the minimum
SLOW = 0.9  # and short of it
TRIES = 60  # of a line search
LINGERING = 6  # steps that are not settled although nothing is missing: the bias runs away


class Part(NamedTuple):
    """Tokens of one distribution.

    Attributes:
        circuit: over E experts.
        base: [T, E] float64, what the bias is added to.
        temperature: a number, or [T, 1] float64.
        potential: the count potential, None, [J] or [T, J].
    """

    circuit: Compiled
    base: Tensor
    temperature: float | Tensor
    potential: Tensor | None

    def rows(self, start: int, stop: int) -> Part:
        """Some of the tokens."""
        temperature, potential = self.temperature, self.potential
        return Part(
            self.circuit,
            self.base[start:stop],
            temperature[start:stop] if isinstance(temperature, Tensor) else temperature,
            potential[start:stop] if potential is not None and potential.dim() > 1 else potential,
        )

    def marginals(self, tempered: Tensor) -> Tensor:
        """[T, E] of logits that are divided already."""
        return SubsetDistribution(self.circuit, tempered, self.potential, validate_args=False).marginals


class Solution(NamedTuple):
    """Where Newton ended.

    Attributes:
        bias: [E] float64.
        missing: [E], target - mean marginals there.
        settled: whether that is all of the target, to the tolerance, and the last step was small.
    """

    bias: Tensor
    missing: Tensor
    settled: bool


class System:
    """The mean marginals of a batch as a function of a bias, and their derivative.

    Args:
        parts: the tokens of this process.
        experts: E.
        group: processes whose tokens count together.
    """

    def __init__(
        self, parts: Sequence[Part], experts: int, group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        rows = max(1, CHUNK // max(1, experts))
        self.parts = [part.rows(start, start + rows) for part in parts for start in range(0, len(part.base), rows)]
        self.experts, self.group, self.device = experts, group, device
        count = torch.tensor(float(sum(len(part.base) for part in self.parts)), dtype=torch.float64, device=device)
        self.tokens = int(summed(count, group))

    def heated(self, heat: float) -> System:
        """The same tokens, all temperatures multiplied; nothing is exchanged."""
        other = copy.copy(self)
        other.parts = [part._replace(temperature=part.temperature * heat) for part in self.parts]
        return other

    def mean(self, bias: Tensor) -> Tensor:
        """[E] float64."""
        total = torch.zeros(self.experts, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for part in self.parts:
                total += part.marginals((part.base + bias) / part.temperature).sum(0)
        return summed(total, self.group) / self.tokens

    def diagonal(self, bias: Tensor) -> Tensor:
        """[E] of the second derivative."""
        total = torch.zeros(self.experts, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for part in self.parts:
                m = part.marginals((part.base + bias) / part.temperature)
                total += (m * (1 - m) / part.temperature).sum(0)
        return summed(total, self.group) / self.tokens

    def products(self, bias: Tensor) -> Callable[[Tensor], Tensor]:
        """[E] -> [E], the second derivative at a bias times a vector; over the processes, with each call."""
        own = self._own_products(bias)
        return lambda u: summed(own(u), self.group) / self.tokens

    def matrix(self, bias: Tensor) -> Tensor:
        """[E, E], the second derivative."""
        own = self._own_products(bias)
        unit = torch.eye(self.experts, dtype=torch.float64, device=self.device)
        found = summed(torch.stack([own(u) for u in unit]), self.group) / self.tokens
        return (found + found.t()) / 2

    def _own_products(self, bias: Tensor) -> Callable[[Tensor], Tensor]:
        """The sum over the tokens of this process alone. One chunk is swept once; several anew for each product, so
        that no more than one is in memory."""
        kept = [_graph(part, bias) for part in self.parts] if len(self.parts) == 1 else None

        def product(u: Tensor) -> Tensor:
            total = torch.zeros(self.experts, dtype=torch.float64, device=self.device)
            for i, part in enumerate(self.parts):
                x, m = _graph(part, bias) if kept is None else kept[i]
                with torch.inference_mode(False):
                    (along,) = torch.autograd.grad(m, x, u.expand_as(m).clone(), retain_graph=kept is not None)
                total += (along / part.temperature).sum(0)
            return total

        return product


def _graph(part: Part, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Tempered logits and their marginals, as a function of them; also where the caller records nothing."""
    with torch.inference_mode(False), torch.enable_grad():
        x = ((part.base + bias) / part.temperature).detach().clone().requires_grad_()
        return x, part.marginals(x)


def approached(
    system: System, target: Tensor, start: Tensor, fixed: Tensor, *, warmest: float, coldest: float, spread: float
) -> Tensor:
    """[E] a bias near the solution, from which Newton arrives: the start, or from it through warmer distributions.

    In the cold marginals are steps of the bias, with slopes that Newton can do little with: so temperatures begin
    where they are comparable to the spread of the logits and are lowered by a factor at a time.
    """
    if spread <= COLD * coldest or float((target - system.mean(start)).abs().max()) <= NEAR:
        return start
    bias, heat = start, spread / COLD / warmest
    while heat > 1:
        found = solve(
            system.heated(heat),
            target,
            bias,
            fixed,
            warmth=coldest * heat,
            span=spread + 50 * warmest * heat,
            tolerance=NEAR / COOLING,
            steps=10,
            impossible=lambda _: False,
        )
        bias, heat = found.bias, heat / COOLING
    return bias


def solve(
    system: System,
    target: Tensor,
    start: Tensor,
    fixed: Tensor,
    *,
    warmth: float,
    span: float,
    tolerance: float,
    steps: int,
    impossible: Callable[[Tensor], bool],
) -> Solution:
    """Newton from a bias.

    Args:
        system: the batch.
        target: [E] float64, in agreement with what is fixed.
        start: [E].
        fixed: [E, r], an orthonormal basis of the directions along which nothing depends on the bias.
        warmth: the lowest temperature, in units of which steps are settled.
        span: no entry of a step is larger.
        tolerance: of the largest entry of target - mean marginals.
        steps: how many at most.
        impossible: whether a bias proves that there is none: see :func:`circuitroute.routing.bias.targets.proof`.
    """
    bias = start - fixed @ (fixed.t() @ start)
    missing = target - system.mean(bias)
    size, lingering = math.inf, 0
    for _ in range(steps):
        arrived = float(missing.abs().max()) <= tolerance
        if arrived and size <= SETTLED * warmth:
            return Solution(bias, missing, True)
        step = _newton_step(system, bias, missing, fixed)
        longest = float(step.abs().max())
        if arrived and longest <= SETTLED * warmth:
            return Solution(bias, missing, True)
        lingering += arrived
        if lingering > LINGERING or longest == 0 or impossible(bias):
            break
        step = step * min(1.0, span / longest)
        taken, missing = _line_search(system, target, bias, step, missing)
        bias, size = bias + taken * step, taken * float(step.abs().max())
    arrived = float(missing.abs().max()) <= tolerance
    return Solution(bias, missing, arrived and size <= SETTLED * warmth)


def _newton_step(system: System, bias: Tensor, missing: Tensor, fixed: Tensor) -> Tensor:
    """[E] the solution of (second derivative) step = missing, without a part along what is fixed."""
    missing = missing - fixed @ (fixed.t() @ missing)
    if system.experts > DENSE:
        return _conjugate_gradients(system, bias, missing, fixed)
    curvature, directions = torch.linalg.eigh(system.matrix(bias))
    along = directions.t() @ missing
    # What rounding leaves along flat directions is no reason to go there.
    along = torch.where(along.abs() > 1e-15, along, 0.0)
    least = max(float(curvature[-1]) * 1e-14, 1e-300)
    step: Tensor = directions @ (along / curvature.clamp(min=least))
    return step - fixed @ (fixed.t() @ step)


def _conjugate_gradients(system: System, bias: Tensor, missing: Tensor, fixed: Tensor) -> Tensor:
    """The same, as far as a step is worth: to the square of what is missing, so that convergence stays quadratic."""
    product, diagonal = system.products(bias), system.diagonal(bias)
    weight = 1 / diagonal.clamp(min=max(float(diagonal.max()) * 1e-12, 1e-300))

    def preconditioned(r: Tensor) -> Tensor:
        scaled = weight * r
        return scaled - fixed @ (fixed.t() @ scaled)

    step, rest = torch.zeros_like(missing), missing.clone()
    z = preconditioned(rest)
    direction, energy = z, float(rest @ z)
    norm = float(missing.norm())
    enough = norm * min(0.1, norm)
    for _ in range(2 * system.experts):
        if float(rest.norm()) <= enough or energy <= 0:
            break
        image = product(direction)
        curvature = float(direction @ image)
        if curvature <= 0:  # by rounding: flat, as far as can be told
            break
        taken = energy / curvature
        step, rest = step + taken * direction, rest - taken * image
        z = preconditioned(rest)
        energy, before = float(rest @ z), energy
        direction = z + (energy / before) * direction
    return step if float(step.abs().max()) > 0 else preconditioned(missing)


def _line_search(system: System, target: Tensor, bias: Tensor, step: Tensor, missing: Tensor) -> tuple[float, Tensor]:
    """How much of a step to take, and what is missing there. The slope along it only rises, from below 0; where it is
    0 is the least value."""
    slope = -float(missing @ step)
    low, high, taken = 0.0, math.inf, 1.0
    there = missing
    for _ in range(TRIES):
        there = target - system.mean(bias + taken * step)
        now = -float(there @ step)
        if slope >= 0 or SLOW * slope <= now <= -SLOPE * slope:
            break
        if now > 0:
            high = taken
            taken = max(0.1 * taken, low + (high - low) * max(0.1, min(0.9, slope / (slope - now))))
            taken = taken if low < taken < high else (low + high) / 2
        else:
            low = taken
            taken = 2 * taken if high == math.inf else (low + high) / 2
    return taken, there
