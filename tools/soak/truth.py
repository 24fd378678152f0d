"""The truth: log Z in plain float64, by enumeration or by a walk; all the rest is its derivatives.

Legend: T rows, W subsets, N variables, C = N + 1 counts; theta the logits, phi the count potential.

    F(theta, phi) = log sum over allowed S of exp(theta . z_S + phi[|S|])

Infinite logits are evidence: subsets that contradict it have no weight, and it adds nothing to that of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tools.soak.rules import Masks, Rule

ENUMERATED = 10
# In place of -inf, so that gradients stay finite; beyond any sum of logits.
DEAD = -1e30


def worlds(n: int) -> Masks:
    """[W, N] all subsets of n variables; variable i is bit i of the index."""
    found: Masks = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1 == 1
    return found


@dataclass(eq=False)
class Truth:
    """What is true of rows of logits, as differentiable functions of them.

    Attributes:
        rule: what is allowed.
        theta: [T, N] float64, may require a gradient.
        phi: [T, C] float64, or None.
    """

    rule: Rule
    theta: Tensor
    phi: Tensor | None = None

    @cached_property
    def lost(self) -> Tensor:
        """[T] bool, rows with NaN or without any subset."""
        nan = self.theta.isnan().any(-1)
        return nan if self.phi is None else nan | self.phi.isnan().any(-1)

    @cached_property
    def _free(self) -> Tensor:
        return torch.where(self.theta.isfinite(), self.theta, 0.0)

    @cached_property
    def magnitude(self) -> Tensor:
        """[T] the sum of the sizes of all finite logits."""
        return self._free.detach().abs().sum(-1)

    @cached_property
    def _forced(self) -> Tensor:
        return (self.theta == math.inf).double()

    @cached_property
    def _forbidden(self) -> Tensor:
        return (self.theta == -math.inf).double()

    @cached_property
    def _phi(self) -> Tensor:
        if self.phi is None:
            return self.theta.new_zeros(len(self.theta), self.rule.n + 1)
        return torch.where(self.phi.isfinite(), self.phi, torch.where(self.phi.isnan(), 0.0, DEAD))

    def log_weights(self, masks: Tensor) -> Tensor:
        """[T] theta . z + phi[|z|] of one subset [T, N] per row; DEAD where it is not allowed."""
        z = masks.double()
        broken = (self._forced * (1 - z) + self._forbidden * z).sum(-1)
        score = (self._free * z).sum(-1) + self._phi.gather(-1, masks.sum(-1, keepdim=True)).squeeze(-1)
        return self._where_possible(masks, broken, score)

    def log_weights_of_all(self) -> Tensor:
        """[T, W] the same of all subsets."""
        masks = torch.from_numpy(worlds(self.rule.n))
        z = masks.double()
        broken = self._forced @ (1 - z).T + self._forbidden @ z.T
        return self._where_possible(masks, broken, self._free @ z.T + self._phi[:, masks.sum(-1)])

    def _where_possible(self, masks: Tensor, broken: Tensor, score: Tensor) -> Tensor:
        allowed = torch.from_numpy(self.rule.allows(masks.numpy()))
        return torch.where(allowed & (broken == 0) & (score > DEAD / 2), score, DEAD)

    @cached_property
    def log_partition(self) -> Tensor:
        """[T]; NaN in lost rows."""
        found = self._enumerated() if self.rule.n <= ENUMERATED else self._walked()
        self.lost = self.lost | (found.detach() < DEAD / 2)
        return found.masked_fill(self.lost, math.nan)

    def _enumerated(self) -> Tensor:
        return torch.logsumexp(self.log_weights_of_all(), -1)

    def _walked(self) -> Tensor:
        """Over the variables in order, all states with the same future as one; potentials need the count as well."""
        assert self.rule.walk is not None
        first, step, last = self.rule.walk
        counted = self.phi is not None
        states: dict[tuple[Hashable, int], Tensor] = {(first, 0): self.theta.new_zeros(len(self.theta))}
        for i in range(self.rule.n):
            off = torch.where(self.theta[:, i] == math.inf, DEAD, 0.0)
            on = torch.where(self.theta[:, i] == -math.inf, DEAD, self._free[:, i])
            ways: dict[tuple[Hashable, int], list[Tensor]] = {}
            for (state, count), weight in states.items():
                for selected, more in ((False, off), (True, on)):
                    key = (step(state, i, selected), count + selected if counted else 0)
                    ways.setdefault(key, []).append(weight + more)
            states = {key: torch.logsumexp(torch.stack(found), 0).clamp(min=DEAD) for key, found in ways.items()}
        ends = [w + self._phi[:, count] for (state, count), w in states.items() if last(state)]
        return torch.logsumexp(torch.stack(ends), 0) if ends else self.theta.new_full((len(self.theta),), DEAD)

    @cached_property
    def marginals(self) -> Tensor:
        """[T, N]."""
        found = _slope(self.log_partition[~self.lost].sum(), self.theta)
        found = torch.where(self.theta == math.inf, 1.0, found)
        return found.masked_fill(self.lost[:, None], math.nan)

    @cached_property
    def count_probs(self) -> Tensor:
        """[T, C]; of rules that are enumerated, or with a potential."""
        if self.rule.n > ENUMERATED:
            assert self.phi is not None
            found = _slope(self.log_partition[~self.lost].sum(), self.phi)
            return found.masked_fill(self.lost[:, None], math.nan)
        every = worlds(self.rule.n)
        probs = torch.exp(self.log_weights_of_all() - self.log_partition[:, None])
        return probs @ torch.from_numpy(every.sum(1)[:, None] == np.arange(self.rule.n + 1)).double()

    @cached_property
    def entropy(self) -> Tensor:
        """[T]."""
        found = self.log_partition - (self._free * self.marginals).sum(-1)
        if self.phi is not None:
            found = found - (torch.where(self.phi.isfinite(), self.phi, 0.0) * self.count_probs).sum(-1)
        return found

    def log_prob(self, masks: Tensor) -> Tensor:
        """[T] of one subset per row; -inf where it is not allowed."""
        weight = self.log_weights(masks)
        return torch.where(weight < DEAD / 2, -math.inf, weight - self.log_partition).masked_fill(self.lost, math.nan)


def _slope(total: Tensor, by: Tensor) -> Tensor:
    """The gradient; zero where nothing depends on ``by``, as where nothing may be selected."""
    if not total.requires_grad:
        return torch.zeros_like(by)
    (found,) = torch.autograd.grad(total, by, create_graph=True, allow_unused=True, materialize_grads=True)
    return found


def derivative(found: Callable[[], Tensor] | Tensor, by: Tensor, along: Tensor) -> Tensor:
    """The gradient of <along, found> over the entries that are numbers; zero where nothing depends on ``by``."""
    value = found() if callable(found) else found
    usable = torch.where(value.isfinite(), value, 0.0) if not bool(value.isfinite().all()) else value
    if not usable.requires_grad:
        return torch.zeros_like(by)
    (gradient,) = torch.autograd.grad(
        (usable * along).sum(), by, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient
