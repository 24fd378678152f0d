"""The per-token shift that centres the Poisson-binomial polynomials.

Legend: T tokens, N variables.

p(S) does not change when a constant s is subtracted from all logits and s |S| is added back, so every token gets the s
at which independent coins with logits theta - s show about the wanted number of heads. Then all coefficients that
matter are of order one: they neither underflow nor need rescaling.

The equation sum_i sigmoid(theta_i - s) = target is solved by Newton's method on log(F / target), from
s = logsumexp(theta) - log(target), inside a bracket that is found on the way. A rough solution will do: an expected
count within TOLERANCE of the target is enough. s is kept as two floats, because one rounding of s costs exp(theta - s)
its relative accuracy when theta is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 0.45
MAX_STEPS = 60
FIRST_STRIDE = 6.0  # of the walk towards a bracket; strides double
BEYOND = 2.0  # how far beyond the last logit, plus the log of their number, coins are certain enough
LEAST_WANTED = 1e-3  # heads, for a finite first guess
FULL_STEPS = 2  # afterwards only the few unfinished tokens are iterated


@dataclass(frozen=True)
class Shift:
    """The shift of each token, [T], as the unevaluated sum ``high + low``."""

    high: Tensor
    low: Tensor

    def centred(self, logits_NT: Tensor) -> Tensor:
        """theta - s with full relative accuracy; infinite logits stay infinite."""
        return logits_NT.sub(self.high).sub_(self.low)

    def exact(self) -> Tensor:
        """[T] float64."""
        return self.high.double() + self.low.double()

    @staticmethod
    def from_exact(shift_T: Tensor, dtype: torch.dtype) -> Shift:
        """The two floats of a float64 shift."""
        high = shift_T.to(dtype)
        return Shift(high, (shift_T - high.double()).to(dtype))


@dataclass(frozen=True)
class Evidence:
    """What infinite logits say, per token [T]: how many variables are forced and how many are undecided."""

    forced: Tensor
    undecided: Tensor

    @staticmethod
    def of(logits_NT: Tensor) -> Evidence | None:
        """None when every logit is finite."""
        infinite = torch.isinf(logits_NT)
        if not bool(infinite.any()):
            return None
        dtype = logits_NT.dtype
        forced = (logits_NT == math.inf).sum(0).to(dtype)
        return Evidence(forced, (~infinite).sum(0).to(dtype))


def solve_shift(logits_NT: Tensor, evidence: Evidence | None, low_T: Tensor, high_T: Tensor, tilt_T: Tensor) -> Shift:
    """Shifts whose expected count lies in [low, high], as close to ``-tilt`` as that allows.

    Args:
        logits_NT: [N, T], no NaN.
        low_T, high_T: [T] smallest and largest count with any weight.
        tilt_T: [T] the slope of the count potential, which acts like a constant added to all logits.
    """
    top, total, bottom = _extent(logits_NT, evidence)
    n = logits_NT.shape[0]
    forced = torch.zeros_like(top) if evidence is None else evidence.forced
    undecided = torch.full_like(top, n) if evidence is None else evidence.undecided

    expected = torch.sigmoid(logits_NT + tilt_T).sum(0)
    target = torch.minimum(torch.maximum(expected, low_T), high_T)
    natural = (expected >= low_T) & (expected <= high_T)
    wanted = target - forced
    # All undecided variables are out, or all are in: any shift well beyond the last logit will do.
    past = undecided.clamp(min=1).log() + BEYOND
    none_in, all_in = wanted <= 0, wanted >= undecided
    start = (total / wanted.clamp(min=LEAST_WANTED)).log()
    start = torch.where(none_in, past, torch.where(all_in, bottom - top - past, start))
    start = torch.where(natural, -tilt_T - top, start)
    s = _newton(logits_NT, top, start, target, natural | none_in | all_in)
    return _two_floats(top, s)


def _extent(logits_NT: Tensor, evidence: Evidence | None) -> tuple[Tensor, Tensor, Tensor]:
    """Largest and smallest finite logit, and sum of exp(theta - largest), per token."""
    if evidence is None:
        top, bottom = logits_NT.amax(0), logits_NT.amin(0)
        return top, (logits_NT - top).exp_().sum(0), bottom
    infinite = torch.isinf(logits_NT)
    top = logits_NT.masked_fill(infinite, -math.inf).amax(0)
    bottom = logits_NT.masked_fill(infinite, math.inf).amin(0)
    top = torch.where(torch.isinf(top), 0.0, top)
    bottom = torch.where(torch.isinf(bottom), 0.0, bottom)
    total = (logits_NT - top).exp_().masked_fill_(infinite, 0.0).sum(0)
    return top, total, bottom


def _two_floats(top: Tensor, s: Tensor) -> Shift:
    high = top + s
    return Shift(high, s - (high - top))


@dataclass
class _Search:
    """Newton's state for some tokens: the iterate, its bracket, and how far to walk while it is open."""

    s: Tensor
    low: Tensor
    high: Tensor
    stride: Tensor

    def step(self, F: Tensor, V: Tensor, target: Tensor) -> None:
        """One safeguarded Newton step from the expected count F and its variance V at ``s``."""
        above = target < F
        self.low = torch.where(above, self.s, self.low)
        self.high = torch.where(above, self.high, self.s)
        newton = self.s + (F / target).log() * F / V
        # No lower (upper) bound yet: walk down (up) by doubling strides instead of bisecting.
        bisect = 0.5 * (self.low + self.high)
        bisect = torch.where(torch.isinf(self.low), self.s - self.stride, bisect)
        bisect = torch.where(torch.isinf(self.high), self.s + self.stride, bisect)
        inside = (newton > self.low) & (newton < self.high) & ((newton - self.s).abs() < self.stride)
        self.s = torch.where(inside, newton, bisect)
        self.stride = self.stride * 2

    def pick(self, columns: Tensor) -> _Search:
        return _Search(self.s[columns], self.low[columns], self.high[columns], self.stride[columns])


def _newton(logits_NT: Tensor, top: Tensor, start: Tensor, target: Tensor, done: Tensor) -> Tensor:
    """Iterate each token until its expected count is within TOLERANCE; finished tokens never move again."""
    s = start.clone()
    columns: Tensor | None = None
    search = _Search(s, torch.full_like(s, -math.inf), torch.full_like(s, math.inf), torch.full_like(s, FIRST_STRIDE))
    for iteration in range(MAX_STEPS):
        if iteration == FULL_STEPS or columns is not None:
            keep = (~done).nonzero().squeeze(1)
            columns = keep if columns is None else columns[keep]
            logits_NT, top, target, done = logits_NT[:, keep], top[keep], target[keep], done[keep]
            search = search.pick(keep)
        if bool(done.all()):
            break
        P = torch.sigmoid(_two_floats(top, search.s).centred(logits_NT))
        F = P.sum(0)
        V = F - P.square_().sum(0)
        done = done | ((F - target).abs() <= TOLERANCE)
        before = search.s
        search.step(F, V, target)
        search.s = torch.where(done, before, search.s)
        if columns is None:
            s = search.s
        else:
            s[columns] = search.s
    return s
