"""A learned prior, logits and a hard constraint: their product as a distribution over the allowed subsets.

    p(S) = prior(S) exp(sum of the logits of S) / Z    over the subsets the constraint allows.

Legend: T rows (all leading dimensions), N variables, R samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from circuitroute._tensors import without_autocast
from circuitroute._validate import as_mask
from circuitroute.circuit.compiled import Compiled
from circuitroute.circuit.vtree import Vtree
from circuitroute.engines.logspace import nan_rows
from circuitroute.inference.distribution import AllowedSubsets, finite, satisfies, validating
from circuitroute.inference.evidence import condition_logits, rows_text
from circuitroute.keys import sample_keys
from circuitroute.priors import sweep
from circuitroute.priors.states import States, everything
from circuitroute.priors.sweep import Parameters, Weights


class PriorDistribution(Distribution):
    """p(S) ~ prior(S) exp(sum of the logits of S), over the subsets a circuit allows.

    Made by :class:`circuitroute.SubsetPrior`: by calling one, or by its ``constrained``. Results are exact, and
    functions of the logits and of the prior's parameters, which it shares: differentiable, to any order. They are
    computed in float64 and given in the dtype of logits and parameters, float32 at least.

    Three things have no exact form with latent states: the entropy, the mode, and divergences. :meth:`entropy` and
    :attr:`mode` say what to take instead.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012 - torch's own spelling
    has_rsample = True

    def __init__(
        self,
        parameters: Parameters,
        states: States,
        circuit: Compiled | None,
        logits: Tensor,
        validate_args: bool | None,
    ) -> None:
        self.circuit, self.logits = circuit, logits
        self._parameters, self._states = parameters, states
        self._rows_TN = logits.reshape(-1, logits.shape[-1])
        self._nan = self._rows_TN.isnan().any(-1)
        checked = validating(validate_args, logits)
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)
        self._validate_args = checked
        if checked:
            self._check()

    def _check(self) -> None:
        if bool(self._nan.any()):
            raise ValueError(f"logits hold NaN in {rows_text(self._as_batch(self._nan))}")
        with torch.no_grad():
            empty = self._log_root(self._literals()) == -math.inf
        if bool(empty.any()):
            what = "subset" if self.circuit is None else f"subset that satisfies {self.circuit.constraint!r}"
            raise ValueError(f"no {what} is left by the infinite logits in {rows_text(self._as_batch(empty))}")

    def _as_batch(self, rows: Tensor) -> Tensor:
        return rows.reshape(self._batch_shape + rows.shape[1:])

    def _given(self, values: Tensor) -> Tensor:
        """[T, ...] in the batch's shape and in the dtype of what was given."""
        return self._as_batch(values).to(self.logits.dtype)

    def _literals(self) -> Tensor:
        """[T, N, 2]; 0 in rows with NaN, so that they cannot affect others."""
        return sweep.literals(torch.where(self._nan[:, None], 0.0, self._rows_TN))

    def _log_root(self, literals_TN2: Tensor) -> Tensor:
        with without_autocast(literals_TN2):
            return sweep.log_root(self._states, literals_TN2, self._parameters.weights())

    def _marked(self, log_root_T: Tensor, values: Tensor) -> Tensor:
        """NaN in rows that held some, or that nothing satisfies."""
        return nan_rows(self._nan | (log_root_T.detach() == -math.inf), values)

    # ------------------------------------------------------------------ moments

    @property
    def log_partition(self) -> Tensor:
        """[...] log Z. With no finite logits it is the log-probability, under the prior, of constraint and evidence."""
        found = self._log_root(self._literals())
        return self._given(self._marked(found, found))

    @property
    def marginals(self) -> Tensor:
        """[..., N] P(i in S)."""
        return self._given(self._marginals(self._rows_TN))

    def _marginals(self, logits_TN: Tensor) -> Tensor:
        """[T, N] float64, as a function of logits: the derivative of log Z in the weights of the literals."""

        def total(literals_TN2: Tensor) -> tuple[Tensor, Tensor]:
            log_root = self._log_root(literals_TN2)
            possible = log_root > -math.inf
            return torch.where(possible, log_root, 0.0).sum(), log_root

        literals_TN2 = sweep.literals(torch.where(self._nan[:, None], 0.0, logits_TN))
        flows, log_root = torch.func.grad(total, has_aux=True)(literals_TN2)
        return self._marked(log_root, flows[..., 1])

    @property
    def mean(self) -> Tensor:
        """[..., N] the marginals."""
        return self.marginals

    @property
    def variance(self) -> Tensor:
        """[..., N] m (1 - m)."""
        return self.marginals * (1 - self.marginals)

    @property
    def covariance_matrix(self) -> Tensor:
        """[..., N, N] Cov(z): the derivative of the marginals in the logits, one sweep per variable."""
        n = self._rows_TN.shape[1]
        decided = torch.isinf(self._rows_TN)

        def moved(shift_TN: Tensor) -> Tensor:
            return self._marginals(torch.where(decided, self._rows_TN, self._rows_TN + shift_TN))

        pulled: Any = torch.func.vjp(moved, torch.zeros_like(self._rows_TN, dtype=torch.float64))
        directions = torch.eye(n, dtype=torch.float64, device=self._rows_TN.device)
        columns = [pulled[1](direction.expand(len(self._rows_TN), -1))[0] for direction in directions]
        return self._given(self._marked(self._log_root(self._literals()), torch.stack(columns, -1)))

    def entropy(self) -> Tensor:
        """There is no exact entropy of a mixture with latent states that is cheaper than listing all subsets.

        Raises:
            NotImplementedError: always; it says how to estimate it.
        """
        raise NotImplementedError(
            "the entropy of a prior with latent states has no tractable form: estimate it by samples, "
            "-distribution.log_prob(distribution.sample((1000,), key=0)).mean(0)"
        )

    @property
    def mode(self) -> Tensor:
        """The most probable subset is NP-hard to find for a circuit that is not deterministic, as with latent states.

        Raises:
            NotImplementedError: always; it names :meth:`max_product`.
        """
        raise NotImplementedError(
            "the mode of a prior with latent states is NP-hard to find: distribution.max_product() gives the subset of "
            "the most probable subset with latent states, and a lower bound on the mode's log-probability"
        )

    def max_product(self) -> tuple[Tensor, Tensor]:
        """The most probable pair of a subset and latent states: its subset, and a bound on the mode's log-probability.

        Returns:
            ([..., N] a mask of exactly 0 and 1, [...] the log-probability of the pair). The latter is at most the
            subset's own log-probability, and that is at most the mode's.
        """
        with torch.no_grad():
            literals_TN2 = self._literals()
            masks, best = sweep.most_probable(self._states, literals_TN2, self._parameters.weights())
            log_root = self._log_root(literals_TN2)
            return self._masks(masks, log_root, Size()), self._given(self._marked(log_root, best - log_root))

    # ------------------------------------------------------------------ samples

    def sample(self, sample_shape: Iterable[int] = (), key: Tensor | int | None = None) -> Tensor:
        """[*sample_shape, ..., N] masks of exactly 0 and 1 (NaN in invalid rows), every one of them allowed.

        Args:
            sample_shape: leading dimensions of independent samples.
            key: int64, broadcastable to sample_shape + batch. A sample is a pure function of (prior, logits row, key
                row); see :func:`circuitroute.random_key`. A key without the sample dimensions is mixed with the
                sample's index. None draws keys from torch's global generator.
        """
        with torch.no_grad():
            shape = Size(sample_shape)
            keys = sample_keys(key, shape, self._batch_shape, self.logits.device)
            rows = torch.arange(len(self._rows_TN), device=self.logits.device).repeat(shape.numel())
            literals_TN2 = self._literals()
            masks = sweep.sample(self._states, literals_TN2, self._parameters.weights(), rows, keys)
            return self._masks(masks, self._log_root(literals_TN2), shape)

    def _masks(self, masks_RN: Tensor, log_root_T: Tensor, shape: Size) -> Tensor:
        bad = (self._nan | (log_root_T == -math.inf)).repeat(shape.numel())
        masks = masks_RN.to(self.logits.dtype).masked_fill(bad[:, None], math.nan)
        return masks.reshape(shape + self._batch_shape + self._event_shape)

    def rsample(self, sample_shape: Iterable[int] = (), key: Tensor | int | None = None) -> Tensor:
        """:meth:`sample` with the SIMPLE gradient: forward the mask z, backward that of the marginals m."""
        marginals = self.marginals
        return self.sample(sample_shape, key) + (marginals - marginals.detach())

    # ------------------------------------------------------------------ densities

    @property
    def support(self) -> constraints.Constraint:
        """The 0/1 masks of allowed subsets."""
        if self.circuit is None:
            return constraints.independent(constraints.boolean, 1)
        return AllowedSubsets(self.circuit)

    def log_prob(self, value: Tensor) -> Tensor:
        """[...] log p(S) of masks [..., N] (bool or 0/1); -inf for one the evidence excludes.

        Raises:
            ValueError: a wrong last dimension or values that are not 0 or 1; when validating, masks that the
                constraint does not allow, named by row.
        """
        n = self._rows_TN.shape[1]
        selected = as_mask("value", value, n)
        allowed = selected.new_ones(selected.shape[:-1])
        if self.circuit is not None:
            allowed = satisfies(self.circuit, selected)
            if self._validate_args and not bool(allowed.all()):
                raise ValueError(f"value does not satisfy {self.circuit.constraint!r} in {rows_text(~allowed)}")
        excluded = (selected & (self.logits == -math.inf)) | (~selected & (self.logits == math.inf))
        linear = torch.where(selected, finite(self.logits).double(), 0.0).sum(-1)
        prior = log_prior(self._parameters.weights(), self._states.vtree, selected)
        log_prob = prior + linear - self._log_partition()
        possible = allowed & ~excluded.any(-1)
        return torch.where(possible | log_prob.isnan(), log_prob, -math.inf).to(self.logits.dtype)

    def _log_partition(self) -> Tensor:
        """[...] in float64; exactly 0 where there is nothing to normalise."""
        if self.circuit is None and not self.logits.requires_grad and not self._batch_shape and self._nothing_given():
            return self.logits.new_zeros((), dtype=torch.float64)
        found = self._log_root(self._literals())
        return self._as_batch(self._marked(found, found))

    def _nothing_given(self) -> bool:
        return self._validate_args and not bool(self.logits.any())

    # ------------------------------------------------------------------ new distributions

    def condition(
        self,
        include: Tensor | Iterable[int] | None = None,
        exclude: Tensor | Iterable[int] | None = None,
    ) -> PriorDistribution:
        """The distribution given that S contains ``include`` and avoids ``exclude``.

        Args:
            include, exclude: a mask [..., N] (bool, or float 0/1) that broadcasts with the batch, or the indices of
                variables, for all rows (integers). A partial observation is two masks.

        Raises:
            ValueError: an index out of range, a variable both included and excluded, or (when validating) rows that
                are left without any subset.
        """
        logits, lost = condition_logits(self._rows_TN.shape[1], self.logits, include, exclude)
        if self._validate_args and bool(lost.any()):
            raise ValueError(
                f"include or exclude contradicts the infinite logits in {rows_text(lost)}: no subset is left"
            )
        return PriorDistribution(self._parameters, self._states, self.circuit, logits, self._validate_args)

    def expand(self, batch_shape: Iterable[int], _instance: Any = None) -> PriorDistribution:
        """The same distribution with a larger batch shape, sharing memory."""
        logits = self.logits.expand(*Size(batch_shape), self._rows_TN.shape[1])
        new = PriorDistribution(self._parameters, self._states, self.circuit, logits, False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        constraint = "" if self.circuit is None else f"{self.circuit.constraint!r}, "
        n, S = self._parameters.coins.shape
        return f"PriorDistribution({constraint}n={n}, latent={S}, batch={tuple(self._batch_shape)})"


def log_prior(weights: Weights, vtree: Vtree, selected: Tensor) -> Tensor:
    """[...] float64 log prior(S) of masks [..., N] bool, whatever a constraint says."""
    rows = selected.reshape(-1, selected.shape[-1])
    worlds = torch.stack([rows, ~rows], -1)  # what is not the case: (absent, present)
    literals_TN2 = torch.zeros_like(worlds, dtype=torch.float64).masked_fill(worlds, -math.inf)
    with without_autocast(literals_TN2):
        found = sweep.log_root(everything(vtree), literals_TN2, weights)
    return found.reshape(selected.shape[:-1])
