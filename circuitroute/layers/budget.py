"""A budget of experts over the layers of a network, which every token keeps.

Legend: T tokens, L layers, E experts per layer, J counts 0..K of a layer, C totals 0..(largest allowed total).

With theta_l the router logits of layer l and phi_l preferences over its count, the subsets of all layers together are
distributed as

    p(S_1, ..., S_L) ~ prod_l exp(phi_l(|S_l|) + sum_{i in S_l} theta_l,i),

restricted to counts that each layer allows and whose total the budget allows. Summed over the subsets, a layer is its
count polynomial, log E_l(j) = log sum_{|S| = j} exp(sum_{i in S} theta_l,i), and the weight of all ways to go on from
layer l with c experts spent is a backward recursion over the layers,

    V_{L+1}(c) = 0 if the budget allows the total c, else -inf,
    V_l(c)     = log sum_j exp(phi_l(j) + log E_l(j) + V_{l+1}(c + j)).

So p(S_l | S_1, ..., S_{l-1}) is the distribution of one layer under the count potential phi_l(j) + V_{l+1}(c + j): one
sweep of the count family. In a running network the logits of later layers are not known yet, since they depend on what
this layer does. There a learned vector stands for log E_l. Whatever it holds, the -inf of V are exact: a token never
enters a state that the budget cannot be met from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitroute._validate import as_real, int_at_least
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.engines.subset.naive import log_count_weights
from circuitroute.engines.tables import Tables
from circuitroute.errors import InfeasibleError
from circuitroute.inference.circuit import Circuit
from circuitroute.routing.decision import Routing

# What is allowed: a constraint, or its circuit.
Rule: TypeAlias = Constraint | Circuit
BoolArray = npt.NDArray[np.bool_]

# In place of -inf inside sums of exponentials, so that gradients stay finite; beyond any sum of logits.
DEAD = -1e30


class BudgetState(NamedTuple):
    """Where a forward pass stands: handed from layer to layer, never kept by a module.

    Attributes:
        layer: the next layer, 0 at first.
        spent: [T] int64, experts each token has used so far.
        messages: [L + 1, C] or [T, L + 1, C] float64, V of the layers; a function of the router's parameters.
    """

    layer: int
    spent: Tensor
    messages: Tensor


class Budget(nn.Module):
    """A budget over the layers of a model whose routers are their own: preferences, estimates and count potentials.

    ::

        budget = cr.Budget(16, layers=4, per_layer=cr.Between(1, 8), total=cr.AtMost(16))
        state = budget.begin(hidden)  # once per forward pass
        # and once per layer, in order
        routing = cr.route(logits, circuit, count_potential=budget.potential(state), key=key)
        state = budget.spend(state, routing)

    :func:`circuitroute.integrations.transformers.patch` takes one; :class:`BudgetRouter` is one that has the layers'
    linear maps too, and says how the parameters are learned.

    Args:
        num_experts: E, of every layer.
        layers: L, the number of layers that route; other layers of the model do not count.
        per_layer: what one layer allows: a constraint on the count, such as ``Between(1, 8)``, or one per layer. Or
            circuits of such constraints, over E variables.
        total: the budget, on the sum over all layers, such as ``AtMost(16)`` or ``Between(12, 16)``; or a circuit of
            one, over L E variables.

    Raises:
        InfeasibleError: the layers' counts cannot add up to any allowed total.
        TypeError, ValueError: arguments of the wrong kind; ``per_layer`` of another length than ``layers``; a circuit
            over another number of variables.
    """

    def __init__(
        self,
        num_experts: int,
        layers: int,
        per_layer: Rule | Sequence[Rule],
        total: Rule,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layers = int_at_least("layers", layers, 1)
        self.num_experts = int_at_least("num_experts", num_experts, 1)
        self.per_layer = _per_layer(per_layer, self.layers)
        self.total = total
        circuits = [compile_constraint(constraint, self.num_experts) for constraint in self.per_layer]
        allowed = [_allowed_counts(f"per_layer[{i}]", circuit) for i, circuit in enumerate(circuits)]
        totals = _allowed_totals(total, self.per_layer, allowed, self.layers * self.num_experts)
        self._widths = tuple(circuit.max_count + 1 for circuit in circuits)
        J = max(self._widths)
        self.preferences = nn.Parameter(torch.empty(self.layers, J, device=device))
        self.estimates = nn.Parameter(torch.empty(self.layers, J, device=device))
        feasible, counts = _reachable(allowed, totals, J, self.per_layer, total)
        self._tables = Tables({"feasible": feasible, "counts": counts})
        self._tables.prepare(self.preferences.device)
        self._reset_budget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Budget:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tables.prepare(self.preferences.device)
        return self

    @property
    def feasible(self) -> Tensor:
        """[L + 1, C] bool, from which spent counts the budget can still be met; a copy, on the parameters' device."""
        return self._tables.on(self.preferences.device)["feasible"].clone()

    @property
    def counts(self) -> Tensor:
        """[L, J] bool, the counts that each layer allows; a copy, on the parameters' device."""
        return self._tables.on(self.preferences.device)["counts"].clone()

    def reset_parameters(self) -> None:
        """No preference among counts, and the count polynomials of logits that are all zero."""
        self._reset_budget()

    def _reset_budget(self) -> None:
        with torch.no_grad():
            self.preferences.zero_()
            count = torch.arange(self.estimates.shape[1], device=self.estimates.device, dtype=torch.float64)
            E = self.num_experts
            self.estimates.copy_(math.lgamma(E + 1) - torch.lgamma(count + 1) - torch.lgamma(E - count + 1))

    def begin(self, hidden: Tensor, estimates: Tensor | None = None) -> BudgetState:
        """The state of a forward pass before its first layer.

        Args:
            hidden: [..., H], whose leading dimensions are the tokens T.
            estimates: log count polynomials to use in place of the learned ones, [L, J], or [T, L, J] per token; exact
                ones, see :func:`log_count_polynomial`, make the layers' decisions an exact sample of the joint
                distribution.

        Raises:
            ValueError: shapes that do not fit.
        """
        tokens = hidden.shape[:-1].numel()
        spent = torch.zeros(tokens, dtype=torch.int64, device=hidden.device)
        return BudgetState(0, spent, self.messages(estimates))

    def spend(self, state: BudgetState, routing: Routing) -> BudgetState:
        """The state for the layer after the one that decided ``routing``."""
        return BudgetState(state.layer + 1, state.spent + routing.counts.to(state.spent.device), state.messages)

    def messages(self, estimates: Tensor | None = None) -> Tensor:
        """V [..., L + 1, C] float64: log weight of all continuations, ``DEAD`` where there is none.

        Raises:
            ValueError: ``estimates`` of another shape.
        """
        if estimates is None:
            estimates = self.estimates
        else:
            estimates = as_real("estimates", estimates)
        if estimates.shape[-2:] != self.estimates.shape:
            L, J = self.estimates.shape
            raise ValueError(
                f"estimates have shape {tuple(estimates.shape)}: expected [{L}, {J}] or [tokens, {L}, {J}]"
            )
        weights = self.preferences.double() + estimates.double().clamp(min=DEAD)
        tables = self._tables.on(weights.device)
        weights = weights.masked_fill(~tables["counts"], DEAD)
        J = weights.shape[-1]
        feasible = tables["feasible"]
        later = torch.where(feasible[-1], 0.0, DEAD).double().expand(*weights.shape[:-2], -1)
        found = [later]
        for layer in reversed(range(self.layers)):
            windows = F.pad(later, (0, J - 1), value=DEAD).unfold(-1, J, 1)
            log_sum = (windows + weights[..., layer, None, :]).logsumexp(-1)
            later = torch.where(feasible[layer], log_sum, DEAD)
            found.append(later)
        return torch.stack(found[::-1], dim=-2)

    def potential(self, state: BudgetState, hidden: Tensor | None = None) -> Tensor:
        """[T, K + 1] the count potential of the next layer: its preferences, and what they leave to the others.

        Args:
            state: from :meth:`begin`, or from the layer before.
            hidden: [T, H], needed where a head on it adds to the preferences (``per_token`` of :class:`BudgetRouter`).

        Raises:
            ValueError: all layers have run, or ``hidden`` is missing.
        """
        layer = state.layer
        self._check_layer(layer)
        J = self._widths[layer]
        at = state.spent[:, None] + torch.arange(J, device=state.spent.device)
        later = F.pad(state.messages[..., layer + 1, :], (0, J), value=DEAD)
        # index_select adds its gradient up without sorting, as plain indexing would.
        ahead = later.index_select(0, at.flatten()).view(at.shape) if later.dim() == 1 else later.gather(1, at)
        potential = ahead + self.preferences[layer, :J]
        more = self._more_preferences(layer, hidden)
        if more is not None:
            potential = potential + more[:, :J]
        tables = self._tables.on(at.device)
        feasible = F.pad(tables["feasible"][layer + 1], (0, J))[at]
        possible = tables["counts"][layer, :J] & feasible
        # Probabilities do not change under a constant; taken off in float64, so that float32 can hold the rest.
        largest = torch.where(possible, potential, -math.inf).amax(-1, keepdim=True).detach()
        relative = potential - largest
        return torch.where(possible & (relative > 0.5 * DEAD), relative, -math.inf)

    def _more_preferences(self, layer: int, hidden: Tensor | None) -> Tensor | None:
        """[T, J] what a token adds to the preferences of a layer."""
        return None

    def log_prob(self, routings: Sequence[Routing]) -> Tensor:
        """[T] exact log-probability of every token's path through the layers; differentiable.

        Raises:
            ValueError: not one routing per layer.
        """
        self._check_complete(routings)
        return torch.stack([routing.log_prob for routing in routings]).sum(0)

    def estimation_loss(self, routings: Sequence[Routing]) -> Tensor:
        """How far the estimates are from the layers' true count polynomials: a scalar, 0 when they predict every count.

        The mean over tokens and layers of KL(q || q'), q the exact posterior of the layer's count and q' the one that
        the estimate gives under the same potential. Its gradient reaches ``estimates`` alone.

        Raises:
            ValueError: not one routing per layer, or one of another router.
        """
        self._check_complete(routings)
        terms = []
        for estimate, routing in zip(self.estimates, routings, strict=True):
            distribution = routing.distribution
            exact, potential = distribution.count_probs.detach(), distribution.count_potential
            if potential is None:
                raise ValueError(
                    "routings hold a decision of another router, which has no count potential: give those that this "
                    "budget decided, one per layer"
                )
            possible = potential > -math.inf
            scores = torch.where(possible, potential.detach() + estimate[: exact.shape[-1]], DEAD)
            log_ratio = torch.where(exact > 0, exact, 1.0).log() - scores.log_softmax(-1)
            terms.append(torch.where(exact > 0, exact * log_ratio, 0.0).sum(-1).mean())
        return torch.stack(terms).mean()

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layers:
            raise ValueError(
                f"state.layer={layer}: all {self.layers} layers of this budget have run; plan for more with "
                f"layers=..., and call begin() once per forward pass"
            )

    def _check_complete(self, routings: Sequence[Routing]) -> None:
        if len(routings) != self.layers:
            raise ValueError(f"routings has {len(routings)} entries: expected one per layer, {self.layers}")

    def extra_repr(self) -> str:
        """What repr() shows."""
        shown = self.per_layer[0] if len(set(self.per_layer)) == 1 else list(self.per_layer)
        return f"layers={self.layers}, per_layer={shown!r}, total={self.total!r}"


