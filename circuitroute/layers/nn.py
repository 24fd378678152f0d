"""Logic layers: a constraint as the last layer of a network, for everyone whose labels obey rules.

``ConstraintLayer(circuit)`` turns features or logits into a distribution over the subsets of labels that a constraint
allows: a semantic probabilistic layer (Ahmed et al. 2022, arXiv:2206.00426), exact, with predictions that cannot
violate the constraint. :func:`log_likelihood` scores labels, complete or partial, under it.

Legend: N variables (labels), H features, C components; leading dimensions are a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily

from circuitroute._tensors import batched, traced, without_autocast
from circuitroute._validate import as_flag, as_mask, as_real, int_at_least
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution, validating
from circuitroute.inference.mixture import SubsetMixture as SubsetMixture

# What stands for "not known" among labels, beside NaN.
UNKNOWN = -1


class ConstraintLayer(nn.Module):
    """Logits, or features, to the distribution over the subsets of N labels that a constraint allows.

    ``layer(logits)`` is ``circuit(logits)``. With ``in_features`` the layer owns the linear map from features to
    logits. With ``components`` the distribution is a mixture of C gates over the one circuit: labels that are
    independent of one another but for the constraint, given the component, need not be so in a mixture.

    What comes out has ``log_prob``, ``marginals``, ``sample``, ``mode`` (always allowed), ``condition(include=,
    exclude=)`` and ``log_evidence``; train it by ``-layer.log_likelihood(layer(x), labels).mean()``.

    Args:
        constraint: a circuit; or a constraint over ``n`` variables, which is compiled.
        n: N, needed where a constraint is given that does not say it, as clauses do.
        in_features: H; the layer is given features [..., H] then. None: it is given logits.
        components: C, at least 1, for a mixture (:class:`SubsetMixture`); None for one distribution.
        bias: whether the linear maps have one; only with ``in_features``.
        validate_args: of the distributions; torch's default when None.
        device, dtype: of the linear maps' parameters; only with ``in_features``.

    Attributes:
        circuit: the compiled constraint.
        linear: the map from features to logits, N outputs or C N; None without ``in_features``.
        mixture: the map from features to the logits of the C components; None without either.

    Raises:
        TypeError: a constraint without ``n`` that does not say it; sizes that are no integers.
        ValueError: a circuit over another number of variables, a size below 1.
        UnsupportedConstraintError: neither a circuit nor a constraint.
        InfeasibleError: no subset satisfies the constraint.
    """

    def __init__(
        self,
        constraint: Constraint | Circuit,
        n: int | None = None,
        *,
        in_features: int | None = None,
        components: int | None = None,
        bias: bool = True,
        validate_args: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.circuit = compile_constraint(constraint, n)
        self.in_features = None if in_features is None else int_at_least("in_features", in_features, 1)
        self.components = None if components is None else int_at_least("components", components, 1)
        self.validate_args = None if validate_args is None else as_flag("validate_args", validate_args)
        with_bias, C = as_flag("bias", bias), self.components or 1
        self.linear: nn.Linear | None = None
        self.mixture: nn.Linear | None = None
        if self.in_features is not None:
            self.linear = nn.Linear(self.in_features, C * self.circuit.n, with_bias, device, dtype)
            if self.components is not None:
                self.mixture = nn.Linear(self.in_features, C, with_bias, device, dtype)

    def forward(self, inputs: Tensor, mixture_logits: Tensor | None = None) -> SubsetDistribution | SubsetMixture:
        """The distribution, of batch [...].

        Args:
            inputs: features [..., H] if the layer has ``in_features``; else logits [..., N], or [..., C, N] of C
                components, of any floating dtype. -inf forbids a label, +inf forces it.
            mixture_logits: [..., C], logits of the components' weights, where the layer is given logits; equal weights
                when None.

        Raises:
            TypeError: anything but tensors of real numbers.
            ValueError: wrong shapes; ``mixture_logits`` where there is no mixture, or where features give the weights;
                when validating, NaN or evidence that leaves no subset, by row.
        """
        if self.linear is not None:
            logits, weights = self._mapped(inputs, mixture_logits)
        else:
            logits, weights = inputs, mixture_logits
        if self.components is None:
            if weights is not None:
                raise ValueError("mixture_logits were given, and the layer is no mixture: set components=")
            return self.circuit(logits, validate_args=self.validate_args)
        return self._mixed(as_real("inputs", logits), weights)

    def _mapped(self, inputs: Tensor, mixture_logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits [..., N] or [..., C, N], and those of the components; never in less than the weights' precision."""
        if mixture_logits is not None:
            raise ValueError("mixture_logits were given, and the layer has in_features, from which it finds its own")
        features = as_real("inputs", inputs)
        linear, H = self.linear, self.in_features
        assert linear is not None  # since the layer has in_features
        if features.dim() == 0 or features.shape[-1] != H:
            raise ValueError(f"inputs have shape {tuple(features.shape)}: the last dimension must be in_features={H}")
        with without_autocast(features):
            features = features.to(linear.weight.dtype)
            logits = linear(features)
            weights = None if self.mixture is None else self.mixture(features)
        if self.components is not None:
            logits = logits.unflatten(-1, (self.components, self.circuit.n))
        return logits, weights

    def _mixed(self, logits: Tensor, weights: Tensor | None) -> SubsetMixture:
        """The mixture of C distributions."""
        C, N = self.components, self.circuit.n
        if logits.dim() < 2 or logits.shape[-2:] != (C, N):
            raise ValueError(
                f"inputs have shape {tuple(logits.shape)}: the last dimensions must be components={C} and n={N}"
            )
        parts = self.circuit(logits, validate_args=self.validate_args)
        if weights is None:
            weights = parts.logits.new_zeros(logits.shape[:-1])
        else:
            weights = as_real("mixture_logits", weights, floating=True).to(parts.logits)
            if weights.shape != logits.shape[:-1]:
                raise ValueError(
                    f"mixture_logits have shape {tuple(weights.shape)}: there must be one for each component, "
                    f"{tuple(logits.shape[:-1])}"
                )
        if validating(self.validate_args, logits, weights) and bool(weights.isnan().any()):
            raise ValueError("mixture_logits hold NaN")
        return SubsetMixture(Categorical(logits=weights, validate_args=False), parts, self.validate_args)

    def log_likelihood(
        self, distribution: SubsetDistribution | MixtureSameFamily, labels: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """:func:`log_likelihood`."""
        return log_likelihood(distribution, labels, known)

    def extra_repr(self) -> str:
        """What repr() shows."""
        shown = f"{self.circuit.constraint!r}, n={self.circuit.n}"
        for name in ("in_features", "components", "validate_args"):
            value = getattr(self, name)
            shown += "" if value is None else f", {name}={value}"
        return shown


def log_likelihood(
    distribution: SubsetDistribution | MixtureSameFamily, labels: Tensor, known: Tensor | None = None
) -> Tensor:
    """[...] log-probability of labels, some of which may be missing: of those that are known, the others summed out.

    Minus this is the loss of a semantic probabilistic layer. Differentiable.

    Args:
        distribution: what a :class:`ConstraintLayer`, or a circuit, gives for [...] rows; or a mixture of the latter.
        labels: [..., N] of 0 and 1, or bool; NaN, or -1, is a label that is not known.
        known: [..., N] bool (or 0/1), whether each label is known; what the others hold does not matter. None: all but
            those that are NaN or -1.

    Returns:
        [...] at most 0. With all labels known it is ``distribution.log_prob(labels)``; otherwise
        ``distribution.log_evidence``, which takes two sweeps.

    Raises:
        TypeError: labels that are no tensor of real numbers.
        ValueError: wrong last dimensions; a known label other than 0 and 1; when validating, labels that no allowed
            subset agrees with, by row.
    """
    if isinstance(distribution, MixtureSameFamily) and not isinstance(distribution, SubsetMixture):
        parts: Any = distribution.component_distribution  # made by hand
        distribution = SubsetMixture(distribution.mixture_distribution, parts, distribution._validate_args)
    if not isinstance(distribution, (SubsetDistribution, SubsetMixture)):
        raise TypeError(f"distribution={distribution!r}: expected what a ConstraintLayer, or a circuit, gives")
    n, device = distribution.circuit.n, distribution.logits.device
    labels = as_real("labels", labels).to(device)
    if labels.dim() == 0 or labels.shape[-1] != n:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: the last dimension must be n={n}")
    given = _known(labels, None if known is None else as_mask("known", known, n).to(device))
    unseen = batched() or traced(labels, given)  # whose values cannot be looked at
    wrong = given & (labels != 0) & (labels != 1)
    if not unseen and bool(wrong.any()):
        raise ValueError(
            f"labels hold {labels.expand_as(wrong)[wrong][0].item()}: every known label must be 0 or 1; NaN or "
            f"{UNKNOWN} is one that is not known"
        )
    chosen = labels == 1
    complete = (labels.dtype == torch.bool and known is None) or (not unseen and bool(given.all()))
    if complete:
        return distribution.log_prob(chosen.expand_as(given))
    return distribution.log_evidence(include=chosen & given, exclude=~chosen & given)


def _known(labels: Tensor, known: Tensor | None) -> Tensor:
    """[..., N] bool, which labels are known."""
    if known is not None:
        return known.expand(torch.broadcast_shapes(known.shape, labels.shape))
    if labels.dtype == torch.bool:
        return torch.ones_like(labels)
    return ~(labels.isnan() | (labels == UNKNOWN))
