"""A learned prior over subsets: a latent tree on a vtree, as a module with trainable weights.

Legend: N variables, S latent states, K terms of a mixture, T masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Size, Tensor, nn

from circuitroute._tensors import plain
from circuitroute._validate import as_int, as_mask, as_number, int_at_least, one_of
from circuitroute.circuit.vtree import Vtree
from circuitroute.compilation import compile as compiled
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.rows import as_logits
from circuitroute.keys import random_key, uniform
from circuitroute.priors import expectation, latent_tree
from circuitroute.priors.distribution import PriorDistribution, log_prior
from circuitroute.priors.states import everything, states_of
from circuitroute.priors.sweep import Parameters, Weights


class SubsetPrior(nn.Module):
    """A distribution over all subsets of n variables whose weights are learned: a probabilistic circuit.

    The circuit is a latent tree on a vtree: every vtree node has ``states`` latent states, each a distribution over the
    variables below it. Of a leaf that is a coin, of an inner node a mixture of products of the halves' latent states.
    It is smooth and structured-decomposable, so it can be multiplied with any constraint whose circuit respects the
    same vtree (:meth:`constrained`), and everything about the product is exact but entropy and mode.

    Train by gradient (the log-weights are parameters; ``-prior.log_prob(masks).mean()`` is a loss) or by expectation
    maximisation (:meth:`em_step`).

    Args:
        n: number of variables N.
        states: latent states S per vtree node; 1 makes the variables independent.
        vtree: which variables are split from which, from the root down; balanced, in their natural order, if None.
            Constraints on the count go with any vtree, others need their own, :meth:`Vtree.of_circuit`.
        layers: what the terms of a mixture are. "cp": the products of equal latent states, K = S, as in hidden Chow-Liu
            trees; "tucker": of all pairs of latent states, K = S * S (the names are those of Loconte et al. 2024).
        seed: of the initial weights, which are the same on every machine.
        device, dtype: of the parameters.

    Attributes:
        root_logits: [K] the root's mixture; of one variable alone, [S].
        mixture_logits: [N - 2, S, K] those of the other inner nodes, in the vtree's order.
        coin_logits: [N, S] log-odds of a variable in each latent state of its leaf.

    Raises:
        TypeError, ValueError: ``n`` or ``states`` is no positive integer, ``vtree`` no vtree over n variables, or
            ``layers`` no known word.
    """

    def __init__(
        self,
        n: int,
        states: int = 8,
        *,
        vtree: Vtree | None = None,
        layers: str = "cp",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n, self.states = int_at_least("n", n, 1), int_at_least("states", states, 1)
        self.layers = one_of("layers", layers, ("cp", "tucker"))
        self.vtree = Vtree.balanced(self.n) if vtree is None else _as_vtree(vtree, self.n)
        self.seed = as_int("seed", seed)
        S = self.states
        K = S * S if self.layers == "tucker" else S
        shapes = {
            "root_logits": (K if self.n > 1 else S,),
            "mixture_logits": (max(0, self.n - 2), S, K),
            "coin_logits": (self.n, S),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    root_logits: nn.Parameter
    mixture_logits: nn.Parameter
    coin_logits: nn.Parameter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial weights: every mixture uniform on the simplex, every coin's log-odds logistic."""
        for i, parameter in enumerate(self.parameters()):
            key = random_key(self.seed, i).reshape(1)
            u = uniform(key, 0, parameter.numel(), torch.float64).reshape(parameter.shape)
            parameter.copy_(u.logit() if parameter is self.coin_logits else (-u.log()).log())

    def log_weights(self) -> Weights:
        """Log-probabilities of the latent tree in float64, as functions of the parameters."""
        return self._free().weights()

    def _free(self) -> Parameters:
        return Parameters(self.root_logits, self.mixture_logits, self.coin_logits)

    def forward(self, logits: Tensor | None = None, validate_args: bool | None = None) -> PriorDistribution:
        """The prior as a distribution, tilted by logits: p(S) ~ prior(S) exp(sum of the logits of S).

        Args:
            logits: [..., N], -inf forbids a variable and +inf forces it; None for none.
            validate_args: None follows torch.distributions' default.

        Raises:
            TypeError, ValueError: as :class:`circuitroute.SubsetDistribution`.
        """
        return self._distribution(None, logits, validate_args)

    def constrained(
        self, constraint: Constraint | Circuit, logits: Tensor | None = None, validate_args: bool | None = None
    ) -> PriorDistribution:
        """The prior times a hard constraint: p(S) ~ prior(S) exp(sum of the logits of S) over the allowed subsets.

        Args:
            constraint: a constraint, compiled for the prior's variables, or a circuit. Its circuit must respect the
                prior's vtree; one on the count of all variables does whatever the vtree is.
            logits: [..., N], -inf forbids a variable and +inf forces it; None for none.
            validate_args: None follows torch.distributions' default.

        Raises:
            TypeError: ``constraint`` is neither.
            ValueError: it does not respect the vtree, naming the node that does not; or as for :meth:`forward`.
            CircuitRouteError: it cannot be compiled.
        """
        if isinstance(constraint, Constraint):
            constraint = compiled(constraint, self.n)
        if not isinstance(constraint, Circuit):
            raise TypeError(f"constraint={constraint!r}: expected a constraint or a circuit, got {_kind(constraint)}")
        return self._distribution(constraint, logits, validate_args)

    def _distribution(
        self, circuit: Circuit | None, logits: Tensor | None, validate_args: bool | None
    ) -> PriorDistribution:
        dtype = torch.promote_types(self.coin_logits.dtype, torch.float32)
        if logits is None:
            given = torch.zeros(self.n, dtype=dtype, device=self.coin_logits.device)
        else:
            given = as_logits(logits, self.n)
            given = given.to(torch.promote_types(given.dtype, dtype))
        states = everything(self.vtree) if circuit is None else states_of(circuit, self.vtree)
        return PriorDistribution(self._free(), states, circuit, given, validate_args)

    def log_prob(self, mask: Tensor) -> Tensor:
        """[...] log prior(S) of masks [..., N], bool or 0/1; differentiable in the parameters.

        Raises:
            ValueError: a wrong last dimension, or values that are not 0 or 1.
        """
        found = log_prior(self.log_weights(), self.vtree, as_mask("mask", mask, self.n))
        return found.to(torch.promote_types(self.coin_logits.dtype, torch.float32))

    def marginals(
        self, include: Tensor | Iterable[int] | None = None, exclude: Tensor | Iterable[int] | None = None
    ) -> Tensor:
        """[..., N] P(i in S | S contains ``include`` and avoids ``exclude``); see :meth:`condition`."""
        return self.condition(include, exclude).marginals

    def log_evidence(
        self, include: Tensor | Iterable[int] | None = None, exclude: Tensor | Iterable[int] | None = None
    ) -> Tensor:
        """[...] log P(S contains ``include`` and avoids ``exclude``); see :meth:`condition`."""
        return self.condition(include, exclude).log_partition

    def condition(
        self, include: Tensor | Iterable[int] | None = None, exclude: Tensor | Iterable[int] | None = None
    ) -> PriorDistribution:
        """The prior given that S contains ``include`` and avoids ``exclude``: masks [..., N], or indices of variables.

        Raises:
            ValueError: an index out of range, a mask of another size, or a variable both included and excluded.
        """
        return self.forward().condition(include, exclude)

    def sample(self, sample_shape: Iterable[int] = (), key: Tensor | int | None = None) -> Tensor:
        """[*sample_shape, N] masks of exactly 0 and 1; see :meth:`PriorDistribution.sample`."""
        return self.forward().sample(Size(sample_shape), key)

    def em_step(
        self, masks: Tensor, step_size: float = 1.0, smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """One step of expectation maximisation on a batch: every weight becomes its expected share.

        The expected counts (the flows of the circuit) are those under the present weights, exact. On all data, with
        ``step_size=1`` and no smoothing, no step lowers the mean log-likelihood. Steps on mini-batches move a part of
        the way: weights = (1 - step_size) weights + step_size expected shares (Liang & Klein, Online EM, 2009).

        Args:
            masks: [..., N] observed subsets, bool or 0/1.
            step_size: in (0, 1].
            smoothing: how many observations' worth of equal counts are added to each distribution of the circuit
                (Laplace); at least 0.
            weights: [...] how much each mask counts, at least 0; once, if None.

        Returns:
            [] the mean log-likelihood of the masks before the step, in nats, float64.

        Raises:
            TypeError, ValueError: shapes or numbers out of range; no masks, or none of any weight.
        """
        selected = as_mask("masks", masks, self.n).reshape(-1, self.n)
        counted = _as_counts(weights, masks.shape[:-1], selected.device)
        step, extra = as_number("step_size", step_size), as_number("smoothing", smoothing)
        if not 0 < step <= 1:
            raise ValueError(f"step_size={step}: must be in (0, 1]; 1 takes the expected shares themselves")
        if not 0 <= extra < math.inf:
            raise ValueError(f"smoothing={extra}: must be at least 0, and finite")
        if not len(selected) or not float(counted.sum()) > 0:
            raise ValueError(f"masks has shape {tuple(masks.shape)}: give at least one mask of positive weight")
        before = self.log_weights()
        mean, flows = expectation.flows(before, self.vtree, selected, counted)
        self._take(expectation.maximised(before, flows, step, extra))
        return mean

    @torch.no_grad()
    def _take(self, weights: Weights) -> None:
        """Set the parameters to log-weights, kept finite in their dtype."""
        coins = weights.coins[..., 1] - weights.coins[..., 0]
        for parameter, values in zip(self.parameters(), (weights.root, weights.mixtures, coins), strict=True):
            most = -math.log(torch.finfo(parameter.dtype).tiny)
            parameter.copy_(values.clamp(-most, most))

    def to_pyjuice(self) -> Any:
        """The root of the prior as a PyJuice circuit with the same weights; see :mod:`circuitroute.priors.latent_tree`.

        Raises:
            ImportError: PyJuice is not installed.
        """
        return latent_tree.to_pyjuice(self.log_weights(), self.vtree)

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"n={self.n}, states={self.states}, layers={self.layers!r}"


def _kind(value: object) -> str:
    return type(value).__name__


def _as_vtree(vtree: object, n: int) -> Vtree:
    if not isinstance(vtree, Vtree):
        raise TypeError(f"vtree={vtree!r}: expected a Vtree, such as Vtree.of_circuit(circuit); got {_kind(vtree)}")
    if vtree.n != n:
        raise ValueError(f"vtree is over {vtree.n} variables: it must be over n={n}")
    return vtree


def _as_counts(weights: Tensor | None, shape: Size, device: torch.device) -> Tensor:
    """[T] float64, how much each mask counts."""
    if weights is None:
        return torch.ones(shape.numel(), dtype=torch.float64, device=device)
    given = plain("weights", weights)
    if given.is_complex():
        raise TypeError(f"weights has dtype {given.dtype}: expected real numbers")
    if given.shape != shape:
        raise ValueError(f"weights has shape {tuple(given.shape)}: it must be that of the masks, {tuple(shape)}")
    counted = given.detach().to(device, torch.float64).reshape(-1)
    if not bool(((counted >= 0) & (counted < math.inf)).all()):
        raise ValueError("weights holds a value that is negative, infinite or NaN: every mask counts 0 or more")
    return counted
