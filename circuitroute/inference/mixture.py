"""A mixture of distributions on one circuit: several gates over it, as semantic probabilistic layers have them.

Legend: C components, N variables; leading dimensions are a batch. Component c has weight w_c and distribution p_c.

    p(S) = sum_c w_c p_c(S)      p(S | e) = sum_c w_c' p_c(S | e),  w_c' ~ w_c p_c(e)

Every component gives probability to allowed subsets alone, and so does the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Categorical, MixtureSameFamily

from circuitroute._validate import as_mask
from circuitroute.inference.distribution import AllowedSubsets, SubsetDistribution, satisfies, validating
from circuitroute.inference.evidence import as_selections, rows_text
from circuitroute.keys import fold_in, sample_keys, uniform

# What the key of a sample is folded with for the choice of its component, so that the two are independent.
_CHOICE = 0x636F6D70


class SubsetMixture(MixtureSameFamily):
    """sum_c w_c p_c(S): a torch.distributions.MixtureSameFamily that answers as a distribution over subsets does.

    Args:
        mixture_distribution: a Categorical over the C components, batch [...].
        component_distribution: ``circuit(logits)`` with logits [..., C, N].
        validate_args: whether to check values (torch's default when None); that of the components is theirs.

    Raises:
        TypeError: components that are no distribution over subsets.
        ValueError: batches or numbers of components that do not fit together.
    """

    def __init__(
        self,
        mixture_distribution: Categorical,
        component_distribution: SubsetDistribution,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(component_distribution, SubsetDistribution):
            raise TypeError(
                f"component_distribution={component_distribution!r}: expected a cr.SubsetDistribution, such as "
                "circuit(logits) with logits [..., C, N]"
            )
        if not component_distribution.batch_shape:
            raise ValueError(
                "component_distribution has no batch: its last batch dimension must be that of the C components, as of "
                "circuit(logits) with logits [..., C, N]"
            )
        checked = validating(validate_args, component_distribution.logits)
        super().__init__(mixture_distribution, component_distribution, validate_args=False)
        self._validate_args = checked

    @property
    def circuit(self) -> Any:
        """The compiled constraint."""
        return self._parts.circuit

    @property
    def logits(self) -> Tensor:
        """[..., C, N] the logits of the components."""
        return self._parts.logits

    @property
    def _parts(self) -> SubsetDistribution:
        parts = self._component_distribution
        assert isinstance(parts, SubsetDistribution)  # as __init__ has seen
        return parts

    @property
    def _log_weights(self) -> Tensor:
        """[..., C] log w_c."""
        return self._mixture_distribution.logits.log_softmax(-1)

    @property
    def support(self) -> AllowedSubsets:
        """The 0/1 masks of allowed subsets."""
        return self._parts.support

    @property
    def marginals(self) -> Tensor:
        """[..., N] P(i in S). Differentiable."""
        return (self._log_weights.exp().unsqueeze(-1) * self._parts.marginals).sum(-2)

    @property
    def mean(self) -> Tensor:
        """[..., N] the marginals."""
        return self.marginals

    @property
    def variance(self) -> Tensor:
        """[..., N] m (1 - m)."""
        marginals = self.marginals
        return marginals * (1 - marginals)

    def log_prob(self, value: Tensor) -> Tensor:
        """[...] log p(S) of masks [..., N] (bool or 0/1). Differentiable.

        Raises:
            ValueError: a wrong last dimension or values that are not 0 or 1; when validating, masks that the constraint
                does not allow, named by row.
        """
        selected = as_mask("value", value, self._parts.circuit.n)
        if self._validate_args:
            allowed = satisfies(self._parts.circuit, selected)
            if not bool(allowed.all()):
                raise ValueError(f"value does not satisfy {self._parts.circuit.constraint!r} in {rows_text(~allowed)}")
        return self._mixed(self._parts.log_prob(selected.unsqueeze(-2)))

    def log_evidence(
        self,
        include: Tensor | Iterable[int] | None = None,
        exclude: Tensor | Iterable[int] | None = None,
    ) -> Tensor:
        """[...] log P(S contains ``include`` and avoids ``exclude``); see :meth:`SubsetDistribution.log_evidence`."""
        return self._mixed(self._parts.log_evidence(*self._selections(include, exclude)))

    def condition(
        self,
        include: Tensor | Iterable[int] | None = None,
        exclude: Tensor | Iterable[int] | None = None,
    ) -> SubsetMixture:
        """The distribution given that S contains ``include`` and avoids ``exclude``, again a mixture.

        Components count by how well they foresaw the evidence: the weights become w_c P_c(evidence), normalised. One
        whose own infinite logits rule it out has weight 0, and the evidence for its logits.

        Args:
            include, exclude: as in :meth:`SubsetDistribution.condition`.

        Raises:
            ValueError: as there; when validating, also evidence that no component leaves possible.
        """
        chosen, banned = self._selections(include, exclude)
        evidence = self._parts.log_evidence(chosen, banned)
        joint = self._log_weights + evidence
        if self._validate_args and bool((lost := (joint == -math.inf).all(-1)).any()):
            raise ValueError(
                f"include or exclude contradicts the infinite logits of all components in {rows_text(lost)}"
            )
        logits = torch.where((evidence == -math.inf).unsqueeze(-1), 0.0, self._parts.logits)
        given = torch.where(chosen, math.inf, torch.where(banned, -math.inf, logits))
        parts = SubsetDistribution(
            self._parts.circuit, given, self._parts.count_potential, validate_args=self._parts._validate_args
        )
        return SubsetMixture(Categorical(logits=joint, validate_args=False), parts, self._validate_args)

    def _selections(
        self, include: Tensor | Iterable[int] | None, exclude: Tensor | Iterable[int] | None
    ) -> tuple[Tensor, Tensor]:
        """Masks [..., 1, N] bool, which broadcast with the components."""
        chosen, banned = as_selections(self._parts.circuit.n, include, exclude, self._parts.logits.device)
        return chosen.unsqueeze(-2), banned.unsqueeze(-2)

    def _mixed(self, each: Tensor) -> Tensor:
        """[...] log of sum_c w_c exp(each_c); -inf, without a gradient, where all are."""
        joint = each + self._log_weights
        impossible = (joint == -math.inf).all(-1)
        mixed = torch.where(impossible.unsqueeze(-1), 0.0, joint).logsumexp(-1)
        return torch.where(impossible, -math.inf, mixed)

    @property
    def mode(self) -> Tensor:
        """[..., N] the best of the components' modes by the mixture's own log_prob: always an allowed subset.

        The subset that is most probable in all is NP-hard to find in a mixture; with one component, or with one that
        dominates, this is it. Of several equally good modes the one of the first component is taken.
        """
        with torch.no_grad():
            parts = self._parts
            modes = parts.mode_mask().movedim(-2, 0)
            scores = self._mixed(parts.log_prob(modes.unsqueeze(-2)))
            best = scores.argmax(0)
            index = best.unsqueeze(0).unsqueeze(-1).expand(1, *best.shape, modes.shape[-1])
            found = modes.gather(0, index).squeeze(0).to(parts.logits.dtype)
            return found.masked_fill(scores.isnan().any(0).unsqueeze(-1), math.nan)

    def sample(self, sample_shape: Iterable[int] = (), key: Tensor | int | None = None) -> Tensor:
        """[*sample_shape, ..., N] masks of exactly 0 and 1: a component by its weight, then a subset of it.

        Args:
            sample_shape, key: as in :meth:`SubsetDistribution.sample`; a sample is a function of the row and its key.
        """
        with torch.no_grad():
            parts, shape = self._parts, Size(sample_shape)
            batch = self.batch_shape
            keys = sample_keys(key, shape, batch, parts.logits.device)
            weights = self._log_weights.double().exp().expand(*batch, -1).expand(*shape, *batch, -1)
            running = weights.reshape(-1, weights.shape[-1]).cumsum(-1)
            u = uniform(fold_in(keys, torch.tensor(_CHOICE, device=keys.device)), 0, 1, torch.float64).reshape(-1, 1)
            component = (running <= u * running[:, -1:]).sum(-1).reshape(*shape, *batch, 1, 1)
            logits = _picked(parts.logits, component)
            potential = parts.count_potential
            if potential is not None and potential.dim() > 1:
                potential = _picked(potential.expand(*parts.batch_shape, -1), component)
            drawn = SubsetDistribution(parts.circuit, logits, potential, validate_args=False)
            drawn._validate_args = parts._validate_args
            mask = drawn.sample(key=keys.reshape(shape + batch))
            lost = weights.isnan().any(-1, keepdim=True)
            invalid = parts.invalid_rows()
            return mask.masked_fill(lost if invalid is None else lost | invalid.any(-1, keepdim=True), math.nan)

    def expand(self, batch_shape: Iterable[int], _instance: Any = None) -> SubsetMixture:
        """The same distribution with a larger batch shape, sharing memory."""
        shape = Size(batch_shape)
        return SubsetMixture(
            self._mixture_distribution.expand(shape),
            self._parts.expand((*shape, self._num_component)),
            self._validate_args,
        )

    def __repr__(self) -> str:
        circuit = self._parts.circuit
        return (
            f"SubsetMixture({circuit.constraint!r}, n={circuit.n}, components={self._num_component}, "
            f"batch={tuple(self.batch_shape)})"
        )


def _picked(values: Tensor, component: Tensor) -> Tensor:
    """[*sample, ..., X] the entries of values [..., C, X] at component [*sample, ..., 1, 1]."""
    lead = component.shape[:-2]
    index = component.expand(*lead, 1, values.shape[-1])
    return values.expand(*lead, *values.shape[-2:]).gather(-2, index).squeeze(-2)
