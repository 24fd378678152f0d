"""SoftMoE's router: it decides by a relaxation, not by a circuit.

Legend: T tokens (all leading dimensions), H hidden size, E experts.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor, nn

from circuitroute._validate import as_number, int_at_least
from circuitroute.inference.evidence import rows_text
from circuitroute.layers.routers import LinearRouter
from circuitroute.routing.choice import per_token, recorded_mask
from circuitroute.routing.decision import SoftRouting
from circuitroute.routing.records import RoutingRecord
from circuitroute.routing.soft_topk import soft_topk
from circuitroute.routing.weights import Combine, weigh_by_logits


class SoftTopKRouter(LinearRouter):
    """SoftMoE's router (arXiv:2606.17952): soft top-k weights, of which those above a threshold are executed.

    The weights p = soft_topk(logits, k, alpha) sum to the soft mass k. Executed are the experts with p > threshold, at
    most ``max_experts`` of them, the largest; and at least one where k > 0. The soft mass is not their number: cold
    (small alpha) the two agree, warm many experts have a little mass each. Since the weights sum to k, fewer than
    k / threshold exceed the threshold; :meth:`calibrate` sets it for a mean number of experts, or a share of the mass.

    Deterministic, in training as in evaluation. Which experts are executed is taken as given in backward, the gradient
    of the truncated weights almost everywhere: an expert that is not executed gets no gradient through its own weight,
    but its logit gets one through the threshold of the soft top-k, as a competitor for the mass.

    Args:
        hidden_size: H.
        num_experts: E.
        k: the soft mass of a token, a real number in 0..E; ``forward`` takes another.
        alpha: the temperature, in units of logits: a positive number, or a tensor of one element. A Parameter is
            learned.
        threshold: the weight that an executed expert exceeds, in 0..1; kept as a buffer.
        max_experts: the most that a token executes; None for no such cap.
        combine: how executed experts are weighted, g being p on them: ``"marginal"``, by g itself; the others as
            in :func:`circuitroute.route`.
        bias: whether the linear map has one.

    Raises:
        TypeError: k, alpha or threshold that are not numbers.
        ValueError: a size below 1, a number out of range, or an unknown ``combine``.
    """

    alpha: float | Tensor
    threshold: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: float,
        alpha: float | Tensor = 1.0,
        *,
        threshold: float = 0.1,
        max_experts: int | None = None,
        combine: Combine = "marginal",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, combine=combine, bias=bias, device=device, dtype=dtype)
        self.k = _within("k", k, 0, self.num_experts)
        self.max_experts = None if max_experts is None else int_at_least("max_experts", max_experts, 1)
        if self.max_experts is not None and self.max_experts > self.num_experts:
            raise ValueError(f"max_experts={max_experts}: there are only num_experts={self.num_experts}")
        self.initial_threshold = _within("threshold", threshold, 0, 1)
        self.register_buffer("threshold", torch.empty((), device=device, dtype=dtype))
        self._set_alpha(alpha)
        self.reset_parameters()

    def _set_alpha(self, alpha: float | Tensor) -> None:
        if isinstance(alpha, Tensor) and alpha.numel() != 1:
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}: expected one temperature for all tokens")
        if isinstance(alpha, nn.Parameter):
            self.alpha = alpha
        elif isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = as_number("alpha", alpha)
            if not 0 < self.alpha < math.inf:
                raise ValueError(f"alpha={self.alpha}: the temperature must be positive and finite")

    def reset_parameters(self) -> None:
        """Draw the linear map anew and put the threshold back to where it started."""
        super().reset_parameters()
        self.threshold.fill_(self.initial_threshold)

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | int | None = None,
        replay: Tensor | RoutingRecord | None = None,
        k: float | Tensor | None = None,
        **refused: NoReturn,
    ) -> SoftRouting:
        """Route hidden states [..., H].

        Args:
            hidden: [..., H].
            key: accepted and not used, since nothing is drawn.
            replay: a recorded mask [..., E] or [T, E], or a record of one layer: these experts are executed.
            k: the soft mass, instead of the router's own: a number, or a tensor, scalar, [...] or [T]. An entry
                of a :class:`LayerAllocation` gets its gradient.
            refused: nothing else; ``decide``, ``temperature``, ``price`` and ``bias`` are for routers that draw.

        Raises:
            TypeError: another argument.
            ValueError: shapes that do not fit, a k or an alpha out of range, NaN, or a replayed mask with more than
                ``max_experts`` in a row.
        """
        if refused:
            given = ", ".join(f"{name}={refused[name]!r}" for name in refused)
            raise TypeError(
                f"{given}: a SoftTopKRouter draws nothing that this could change; its temperature is alpha, and k and "
                "the threshold say how many experts it executes"
            )
        logits, weights, mass = self._soft(hidden, k)
        if replay is None:
            mask = self._executed(logits, weights, mass)
        else:
            mask = self._replayed(replay, logits)
        with torch.autocast(logits.device.type, enabled=False):
            g = torch.where(mask, weights, 0.0)
            gates = g if self.combine == "marginal" else weigh_by_logits(g, mask, logits, self.combine)
        return SoftRouting(logits, weights, mask, gates, self.max_experts or self.num_experts)

    def _soft(self, hidden: Tensor, k: float | Tensor | None) -> tuple[Tensor, Tensor, float | Tensor]:
        """Logits [T, E], soft weights [T, E], and the soft mass, a number or a tensor, scalar or [T]."""
        logits = self.logits(hidden)
        mass = self.k if k is None else k
        if isinstance(mass, Tensor):
            mass = per_token("k", mass, hidden.shape[:-1])
        with torch.autocast(logits.device.type, enabled=False):
            return logits, soft_topk(logits, mass, self.alpha), mass

    def _ranked(self, logits: Tensor) -> Tensor:
        """[T, K] int64, the K experts that may be executed, from the largest logit down; lower indices among equals."""
        return logits.detach().argsort(dim=-1, descending=True, stable=True)[:, : self.max_experts]

    def _executed(self, logits: Tensor, weights: Tensor, mass: float | Tensor) -> Tensor:
        """[T, E] bool: above the threshold, within the cap; and the first in any case, where there is mass at all."""
        mask = weights.detach() > self.threshold
        nothing = torch.zeros_like(mask)
        if self.max_experts is not None:
            mask &= nothing.scatter(-1, self._ranked(logits), True)
        first = nothing.scatter(-1, logits.detach().argmax(-1, keepdim=True), True)
        return mask | (first & _positive(mass, logits)[:, None])

    def _replayed(self, replay: Tensor | RoutingRecord, logits: Tensor) -> Tensor:
        mask = recorded_mask(replay, logits)
        if self.max_experts is None:
            return mask
        over = mask.sum(-1) > self.max_experts
        if bool(over.any()):
            raise ValueError(f"replay executes more than max_experts={self.max_experts} in {rows_text(over)}")
        return mask

    @torch.no_grad()
    def calibrate(
        self,
        hidden: Tensor,
        *,
        executed: float | None = None,
        mass: float | None = None,
        k: float | Tensor | None = None,
    ) -> float:
        """Set the threshold from hidden states [..., H], such as those of a batch of training text.

        Nothing else changes it: between two calls a decision can be recomputed. Equal weights are executed together,
        and those of 0 never.

        Args:
            hidden: [..., H].
            executed: the mean number of executed experts per token to get on these hidden states; or
            mass: the share of the soft mass to keep at least, in 0..1. Exactly one of the two.
            k: as in ``forward``.

        Returns:
            The threshold.

        Raises:
            ValueError: both or neither of the two, no tokens, or what no threshold reaches: at least one expert is
                executed by every token with mass, and ``max_experts`` at most.
        """
        if (executed is None) == (mass is None):
            raise ValueError(f"executed={executed}, mass={mass}: give exactly one of the two")
        logits, weights, soft_mass = self._soft(hidden, k)
        if not len(logits):
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}: there are no tokens to calibrate on")
        some = _positive(soft_mass, logits)
        ranked = weights.gather(-1, self._ranked(logits))[some].double()
        # The first are always executed: the threshold decides about the others.
        first, others = ranked[:, 0], ranked[:, 1:].flatten().sort(descending=True).values
        others = others[others > 0]
        if mass is None:
            count = _count_for_executed(as_number("executed", executed), len(logits), len(first), len(others))
        else:
            count = _count_for_mass(as_number("mass", mass), weights.double().sum(), first.sum(), others)
        self._put_between(others, count)
        return float(self.threshold)

    def _put_between(self, weights: Tensor, count: int) -> None:
        """The threshold, such that the first ``count`` of the weights (from the largest down) exceed it."""
        above = float(weights[count - 1]) if count > 0 else 1.0
        below = float(weights[count]) if count < len(weights) else 0.0
        self.threshold.fill_((above + below) / 2)
        if count > 0 and float(self.threshold) >= above:  # equal, or too close for the threshold's dtype
            self.threshold.fill_(above)
            self.threshold.copy_(torch.nextafter(self.threshold, torch.zeros_like(self.threshold)))

    def extra_repr(self) -> str:
        """What repr() shows."""
        alpha = "learned" if isinstance(self.alpha, nn.Parameter) else self.alpha
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, k={self.k}, alpha={alpha}, "
            f"max_experts={self.max_experts}, combine={self.combine!r}"
        )


def _within(name: str, value: object, low: float, high: float) -> float:
    number = as_number(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name}={number}: must lie in {low}..{high}")
    return number


def _positive(mass: float | Tensor, logits: Tensor) -> Tensor:
    """[T] bool: which tokens have soft mass."""
    if isinstance(mass, Tensor):
        return (mass.detach() > 0).to(logits.device).expand(len(logits))
    return torch.full((len(logits),), mass > 0, device=logits.device)


def _count_for_executed(executed: float, tokens: int, first: int, others: int) -> int:
    """How many besides the first of each token, for a mean of ``executed``."""
    count = round(executed * tokens) - first if math.isfinite(executed) else -1
    if not 0 <= count <= others:
        raise ValueError(
            f"executed={executed}: on these hidden states a threshold gives from {first / tokens:.4g} (one expert of "
            f"every token with mass) to {(first + others) / tokens:.4g} experts per token"
        )
    return count


def _count_for_mass(mass: float, total: Tensor, first: Tensor, others: Tensor) -> int:
    """How many besides the first of each token, for at least the share ``mass`` of the total."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass}: must be a share of the soft mass, above 0 and at most 1")
    kept = torch.cat([first.reshape(1), first + others.cumsum(0)]) / total.clamp(min=torch.finfo(total.dtype).tiny)
    enough = kept >= min(mass, 1 - 1e-12)  # the sums are rounded
    if bool((total > 0) & ~enough.any()):
        raise ValueError(f"mass={mass}: max_experts keeps {float(kept[-1]):.4g} of the soft mass at most; raise it")
    return int((~enough).sum()) if bool(total > 0) else 0
