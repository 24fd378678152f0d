"""The op: logits to gates, log Z and marginals under a constraint on the count; backward from the gates.

Shapes: T tokens, N variables, K largest count.

Forward gives the marginals, log Z and a sample; backward goes through ProbMoE's gates,
softmax(logits) * (stopgrad(mask - marginals) + marginals), so that it crosses the gradient of the marginals. Providers
that do less or otherwise say so in a note, and are held to the truth in what they do.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.registry import BOTH, FORWARD, Outputs, op

if TYPE_CHECKING:
    from tests.truth import CountTruth

Array = NDArray[Any]

# The truth is in long double: this many tokens of a case are held against it, fewer where n (k + 1) is large, since it
# keeps four tables of that many numbers for each.
CHECKED_TOKENS = 128
CHECKED_NUMBERS = 1 << 24


@dataclass(frozen=True)
class SubsetCase:
    """T rows of N standard normal logits, and the counts kmin..k."""

    tokens: int
    n: int
    kmin: int
    k: int
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.kmin <= self.k <= self.n or self.k < 1 or self.tokens < 1:
            raise ValueError(f"need tokens >= 1 and 0 <= kmin <= k <= n with k >= 1, got {self}")

    @property
    def checked(self) -> int:
        """How many tokens are held against the truth."""
        return max(1, min(CHECKED_TOKENS, self.tokens, CHECKED_NUMBERS // (self.n * (self.k + 1))))

    @cached_property
    def logits(self) -> Tensor:
        """[T, N]."""
        return self._normal(0)

    @cached_property
    def _upstream(self) -> Tensor:
        return self._normal(1)

    def _normal(self, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(2 * self.seed + stream)
        return torch.randn(self.tokens, self.n, generator=generator).to(self.device)

    def upstream(self, result: Tensor) -> Tensor:
        """[T, N] for gates, its first columns for the weights of a shorter list, or ones for log Z [T]."""
        if result.dim() == 1:
            return torch.ones_like(result)  # so that the gradient is the marginals
        return self._upstream[:, : result.shape[1]]

    def potential(self) -> Array:
        """The count potential [N + 1]: 0 where allowed."""
        return np.where(np.isin(np.arange(self.n + 1), range(self.kmin, self.k + 1)), 0.0, -np.inf)

    def describe(self) -> dict[str, Any]:
        counts = f"{self.k}" if self.kmin == self.k else f"{self.kmin}..{self.k}"
        sizes = {"T": self.tokens, "n": self.n, "kmin": self.kmin, "k": self.k}
        return {**sizes, "counts": counts, "dtype": "float32"}


@op
class Subset:
    """Exact inference over subsets of kmin..k out of N, against softmax + topk + gather."""

    name = "subset"
    baseline = "topk"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--tokens", type=int, default=4096, help="rows T (default: 4096)")
        parser.add_argument("--sizes", default="64:8", help="n:k,n:k,... exactly k of n (default: 64:8)")
        parser.add_argument("--range", help="lo:hi, to time between lo and hi of each n as well")
        parser.add_argument("--seed", type=int, default=0, help="of the logits (default: 0)")

    def cases(self, options: Namespace) -> Sequence[SubsetCase]:
        sizes = [_pair("--sizes", text) for text in options.sizes.split(",")]
        shapes = [(n, k, k) for n, k in sizes]
        if options.range:
            low, high = _pair("--range", options.range)
            shapes += [(n, low, high) for n in dict.fromkeys(n for n, _ in sizes)]
        return [SubsetCase(options.tokens, *shape, options.device, options.seed) for shape in shapes]

    def errors(self, case: SubsetCase, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
        """By what there is to check: a distribution, its log Z alone, a relaxation, or nothing."""
        if "marginals" in outputs.values:
            return _distribution_errors(case, outputs, gradient)
        if "log_partition" in outputs.values:
            return _log_partition_errors(case, outputs, gradient)
        if "soft" in outputs.values:
            return _relaxation_errors(case, outputs, gradient)
        return {FORWARD: None, BOTH: None}


def _pair(option: str, text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{option} {text!r}: expected two numbers separated by a colon, such as 64:8")
    return int(parts[0]), int(parts[1])


def _distribution_errors(case: SubsetCase, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
    """Of the marginals and log Z, and of the gradient of the gates."""
    counts_T = outputs.values["mask"].sum(dim=-1)
    if not ((counts_T >= case.kmin) & (counts_T <= case.k)).all():
        raise ValueError(f"a sample has a size outside {case.kmin}..{case.k}")
    truth = _truth(case)
    of_values = _largest(_checked(case, outputs.values["marginals"]) - truth.marginals)
    of_gradient = _largest(_checked(case, gradient) - true_gradient(case, _checked(case, outputs.values["mask"])))
    return {FORWARD: max(of_values, _log_partition_error(case, outputs, truth)), BOTH: of_gradient}


def _log_partition_errors(case: SubsetCase, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
    """Of log Z, and of its gradient, the marginals."""
    truth = _truth(case)
    return {
        FORWARD: _log_partition_error(case, outputs, truth),
        BOTH: _largest(_checked(case, gradient) - truth.marginals),
    }


def _relaxation_errors(case: SubsetCase, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
    """Of the sum of the soft weights, and of the gradient of the gates."""
    sums_T = _checked(case, outputs.values["soft"]).sum(axis=1)
    return {FORWARD: _largest(sums_T - case.k), BOTH: _largest(_checked(case, gradient) - true_soft_gradient(case))}


def _truth(case: SubsetCase) -> CountTruth:
    from tests.truth import count_truth

    return count_truth(case.logits[: case.checked], case.potential())


def _log_partition_error(case: SubsetCase, outputs: Outputs, truth: CountTruth) -> float:
    """Relative where log Z is above 1."""
    difference_T = _checked(case, outputs.values["log_partition"]) - truth.log_partition
    return _largest(difference_T / np.maximum(1, np.abs(truth.log_partition)))


def _largest(differences: Array) -> float:
    return float(np.abs(differences).max(initial=0))


def true_gradient(case: SubsetCase, mask_TN: Array) -> Array:
    """The gradient of upstream . gates in the logits, in the checked rows, given the sample that was drawn.

    gates = p * (stopgrad(z - m) + m) with p = softmax(logits). The gates' values are p * z, so p gets the
    upstream times z, through the softmax's Jacobian, and m gets the upstream times p, through Cov(z).
    """
    from tests.truth import count_gradient

    logits_TN, upstream_TN, p_TN = _checked_inputs(case)
    to_m_TN = count_gradient(logits_TN, case.potential(), upstream_TN * p_TN).marginals
    return _through_softmax(p_TN, upstream_TN * mask_TN) + to_m_TN


def true_soft_gradient(case: SubsetCase) -> Array:
    """The same for gates = p * s with the soft weights s_i = F(logit_i - b), their sum k, b found by bisection.

    With d_i = F'(logit_i - b) and D their sum, b moves by d_j / D with logit j, so that s has the Jacobian
    diag(d) - d d' / D.
    """
    logits_TN, upstream_TN, p_TN = _checked_inputs(case)
    threshold_T1 = _bisected_threshold(logits_TN, case.k)
    density_TN = np.exp(-np.abs(logits_TN - threshold_T1)) / 2
    to_s_TN = upstream_TN * p_TN
    mean_T1 = (density_TN * to_s_TN).sum(axis=1, keepdims=True) / density_TN.sum(axis=1, keepdims=True)
    soft_TN = _laplace_cdf(logits_TN - threshold_T1)
    through_s_TN: Array = density_TN * (to_s_TN - mean_T1)
    return _through_softmax(p_TN, upstream_TN * soft_TN) + through_s_TN


def _bisected_threshold(logits_TN: Array, k: int) -> Array:
    """b [T, 1] at which the sum of F(logit_i - b) is k, to float64's last digits."""
    reach = np.abs(logits_TN).max(initial=0) + np.log(4 * logits_TN.shape[1])
    low_T1, high_T1 = np.full((len(logits_TN), 1), -reach), np.full((len(logits_TN), 1), reach)
    for _ in range(100):
        middle_T1 = (low_T1 + high_T1) / 2
        too_low_T1 = _laplace_cdf(logits_TN - middle_T1).sum(axis=1, keepdims=True) > k
        low_T1, high_T1 = np.where(too_low_T1, middle_T1, low_T1), np.where(too_low_T1, high_T1, middle_T1)
    return high_T1


def _laplace_cdf(x: Array) -> Array:
    tail = np.exp(-np.abs(x)) / 2
    return np.where(x < 0, tail, 1 - tail)


def _checked_inputs(case: SubsetCase) -> tuple[Array, Array, Array]:
    """The logits, the gradient from above and the softmax, [T, N] in the checked rows."""
    logits_TN, upstream_TN = _checked(case, case.logits), _checked(case, case.upstream(case.logits))
    return logits_TN, upstream_TN, np.exp(logits_TN - np.logaddexp.reduce(logits_TN, axis=1, keepdims=True))


def _through_softmax(p_TN: Array, upstream_TN: Array) -> Array:
    """The softmax's Jacobian, diag(p) - p p', times what arrives at it."""
    through_TN: Array = p_TN * (upstream_TN - (p_TN * upstream_TN).sum(axis=1, keepdims=True))
    return through_TN


def _checked(case: SubsetCase, values: Tensor) -> Array:
    rows: Array = values[: case.checked].detach().cpu().double().numpy()
    return rows
