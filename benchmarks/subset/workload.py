"""The op: logits to gates, log Z and marginals under a constraint on the count; backward from the gates.

Shapes: T tokens, N variables, K largest count.

Forward gives the marginals, log Z and a sample; backward goes through ProbMoE's gates,
softmax(logits) * (stopgrad(mask - marginals) + marginals), so that it crosses the gradient of the marginals.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.registry import BOTH, FORWARD, Outputs, op

Array = NDArray[Any]

# The truth is in long double: this many tokens of a case are held against it.
CHECKED_TOKENS = 128


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
        """[T, N] for gates, or its first columns for the weights of a shorter list."""
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
        if "marginals" not in outputs.values:
            return {FORWARD: None, BOTH: None}
        counts_T = outputs.values["mask"].sum(dim=-1)
        if not ((counts_T >= case.kmin) & (counts_T <= case.k)).all():
            raise ValueError(f"a sample has a size outside {case.kmin}..{case.k}")
        return {FORWARD: _value_error(case, outputs), BOTH: _gradient_error(case, outputs, gradient)}


def _pair(option: str, text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{option} {text!r}: expected two numbers separated by a colon, such as 64:8")
    return int(parts[0]), int(parts[1])


def _value_error(case: SubsetCase, outputs: Outputs) -> float:
    """The largest error of the marginals and, relative where it is above 1, of log Z."""
    from tests.truth import count_truth

    truth = count_truth(case.logits[:CHECKED_TOKENS], case.potential())
    errors = np.abs(_checked(outputs.values["marginals"]) - truth.marginals).max(initial=0)
    scale_T = np.maximum(1, np.abs(truth.log_partition))
    difference_T = _checked(outputs.values["log_partition"]) - truth.log_partition
    return float(max(errors, np.abs(difference_T / scale_T).max()))


def _gradient_error(case: SubsetCase, outputs: Outputs, gradient: Tensor) -> float:
    truth_TN = true_gradient(case, _checked(outputs.values["mask"]))
    return float(np.abs(_checked(gradient) - truth_TN).max())


def true_gradient(case: SubsetCase, mask_TN: Array) -> Array:
    """The gradient of upstream . gates in the logits, in the checked rows, given the sample that was drawn.

    gates = p * (stopgrad(z - m) + m) with p = softmax(logits). The gates' values are p * z, so p gets the
    upstream times z, through the softmax's Jacobian diag(p) - p p', and m gets the upstream times p, through
    Cov(z).
    """
    from tests.truth import count_gradient

    logits_TN = _checked(case.logits)
    upstream_TN = _checked(case.upstream(case.logits))
    p_TN = np.exp(logits_TN - np.logaddexp.reduce(logits_TN, axis=1, keepdims=True))
    to_p_TN = upstream_TN * mask_TN
    through_p_TN: Array = p_TN * (to_p_TN - (p_TN * to_p_TN).sum(axis=1, keepdims=True))
    return through_p_TN + count_gradient(logits_TN, case.potential(), upstream_TN * p_TN).marginals


def _checked(values: Tensor) -> Array:
    rows: Array = values[:CHECKED_TOKENS].detach().cpu().double().numpy()
    return rows
