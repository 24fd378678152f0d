"""The Poisson binomial distribution: how many of N independent coins with probabilities of their own come up.

Legend: T rows (all leading dimensions), N coins; L the log-probabilities of the counts 0..N.

The law of |S| where S is an unconstrained random subset: its tails are the partition functions of count constraints,
P(count in C) = Z of ``CountIn(C)`` / prod (1 + e^theta).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from circuitroute._tensors import batched, traced, transformed, without_autocast
from circuitroute._validate import as_real
from circuitroute.inference.distribution import validating
from circuitroute.inference.evidence import rows_text
from circuitroute.keys import sample_keys, uniform
from circuitroute.statistics.law import Given, log_pmf

HALF = math.log(0.5)
BELOW_ONE = 1 - 2.0**-53


class PoissonBinomial(Distribution):
    """The number of successes of N independent trials with probabilities of their own.

    Every log-probability and both tails have the relative precision of float64, down to 1e-300 and far beyond in log
    space, for N up to 10^5: the time is O(N^1.5) (:mod:`circuitroute.statistics.convolution`). All of it is computed in
    float64, once, when it is first asked for.

    Args:
        logits: [..., N] log-odds of the trials, any floating dtype; -inf never succeeds, +inf always does.
        probs: [..., N] their probabilities, in place of logits; 0 and 1 are allowed. Give exactly one of the two.
        validate_args: whether to check values (torch's default when None). Without it rows with NaN give NaN.

    Results are float32, or float64 for float64. Counts are numbers of that dtype; values are counts 0..N, and
    broadcast with the batch [...].

    Raises:
        TypeError: what is given is not a floating-point tensor.
        ValueError: both or none of logits and probs; no last dimension; when validating, NaN or probabilities outside
            [0, 1], named by row.
    """

    arg_constraints = {  # noqa: RUF012 - torch's own spelling
        "logits": constraints.independent(constraints.real, 1),
        "probs": constraints.independent(constraints.unit_interval, 1),
    }
    has_enumerate_support = True

    def __init__(
        self, logits: Tensor | None = None, probs: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        if (logits is None) == (probs is None):
            found = "neither" if logits is None else "both"
            raise ValueError(
                f"PoissonBinomial takes exactly one of logits and probs, and got {found}: give one tensor [..., N]"
            )
        self._given: Given = "logits" if probs is None else "probs"
        self._parameter = _as_parameter(self._given, probs if logits is None else logits)
        checked = validating(validate_args, self._parameter)
        if checked:
            _check(self._given, self._parameter)
        self._cached: Tensor | None = None
        super().__init__(self._parameter.shape[:-1], Size(), validate_args=False)
        self._validate_args = checked

    # ------------------------------------------------------------------ parameters

    @property
    def num_trials(self) -> int:
        """N."""
        return self._parameter.shape[-1]

    @property
    def logits(self) -> Tensor:
        """[..., N] log-odds of the trials."""
        if self._given == "logits":
            return self._parameter
        return self._parameter.log() - (-self._parameter).log1p()

    @property
    def probs(self) -> Tensor:
        """[..., N] probabilities of the trials."""
        return self._parameter if self._given == "probs" else self._parameter.sigmoid()

    @property
    def param_shape(self) -> Size:
        """The shape of logits and probs."""
        return self._parameter.shape

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The integers 0..N."""
        return constraints.integer_interval(0, self.num_trials)

    # ------------------------------------------------------------------ moments

    @property
    def mean(self) -> Tensor:
        """[...] the sum of p."""
        return self._sum(lambda p, q: p)

    @property
    def variance(self) -> Tensor:
        """[...] the sum of p (1 - p)."""
        return self._sum(lambda p, q: p * q)

    def _sum(self, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = self._parameter.double()
        p, q = (x.sigmoid(), (-x).sigmoid()) if self._given == "logits" else (x, 1 - x)
        return term(p, q).sum(-1).to(self._parameter.dtype)

    @property
    def mode(self) -> Tensor:
        """[...] a most probable count, the smaller of two; within one of the mean (Darroch 1964)."""
        log_probs = self._log_pmf()
        found = log_probs.detach().argmax(-1).to(self._parameter.dtype)
        return torch.where(log_probs[..., 0].isnan(), math.nan, found)

    def entropy(self) -> Tensor:
        """[...] -sum of P log P, in nats. Differentiable."""
        log_probs = self._log_pmf()
        bounded = torch.where(log_probs == -math.inf, 0.0, log_probs)
        return -(log_probs.exp() * bounded).sum(-1).to(self._parameter.dtype)

    # ------------------------------------------------------------------ the law

    def log_pmf(self) -> Tensor:
        """[..., N + 1] the log-probabilities of the counts 0..N; -inf where a count is impossible. Differentiable."""
        return self._log_pmf().to(self._parameter.dtype)

    def pmf(self) -> Tensor:
        """[..., N + 1] the probabilities of the counts 0..N. Differentiable."""
        return self._log_pmf().exp().to(self._parameter.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """[...] the log-probability of counts. Differentiable in logits or probs, twice.

        Raises:
            ValueError: a shape that does not broadcast with the batch; when validating, values that are not counts.
        """
        value = self._as_value(value, counts=True)
        inside = (value >= 0) & (value <= self.num_trials) & (value == value.floor())
        found = self._at(self._log_pmf(), torch.where(inside, value, 0.0))
        return self._result(torch.where(inside, found, -math.inf), value)

    def log_cdf(self, value: Tensor) -> Tensor:
        """[...] log P(count <= value), of any real value. Differentiable."""
        return self._result(*self._log_tail(value, upper=False))

    def log_survival(self, value: Tensor) -> Tensor:
        """[...] log P(count > value), of any real value: right where the cdf is 1 to the last digit. Differentiable."""
        return self._result(*self._log_tail(value, upper=True))

    def cdf(self, value: Tensor) -> Tensor:
        """[...] P(count <= value)."""
        found, value = self._log_tail(value, upper=False)
        return self._result(found.exp(), value)

    def survival(self, value: Tensor) -> Tensor:
        """[...] P(count > value)."""
        found, value = self._log_tail(value, upper=True)
        return self._result(found.exp(), value)

    def icdf(self, value: Tensor) -> Tensor:
        """[...] quantiles: the smallest count whose :meth:`cdf` is at least ``value``.

        0 and 1 give the smallest and the largest count that is possible. ``icdf(cdf(k))`` is k, in float32 too, where
        the cdf still grows at k.

        Raises:
            ValueError: a shape that does not broadcast with the batch; when validating, values outside [0, 1], or NaN.
        """
        value = self._as_value(value, counts=False)
        outside = ~((value >= 0) & (value <= 1))
        if validating(self._validate_args, value) and bool(outside.any()):
            raise ValueError(
                f"value={float(value[outside][0])} in {rows_text(outside)}: quantiles are of numbers in [0, 1]"
            )
        with torch.no_grad():
            possible = self._log_pmf() > -math.inf
            first = possible.long().argmax(-1)
            last = self.num_trials - possible.flip(-1).long().argmax(-1)
            # As `cdf` gives it: rounded up, it would otherwise be above the very count that it is of.
            cdf = self._cdf().to(self._parameter.dtype).to(value.dtype)
            found = torch.minimum(torch.maximum(_search(cdf, value), first), last)
            found = torch.where(value == 1, last, found).to(torch.float64)
        return self._result(torch.where(outside, math.nan, found), value)

    def quantile(self, value: Tensor) -> Tensor:
        """:meth:`icdf`."""
        return self.icdf(value)

    # ------------------------------------------------------------------ samples

    def sample(self, sample_shape: Iterable[int] = (), key: Tensor | int | None = None) -> Tensor:
        """[*sample_shape, ...] counts, by inversion.

        Args:
            sample_shape: leading dimensions of independent samples.
            key: int64, broadcastable to sample_shape + batch. A sample is a pure function of (row, key row); see
                :func:`circuitroute.random_key`. A key without the sample dimensions is mixed with the sample's index.
                None draws keys from torch's global generator.
        """
        shape = Size(sample_shape)
        with torch.no_grad():
            keys = sample_keys(key, shape, self._batch_shape, self._parameter.device)
            # 64 bits of a key: the first 32, and what is between.
            words = uniform(keys, 0, 2, torch.float64)
            u = (words[0] + (words[1] - 0.5) * 2.0**-32).clamp(max=BELOW_ONE).reshape(shape + self._batch_shape)
            found = _search(self._cdf(), u).to(torch.float64)
        return self._result(found, u)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """[N + 1, ...] the counts 0..N."""
        counts = torch.arange(self.num_trials + 1, dtype=self._parameter.dtype, device=self._parameter.device)
        counts = counts.reshape((-1,) + (1,) * len(self._batch_shape))
        return counts.expand(-1, *self._batch_shape) if expand else counts

    def expand(self, batch_shape: Iterable[int], _instance: Any = None) -> PoissonBinomial:
        """The same distribution with a larger batch shape, sharing memory."""
        parameter = self._parameter.expand(*Size(batch_shape), self.num_trials)
        new = type(self)(**{self._given: parameter}, validate_args=False)
        if self._cached is not None:
            new._cached = self._cached.expand(*Size(batch_shape), self.num_trials + 1)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        return f"PoissonBinomial({self._given}: {tuple(self._parameter.shape)})"

    # ------------------------------------------------------------------ parts

    def _log_pmf(self) -> Tensor:
        """[..., N + 1] float64; computed once, and again where gradients were not recorded before and now are."""
        x = self._parameter
        lasting = not (traced(x) or batched() or transformed())
        tracked = torch.is_grad_enabled() and x.requires_grad
        if lasting and self._cached is not None and (self._cached.requires_grad or not tracked):
            return self._cached
        with without_autocast(x):
            rows = x.double().reshape(self._batch_shape.numel(), self.num_trials)
            found = log_pmf(rows, self._given).reshape(*self._batch_shape, self.num_trials + 1)
        if lasting and (tracked or not x.requires_grad):
            self._cached = found
        return found

    def _tails(self) -> tuple[Tensor, Tensor]:
        """[..., N + 1] each, float64: log P(count <= j) and log P(count > j)."""
        log_probs = self._log_pmf()
        lower = log_probs.logcumsumexp(-1)
        from_above = log_probs.flip(-1).logcumsumexp(-1).flip(-1)
        upper = torch.cat([from_above[..., 1:], torch.full_like(log_probs[..., :1], -math.inf)], -1)
        # The larger of the two is what the smaller leaves.
        return _complement(lower, upper), _complement(upper, lower)

    def _cdf(self) -> Tensor:
        return self._tails()[0].exp()

    def _log_tail(self, value: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
        """[...] the logarithm of a tail in float64, and the value that it is of."""
        value = self._as_value(value, counts=False)
        place = value.floor().clamp(-1, self.num_trials)
        found = self._at(self._tails()[upper], place.clamp(min=0))
        before = 0.0 if upper else -math.inf
        return torch.where(place < 0, before, found), value

    def _as_value(self, value: Tensor, counts: bool) -> Tensor:
        """A value in float64, checked."""
        value = as_real("value", value).double()
        try:
            torch.broadcast_shapes(value.shape, self._batch_shape)
        except RuntimeError:
            raise ValueError(
                f"value has shape {tuple(value.shape)}: it must broadcast with the batch {tuple(self._batch_shape)}"
            ) from None
        checked = validating(self._validate_args, value)
        if checked and counts:
            wrong = ~((value >= 0) & (value <= self.num_trials) & (value == value.floor()))
            if bool(wrong.any()):
                raise ValueError(
                    f"value={float(value[wrong][0])} in {rows_text(wrong)}: counts are integers from 0 to "
                    f"N={self.num_trials}"
                )
        elif checked and bool(value.isnan().any()):
            raise ValueError(f"value is NaN in {rows_text(value.isnan())}")
        return value

    def _at(self, table: Tensor, value: Tensor) -> Tensor:
        """[...] the entries of a table [..., N + 1] that counts name."""
        shape = torch.broadcast_shapes(value.shape, self._batch_shape)
        index = torch.where(value.isnan(), 0.0, value).long().expand(shape)
        return table.expand(*shape, self.num_trials + 1).gather(-1, index[..., None]).squeeze(-1)

    def _result(self, found: Tensor, value: Tensor) -> Tensor:
        """In the dtype of results; NaN where the value is, or the row."""
        found = torch.where(value.isnan() | self._log_pmf()[..., 0].isnan(), math.nan, found)
        return found.to(self._parameter.dtype)


def _complement(log_part: Tensor, log_rest: Tensor) -> Tensor:
    """log_part, by what is left of 1 where that is the smaller part."""
    large = log_part > HALF
    rest = torch.where(large, log_rest, HALF).clamp(max=HALF)
    return torch.where(large, (-rest.exp()).log1p(), log_part)


def _search(cdf: Tensor, value: Tensor) -> Tensor:
    """[...] int64, the smallest j with cdf_j >= value."""
    shape = torch.broadcast_shapes(value.shape, cdf.shape[:-1])
    value = value.expand(shape)
    if transformed() or batched() or traced(cdf, value):
        return (cdf < value[..., None]).sum(-1).clamp(max=cdf.shape[-1] - 1)
    batch = cdf.shape[:-1]
    extra = shape[: len(shape) - len(batch)]
    if shape[len(extra) :] != batch:  # values make the batch larger
        cdf = cdf.expand(*shape[len(extra) :], cdf.shape[-1])
    # Every row's values beside one another, as searchsorted wants them.
    beside = value.reshape(extra.numel(), -1).t().reshape(*shape[len(extra) :], extra.numel())
    found = torch.searchsorted(cdf.contiguous(), beside.contiguous()).clamp_(max=cdf.shape[-1] - 1)
    return found.reshape(-1, extra.numel()).t().reshape(shape)


def _as_parameter(name: str, value: object) -> Tensor:
    """Logits or probabilities in float32 or float64."""
    found = as_real(name, value, floating=True)
    if found.dim() == 0:
        raise ValueError(f"{name} has shape (): its last dimension must hold the N trials; give {name}[None] for one")
    return found if found.dtype == torch.float64 else found.float()


def _check(name: str, value: Tensor) -> None:
    """Refuse NaN and what is no probability, by row."""
    bad = value.isnan()
    if bool(bad.any()):
        raise ValueError(f"{name} hold NaN in {rows_text(bad.any(-1))}")
    outside = (value < 0) | (value > 1)
    if name == "probs" and bool(outside.any()):
        raise ValueError(
            f"probs hold {float(value[outside][0]):.6g} in {rows_text(outside.any(-1))}: probabilities lie in [0, 1]; "
            "for log-odds give logits="
        )