def log_count_polynomial(logits: Tensor, max_count: int) -> Tensor:
    """[..., max_count + 1] float64, log E(j) = log sum_{|S| = j} exp(sum_{i in S} logits_i); -inf where j > E.

    Logits [..., E] of any floating dtype. Differentiable: the gradient of entry j is the marginals of ``Exactly(j)``.
    """
    most = int_at_least("max_count", max_count, 0)
    logits = as_real("logits", logits, floating=True)
    if logits.dim() == 0:
        raise ValueError("logits have shape (): expected [..., experts]")
    weights = log_count_weights(logits.reshape(-1, logits.shape[-1]), most)
    return weights.reshape(*logits.shape[:-1], most + 1)


def _per_layer(per_layer: Rule | Sequence[Rule], layers: int) -> tuple[Rule, ...]:
    if isinstance(per_layer, (Constraint, Circuit)):
        return (per_layer,) * layers
    if not isinstance(per_layer, Sequence) or not all(isinstance(c, (Constraint, Circuit)) for c in per_layer):
        raise TypeError(f"per_layer={per_layer!r}: expected a count such as cr.Between(1, 8), or one per layer")
    if len(per_layer) != layers:
        raise ValueError(f"per_layer has {len(per_layer)} entries: expected one for each of layers={layers}")
    return tuple(per_layer)


