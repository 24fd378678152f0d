"""Inference on the circuit against enumeration, for ordinary and extreme logits, ties and evidence.

Legend: T rows of logits, N variables, W worlds.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from circuitroute import SubsetDistribution
from circuitroute.testing.case import Case, worlds
from circuitroute.testing.suite import Suite, check, require, require_close, require_error
from circuitroute.testing.truth import Truth, contradicting_row, rows_of_logits, truth_of

# Relative to 1 + |expected|. These are meant to expose a wrong circuit; engines have tighter bounds of their own.
DOUBLE, SINGLE = 1e-7, 1e-4


class DistributionChecks(Suite):
    """What ``circuit(logits)`` returns."""

    def distribution(self, case: Case) -> tuple[SubsetDistribution, Tensor, Truth]:
        """The distribution at :func:`rows_of_logits` in float64, the logits (a leaf), and the truth."""
        rows = rows_of_logits(case.allowed, case.n)
        logits = torch.from_numpy(rows).requires_grad_()
        return self.circuit(case)(logits, validate_args=True), logits, truth_of(case.allowed, rows)

    @check
    def test_log_partition(self, case: Case) -> None:
        """log Z, and its gradient: the marginals of the variables that evidence leaves free."""
        dist, logits, truth = self.distribution(case)
        require_close(case, "log_partition", dist.log_partition, truth.log_partition, DOUBLE)
        free = np.where(np.isinf(logits.detach().numpy()), 0.0, truth.marginals)
        require_close(case, "gradient of log_partition", _gradient(dist.log_partition.sum(), logits), free, DOUBLE)

    @check
    def test_marginals(self, case: Case) -> None:
        """P(i in S)."""
        dist, _, truth = self.distribution(case)
        require_close(case, "marginals", dist.marginals, truth.marginals, DOUBLE)

    @check
    def test_gradient_of_marginals(self, case: Case) -> None:
        """Along any direction u: Cov(z) u."""
        dist, logits, truth = self.distribution(case)
        u = np.random.default_rng(1).normal(size=logits.shape)
        got = _gradient((dist.marginals * torch.from_numpy(u)).sum(), logits)
        require_close(case, "gradient of the marginals", got, np.einsum("tij,tj->ti", truth.covariance, u), DOUBLE)

    @check
    def test_single_precision(self, case: Case) -> None:
        """Marginals and log Z of float32 logits."""
        rows = rows_of_logits(case.allowed, case.n).astype(np.float32)
        dist, truth = self.circuit(case)(torch.from_numpy(rows)), truth_of(case.allowed, rows.astype(np.float64))
        require_close(case, "marginals in float32", dist.marginals, truth.marginals, SINGLE)
        require_close(case, "log_partition in float32", dist.log_partition, truth.log_partition, SINGLE)

    @check
    def test_entropy(self, case: Case) -> None:
        """In nats."""
        dist, _, truth = self.distribution(case)
        require_close(case, "entropy", dist.entropy(), truth.entropy, DOUBLE)

    @check
    def test_log_prob(self, case: Case) -> None:
        """Of every allowed world, -inf where evidence excludes it; a world that is not allowed raises."""
        dist, _, truth = self.distribution(case)
        masks = torch.from_numpy(worlds(case.n))
        allowed = torch.from_numpy(case.allowed)
        got = dist.log_prob(masks[allowed][:, None, :]).T
        require_close(case, "log_prob of the allowed worlds", got, truth.log_probs[:, case.allowed], DOUBLE)
        if not allowed.all():
            of_other = partial(dist.log_prob, masks[~allowed][:1])
            require_error(ValueError, of_other, f"{case}: log_prob of a world that is not allowed")

    @check
    def test_count_probs(self, case: Case) -> None:
        """P(|S| = j) for j up to the largest allowed count."""
        dist, _, truth = self.distribution(case)
        largest = int(worlds(case.n)[case.allowed].sum(1).max())
        require_close(case, "count_probs", dist.count_probs, truth.count_probs[:, : largest + 1], DOUBLE)

    @check
    def test_mode(self, case: Case) -> None:
        """The most probable world; of several, the one of fewest variables, then the one with the first indices."""
        dist, _, truth = self.distribution(case)
        mode = dist.mode.numpy().astype(np.int64)
        reached = torch.from_numpy(truth.log_probs[np.arange(len(mode)), (mode << np.arange(case.n)).sum(1)])
        require_close(case, "true log-probability of the mode", reached, truth.log_probs.max(1), DOUBLE)
        worlds_WN = worlds(case.n)
        # As numbers with variable 0 in the highest bit, of two sets of one size the larger has the first indices.
        order_W = np.lexsort((-(worlds_WN << np.arange(case.n)[::-1]).sum(1), worlds_WN.sum(1)))
        first = worlds_WN[order_W[truth.log_probs[:, order_W].argmax(1)]]
        wrong = np.flatnonzero((mode != first).any(1))
        if len(wrong):
            row = wrong[0]
            raise AssertionError(
                f"{case}: mode of logits {rows_of_logits(case.allowed, case.n)[row]}: expected the variables "
                f"{np.flatnonzero(first[row]).tolist()}, fewest first and then the lowest among equally probable "
                f"worlds, got {np.flatnonzero(mode[row]).tolist()}"
            )

    @check
    def test_contradicting_evidence(self, case: Case) -> None:
        """Evidence that leaves nothing raises; without validation, it gives NaN in its own row alone."""
        row = contradicting_row(case.allowed, case.n)
        if row is None:
            return
        circuit = self.circuit(case)
        logits = torch.from_numpy(np.stack([row, np.zeros(case.n)]))
        empty = circuit(logits, validate_args=False).marginals.isnan().all(1).tolist()
        require(empty == [True, False], f"{case}: marginals of {row} and of zeros: expected NaN just in the first row")
        validated = partial(circuit, logits, validate_args=True)
        require_error(ValueError, validated, f"{case}: evidence {row} leaves nothing")


def _gradient(scalar: Tensor, logits: Tensor) -> Tensor:
    """d scalar / d logits; zero if nothing depends on them, as when a single subset is allowed."""
    if not scalar.requires_grad:
        return torch.zeros_like(logits)
    (found,) = torch.autograd.grad(scalar, logits, allow_unused=True)
    return torch.zeros_like(logits) if found is None else found
