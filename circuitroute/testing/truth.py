"""The truth by enumeration in NumPy's float64, which shares no code with the engines it judges.

Legend: T rows of logits, N variables, W = 2^N worlds, C = N + 1 counts.

    p(z) = allowed(z) exp(theta . z) / Z

A logit of -inf forbids its variable; +inf forces it and adds nothing to a world's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from circuitroute.testing.case import BoolArray, worlds

FloatArray: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """What enumeration knows about each row."""

    log_partition: FloatArray  # [T]
    marginals: FloatArray  # [T, N]
    covariance: FloatArray  # [T, N, N]
    entropy: FloatArray  # [T]
    count_probs: FloatArray  # [T, C]
    log_probs: FloatArray  # [T, W]; -inf where not allowed


def truth_of(allowed_W: BoolArray, logits_TN: FloatArray) -> Truth:
    """Everything about rows of logits, each of which must leave at least one allowed world."""
    worlds_WN = worlds(logits_TN.shape[1])
    scores_TW = np.where(allowed_W, _scores(logits_TN, worlds_WN), -np.inf)
    top_T = scores_TW.max(axis=1)
    log_partition_T = top_T + np.log(np.exp(scores_TW - top_T[:, None]).sum(axis=1))
    log_probs_TW = scores_TW - log_partition_T[:, None]
    probs_TW = np.exp(log_probs_TW)
    marginals_TN = probs_TW @ worlds_WN
    centred_TWN = worlds_WN - marginals_TN[:, None, :]
    counts_WC = worlds_WN.sum(axis=1)[:, None] == np.arange(worlds_WN.shape[1] + 1)
    return Truth(
        log_partition=log_partition_T,
        marginals=marginals_TN,
        covariance=np.einsum("tw,twi,twj->tij", probs_TW, centred_TWN, centred_TWN),
        entropy=-(probs_TW * np.where(probs_TW == 0, 0, log_probs_TW)).sum(axis=1),
        count_probs=probs_TW @ counts_WC,
        log_probs=log_probs_TW,
    )


def _scores(logits_TN: FloatArray, worlds_WN: BoolArray) -> FloatArray:
    """[T, W] theta . z over the variables that evidence leaves free, -inf where evidence is contradicted."""
    finite_TN = np.where(np.isinf(logits_TN), 0.0, logits_TN)
    broken_TW = (logits_TN == np.inf) @ ~worlds_WN.T | (logits_TN == -np.inf) @ worlds_WN.T
    scores_TW: FloatArray = np.where(broken_TW, -np.inf, finite_TN @ worlds_WN.T)
    return scores_TW


def rows_of_logits(allowed_W: BoolArray, n: int, seed: int = 0) -> FloatArray:
    """[T, N] rows worth checking: ties, ordinary and extreme scales, and evidence.

    Evidence is taken from an allowed world, so that every row leaves one.
    """
    rng = np.random.default_rng(seed)
    plain = [np.zeros(n), *(rng.normal(size=n) * scale for scale in (1.0, 10.0, 100.0))]
    tied = np.round(rng.normal(size=n)) * 50.0
    given = [_with_evidence(rng, allowed_W, rng.normal(size=n) * scale, share)
             for scale, share in ((1.0, 0.3), (1.0, 0.6), (100.0, 0.4), (1.0, 1.0))]  # fmt: skip
    return np.stack([*plain, tied, *given])


def _with_evidence(rng: np.random.Generator, allowed_W: BoolArray, logits_N: FloatArray, share: float) -> FloatArray:
    world_N = worlds(len(logits_N))[rng.choice(np.flatnonzero(allowed_W))]
    decided_N = rng.random(len(logits_N)) < share
    evidence_N: FloatArray = np.where(decided_N, np.where(world_N, np.inf, -np.inf), logits_N)
    return evidence_N


def contradicting_row(allowed_W: BoolArray, n: int) -> FloatArray | None:
    """[N] infinite logits that leave exactly one world, which is not allowed; None if all worlds are allowed."""
    forbidden = np.flatnonzero(~allowed_W)
    return np.where(worlds(n)[forbidden[0]], np.inf, -np.inf) if len(forbidden) else None