def _allowed_counts(name: str, circuit: Circuit) -> tuple[int, ...]:
    if circuit.counts is None:
        raise TypeError(
            f"{name}={circuit.constraint!r}: expected a constraint on the count of all experts, or the circuit of one "
            "that cr.compile made; of a circuit that another compiler made, give its counts, such as cr.CountIn({1, 2})"
        )
    return circuit.counts


def _allowed_totals(
    total: Rule, per_layer: Sequence[Rule], allowed: Sequence[tuple[int, ...]], variables: int
) -> tuple[int, ...]:
    if not isinstance(total, (Constraint, Circuit)):
        raise TypeError(f"total={total!r}: expected a count such as cr.AtMost(16)")
    try:
        return _allowed_counts("total", compile_constraint(total, variables))
    except InfeasibleError:
        raise _unmeetable(total, per_layer, allowed) from None


def _reachable(
    allowed: Sequence[tuple[int, ...]],
    totals: tuple[int, ...],
    J: int,
    per_layer: Sequence[Rule],
    total: Rule,
) -> tuple[BoolArray, BoolArray]:
    """[L + 1, C] bool, from which spent counts the budget can be met; and [L, J] bool, the layers' own counts."""
    most = min(max(totals), sum(map(max, allowed)))
    can = [[c in set(totals) for c in range(most + 1)]]
    for counts in reversed(allowed):
        can.append([any(c + j <= most and can[-1][c + j] for j in counts) for c in range(most + 1)])
    if not can[-1][0]:
        raise _unmeetable(total, per_layer, allowed)
    own = np.array([[j in counts for j in range(J)] for counts in allowed])
    return np.array(can[::-1]), own


def _unmeetable(total: Rule, per_layer: Sequence[Rule], allowed: Sequence[tuple[int, ...]]) -> InfeasibleError:
    low, high = sum(map(min, allowed)), sum(map(max, allowed))
    kinds = dict.fromkeys(per_layer)
    layers = "; ".join(f"{c!r} in {per_layer.count(c)} of {len(per_layer)} layers" for c in kinds)
    return InfeasibleError(
        f"total={total!r} cannot be met: the layers' counts add up to between {low} and {high} ({layers}); "
        f"change total or per_layer"
    )
