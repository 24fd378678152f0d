"""Samples: allowed, a pure function of logits row and key row, and correctly distributed.

Legend: T rows of logits, N variables, W worlds, M samples, C cells of a test.
"""

from __future__ import annotations

import numpy as np
import torch

from circuitroute import SubsetDistribution, random_key
from circuitroute.testing.case import Case
from circuitroute.testing.suite import Suite, check, require
from circuitroute.testing.truth import FloatArray, rows_of_logits, truth_of

SAMPLES = 4000
# The seed is fixed: with this probability a correct sampler fails a given case always, else never.
ERROR_RATE = 1e-6


class SampleChecks(Suite):
    """What ``circuit(logits).sample(key=...)`` returns."""

    def sampled(self, case: Case) -> tuple[SubsetDistribution, torch.Tensor]:
        """The distribution at the rows that every check uses, and a key for each."""
        logits = torch.from_numpy(rows_of_logits(case.allowed, case.n))
        return self.circuit(case)(logits, validate_args=True), random_key(0, torch.arange(len(logits)))

    @check
    def test_samples_are_allowed(self, case: Case) -> None:
        """Every sample is an allowed world that agrees with the evidence."""
        dist, keys = self.sampled(case)
        masks = dist.sample((50,), key=keys)
        require(bool(((masks == 0) | (masks == 1)).all()), f"{case}: expected samples of 0 and 1, got {masks.unique()}")
        index = (masks.long() << torch.arange(case.n)).sum(-1)
        wrong = (~torch.from_numpy(case.allowed)[index]).nonzero()
        require(len(wrong) == 0, f"{case}: expected allowed samples, got {masks[tuple(wrong[:1].T)]}")
        followed = ~torch.isinf(dist.logits) | (masks == (dist.logits > 0))
        require(bool(followed.all()), f"{case}: expected samples that follow infinite logits, some do not")

    @check
    def test_samples_are_functions_of_row_and_key(self, case: Case) -> None:
        """The same when drawn again, one row at a time, and in another order."""
        dist, keys = self.sampled(case)
        circuit, logits = self.circuit(case), dist.logits
        whole = dist.sample(key=keys)
        alone = torch.stack([circuit(row).sample(key=key) for row, key in zip(logits, keys, strict=True)])
        others = {
            "drawn again": dist.sample(key=keys),
            "drawn one row at a time": alone,
            "drawn in reverse": circuit(logits.flip(0)).sample(key=keys.flip(0)).flip(0),
        }
        for how, again in others.items():
            wrong = (again != whole).any(-1).nonzero().flatten().tolist()
            require(not wrong, f"{case}: expected the same samples {how} with the same keys, rows {wrong} differ")

    @check
    def test_samples_follow_the_distribution(self, case: Case) -> None:
        """A chi-square test over all worlds, with a fixed seed and an error rate of one in a million."""
        logits = np.random.default_rng(2).normal(size=(1, case.n))
        expected = SAMPLES * np.exp(truth_of(case.allowed, logits).log_probs[0])
        keys = random_key(1, torch.arange(SAMPLES))
        masks = self.circuit(case)(torch.from_numpy(logits).expand(SAMPLES, -1)).sample(key=keys)
        index = (masks.long() << torch.arange(case.n)).sum(-1)
        observed = np.bincount(index.numpy(), minlength=len(expected)).astype(np.float64)
        chance = chi_square(observed, expected)
        require(
            chance > ERROR_RATE,
            f"{case}: expected {SAMPLES} samples that follow the distribution, got frequencies that would arise with "
            f"probability {chance:.1e}; the most wrong is the world of index {np.abs(observed - expected).argmax()}",
        )


def chi_square(observed_W: FloatArray, expected_W: FloatArray) -> float:
    """The probability of frequencies at least as far from ``expected_W`` as ``observed_W`` (Pearson's test).

    Zero if an impossible world has occurred.
    """
    if observed_W[expected_W == 0].any():
        return 0.0
    cells = _pooled(observed_W, expected_W)
    if len(cells) == 1:
        return 1.0
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    halves = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def _pooled(observed_W: FloatArray, expected_W: FloatArray) -> list[tuple[float, float]]:
    """(observed, expected) of cells with at least five expected samples: worlds pooled, the rarest first."""
    cells: list[tuple[float, float]] = []
    observed = expected = 0.0
    for w in np.argsort(expected_W):
        observed, expected = observed + float(observed_W[w]), expected + float(expected_W[w])
        if expected >= 5:
            cells.append((observed, expected))
            observed = expected = 0.0
    last = cells.pop()
    return [*cells, (last[0] + observed, last[1] + expected)]  # with the remainder
