"""SoftMoE's router: it decides by a relaxation, not by a circuit.

Legend: T tokens (all leading dimensions), H hidden size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from circuitroute._tensors import without_autocast
from circuitroute._validate import as_flag, as_number, int_at_least
from circuitroute.inference.evidence import rows_text
from circuitroute.layers.routers import LinearRouter, put_back, start_of
from circuitroute.routing.choice import per_token, recorded_mask, shift_of
from circuitroute.routing.decision import SoftRouting
from circuitroute.routing.records import RoutingRecord
from circuitroute.routing.soft_topk import soft_topk
from circuitroute.routing.weights import Combine, weigh_by_logits

ROUNDED = 1e-6  # k is often float32: what exceeds a whole number by less than this share of it is that number


class SoftTopKRouter(LinearRouter):
    """A router by soft top-k weights, of which the larger ones are executed: SoftMoE's (arXiv:2606.17952), and others.

    The weights p = soft_topk(logits, k, alpha) sum to the soft mass k. Executed are the experts that reach the
    threshold, the largest within the cap, and at least one where k > 0:

    - the threshold is a weight that p exceeds, or, with ``relative_threshold``, a multiple c of the mean weight k / E
      that p reaches: p >= c k / E;
    - the cap is ``max_experts``, the same for all, or ceil(k ``cap_factor``), which follows k; with both, the smaller.

    The soft mass is not the number of executed experts: cold (small alpha) the two agree, warm many experts have a
    little mass each. Since the weights sum to k, no more than E / c reach c k / E; :meth:`calibrate` sets the threshold
    for a mean number of experts, or a share of the mass.

    **SoftMoE as published** is :meth:`softmoe`: p >= 1.8 k / E, at most ceil(k ``cap_factor``). The "alpha" of its
    tables is that cap factor. The ``alpha`` of this class is another thing: the temperature of LapSum.

    Deterministic, in training as in evaluation. Which experts are executed is taken as given in backward, the gradient
    of the truncated weights almost everywhere: an expert that is not executed gets no gradient through its own weight,
    but its logit gets one through the threshold of the soft top-k, as a competitor for the mass.

    Args:
        hidden_size: H.
        num_experts: E.
        k: the soft mass of a token, a real number in 0..E; ``forward`` takes another.
        alpha: the temperature, in units of logits: a positive number, or a tensor of one element. A Parameter is
            learned.
        threshold: the weight that an executed expert exceeds, in 0..1; kept as a buffer, which casts of the module to
            narrower types leave as it is.
        max_experts: the most that a token executes; None for no such cap.
        cap_factor: the most that a token executes, as a multiple of its soft mass k, rounded up (a product that exceeds
            a whole number by less than a millionth of itself counts as that number); None for no such cap.
        relative_threshold: whether ``threshold`` is in units of k / E, then any number from 0 on.
        combine: how executed experts are weighted, g being p on them: ``"marginal"``, by g itself; the others as
            in :func:`circuitroute.route`.
        bias: whether the linear map has one.

    Raises:
        TypeError: k, alpha, threshold or cap_factor that are not numbers.
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
        cap_factor: float | None = None,
        relative_threshold: bool = False,
        combine: Combine = "marginal",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, combine=combine, bias=bias, device=device, dtype=dtype)
        self.k = _within("k", k, 0, self.num_experts)
        self.max_experts = None if max_experts is None else int_at_least("max_experts", max_experts, 1)
        if self.max_experts is not None and self.max_experts > self.num_experts:
            raise ValueError(f"max_experts={self.max_experts}: there are only num_experts={self.num_experts}")
        self.cap_factor = None if cap_factor is None else _positive_number("cap_factor", cap_factor)
        self.relative_threshold = as_flag("relative_threshold", relative_threshold)
        self.initial_threshold = _within("threshold", threshold, 0, math.inf if self.relative_threshold else 1)
        self.register_buffer("threshold", torch.empty((), device=device, dtype=dtype))
        self._set_alpha(alpha)
        self.reset_parameters()

    @classmethod
    def softmoe(
        cls,
        hidden_size: int,
        num_experts: int,
        k: float,
        cap_factor: float,
        alpha: float | Tensor = 1.0,
        *,
        threshold: float = 1.8,
        combine: Combine = "marginal",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SoftTopKRouter:
        """SoftMoE's truncation as published: p >= 1.8 k / E, at most ceil(k cap_factor) experts.

        With the k of a :class:`LayerAllocation` both follow the layer's own k. Where no weight reaches the threshold,
        as with equal logits, the largest is executed; that rule is this library's.

        Args:
            hidden_size, num_experts, k, combine, bias, device, dtype: as for the class.
            cap_factor: what SoftMoE's tables call alpha.
            alpha: the temperature of LapSum; 1 takes the logits as they are.
            threshold: in units of k / E.
        """
        return cls(
            hidden_size,
            num_experts,
            k,
            alpha,
            threshold=threshold,
            cap_factor=cap_factor,
            relative_threshold=True,
            combine=combine,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def _set_alpha(self, alpha: float | Tensor) -> None:
        if isinstance(alpha, Tensor) and alpha.numel() != 1:
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}: expected one temperature for all tokens")
        self.initial_alpha = start_of(alpha)
        if isinstance(alpha, nn.Parameter):
            self.alpha = alpha
        elif isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = _positive_number("alpha", alpha, "the temperature ")

    def reset_parameters(self) -> None:
        """Draw the linear map anew, and put the threshold and alpha back to where they started.

        Raises:
            ValueError: alpha was given on the meta device, so that nothing is known of where it started.
        """
        super().reset_parameters()
        self.threshold.fill_(self.initial_threshold)
        put_back("alpha", self.alpha, self.initial_alpha)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftTopKRouter:
        before = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.threshold
        # It decides between weights in float32: a model that is cast to bfloat16 keeps what was calibrated.
        if after.dtype.itemsize < before.dtype.itemsize:
            self.threshold = (after if before.is_meta else before).to(after.device, before.dtype)
        return self

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | int | None = None,
        replay: Tensor | RoutingRecord | None = None,
        k: float | Tensor | None = None,
        bias: Tensor | None = None,
        **refused: NoReturn,
    ) -> SoftRouting:
        """Route hidden states [..., H].

        Args:
            hidden: [..., H].
            key: accepted and not used, since nothing is drawn.
            replay: a recorded mask [..., E] or [T, E], or a record of one layer: these experts are executed.
            k: the soft mass, instead of the router's own: a number, or a tensor, scalar, [...] or [T]. An entry
                of a :class:`LayerAllocation` gets its gradient.
            bias: [E], added to the logits for the choice alone: which experts are executed is decided by the soft
                weights of the moved logits, and those that are keep the weights of the logits themselves.
            refused: nothing else; ``decide``, ``temperature`` and ``price`` are for routers that choose a subset.

        Raises:
            TypeError: another argument.
            ValueError: shapes that do not fit, a k or an alpha out of range, NaN, or a replayed mask with more experts
                in a row than the cap allows under this k.
        """
        if refused:
            given = ", ".join(f"{name}={refused[name]!r}" for name in refused)
            raise TypeError(
                f"{given}: a SoftTopKRouter draws nothing that this could change; its temperature is alpha, and k and "
                "the threshold say how many experts it executes"
            )
        logits, weights, mass = self._soft(hidden, k)
        cap = self._cap(mass)
        if replay is None:
            mask = self._executed(*self._moved(logits, weights, mass, bias), mass, cap)
        else:
            mask = self._replayed(replay, logits, cap)
        with without_autocast(logits):
            g = torch.where(mask, weights, 0.0)
            gates = g if self.combine == "marginal" else weigh_by_logits(g, mask, logits, self.combine)
        return SoftRouting(logits, weights, mask, gates, self._slots(cap))

    def _soft(self, hidden: Tensor, k: float | Tensor | None) -> tuple[Tensor, Tensor, float | Tensor]:
        """Logits [T, E], soft weights [T, E], and the soft mass, a number or a tensor, scalar or [T]."""
        logits = self.logits(hidden)
        mass = self.k if k is None else k
        mass = per_token("k", mass, hidden.shape[:-1]) if isinstance(mass, Tensor) else as_number("k", mass)
        with without_autocast(logits):
            return logits, soft_topk(logits, mass, self.alpha), mass

    def _moved(
        self, logits: Tensor, weights: Tensor, mass: float | Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the choice looks at: ([T, E] logits, [T, E] soft weights of them)."""
        shift = shift_of(None, bias, logits, self.num_experts)
        if shift is None:
            return logits, weights
        with torch.no_grad(), without_autocast(logits):
            moved = logits + shift.to(logits)
            return moved, soft_topk(moved, mass, self.alpha)

    def _cap(self, mass: float | Tensor) -> int | Tensor | None:
        """The most experts that a token executes, from 1 to E, or None: a number, or int64, scalar or [T]."""
        if self.cap_factor is None:
            return self.max_experts
        most = self.max_experts or self.num_experts
        factor = self.cap_factor * (1 - ROUNDED)
        if isinstance(mass, Tensor):
            return (mass.detach().double() * factor).ceil().clamp(1, most).long()
        return max(1, math.ceil(min(mass * factor, most)))

    def _slots(self, cap: int | Tensor | None) -> int:
        """What every token's decision fits in. Of a cap in a tensor the value is not looked at."""
        return cap if isinstance(cap, int) else self.max_experts or self.num_experts

    def _ranked(self, logits: Tensor, cap: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """The K experts that may be executed: [T, K] int64, from the largest logit down, lower indices among equals;
        and [T, K] bool, whether the token's own cap allows that many."""
        slots = self._slots(cap)
        ranked = logits.detach().argsort(dim=-1, descending=True, stable=True)[:, :slots]
        most = cap.to(logits.device).reshape(-1, 1) if isinstance(cap, Tensor) else slots
        allowed = torch.arange(slots, device=logits.device) < most
        return ranked, allowed.expand(ranked.shape)

    def _scores(self, weights: Tensor, mass: float | Tensor) -> Tensor:
        """[T, E] the weights in the unit of the threshold; no gradient."""
        if not self.relative_threshold:
            return weights.detach()
        tiny = torch.finfo(weights.dtype).tiny  # without mass all weights are 0
        if isinstance(mass, Tensor):
            return weights.detach() / (mass.detach().to(weights) / self.num_experts).clamp(min=tiny).reshape(-1, 1)
        return weights.detach() / max(mass / self.num_experts, tiny)

    def _reaching(self, scores: Tensor) -> Tensor:
        """[T, E] bool; weights of 0 never do."""
        return (scores >= self.threshold) & (scores > 0) if self.relative_threshold else scores > self.threshold

    def _executed(self, logits: Tensor, weights: Tensor, mass: float | Tensor, cap: int | Tensor | None) -> Tensor:
        """[T, E] bool: what reaches the threshold, within the cap; and the first in any case, where there is mass."""
        mask = self._reaching(self._scores(weights, mass))
        nothing = torch.zeros_like(mask)
        if cap is not None:
            mask &= nothing.scatter(-1, *self._ranked(logits, cap))
        # Not scattered, which torch.jit.trace cannot with a bool.
        first = torch.arange(logits.shape[-1], device=logits.device) == logits.detach().argmax(-1, keepdim=True)
        return mask | (first & _positive(mass, logits)[:, None])

    def _replayed(self, replay: Tensor | RoutingRecord, logits: Tensor, cap: int | Tensor | None) -> Tensor:
        mask = recorded_mask(replay, logits)
        if cap is None:
            return mask
        over = mask.sum(-1) > (cap.to(mask.device) if isinstance(cap, Tensor) else cap)
        if bool(over.any()):
            raise ValueError(f"replay executes more than {self._cap_text()} in {rows_text(over)}")
        return mask

    def _cap_text(self) -> str:
        """The cap in an error."""
        if self.cap_factor is None:
            return f"max_experts={self.max_experts}"
        both = "" if self.max_experts is None else f" and max_experts={self.max_experts}"
        return f"cap_factor={self.cap_factor}{both} allows for this k (give the k that it was recorded with)"

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
            executed: the mean number of executed experts per token to get on these hidden states, within the cap; or
            mass: the share of the soft mass to keep at least, in 0..1. Exactly one of the two.
            k: as in ``forward``.

        Returns:
            The threshold, in its unit.

        Raises:
            ValueError: both or neither of the two, no tokens, or what no threshold reaches: at least one expert is
                executed by every token with mass, and as many as the cap allows at most.
        """
        if (executed is None) == (mass is None):
            raise ValueError(f"executed={executed}, mass={mass}: give exactly one of the two")
        logits, weights, soft_mass = self._soft(hidden, k)
        if not len(logits):
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}: there are no tokens to calibrate on")
        some = _positive(soft_mass, logits)
        ranked, allowed = self._ranked(logits, self._cap(soft_mass))
        scores = torch.where(allowed, self._scores(weights, soft_mass).gather(-1, ranked), 0.0)[some].double()
        kept = weights.gather(-1, ranked)[some].double()
        # The first are always executed: the threshold decides about the others.
        others, order = scores[:, 1:].flatten().sort(descending=True)
        others = others[others > 0]
        if mass is None:
            count = _count_for_executed(as_number("executed", executed), len(logits), len(scores), len(others))
        else:
            in_order = kept[:, 1:].flatten()[order[: len(others)]]
            count = _count_for_mass(as_number("mass", mass), weights.double().sum(), kept[:, 0].sum(), in_order)
        self._put_between(others, count)
        return float(self.threshold)

    def _put_between(self, scores: Tensor, count: int) -> None:
        """The threshold, such that the first ``count`` of the scores (from the largest down) reach it."""
        below = float(scores[count]) if count < len(scores) else 0.0
        # Where none is to reach it, weights are at most 1, and relative ones may be anything.
        unreached = 2 * below + 1 if self.relative_threshold else 1.0
        above = float(scores[count - 1]) if count > 0 else unreached
        self.threshold.fill_((above + below) / 2)
        if count == 0:
            return
        last, following = scores[count - 1], scores[count : count + 1]
        if not self._reaching(last) or bool((self._reaching(following) & (following < last)).any()):
            self.threshold.fill_(above)  # equal, or too close for the threshold's dtype
            if not self._reaching(last):
                self.threshold.copy_(torch.nextafter(self.threshold, torch.zeros_like(self.threshold)))

    def extra_repr(self) -> str:
        """What repr() shows."""
        alpha = "learned" if isinstance(self.alpha, nn.Parameter) else self.alpha
        relative = ", relative_threshold=True" if self.relative_threshold else ""
        factor = "" if self.cap_factor is None else f", cap_factor={self.cap_factor}"
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, k={self.k}, alpha={alpha}, "
            f"max_experts={self.max_experts}{factor}{relative}, combine={self.combine!r}"
        )


def _within(name: str, value: object, low: float, high: float) -> float:
    number = as_number(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name}={number}: must lie in {low}..{high}")
    return number


def _positive_number(name: str, value: object, meaning: str = "") -> float:
    number = as_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={number}: {meaning}must be positive and finite")
    return number


def _positive(mass: float | Tensor, logits: Tensor) -> Tensor:
    """[T] bool: which tokens have soft mass."""
    if isinstance(mass, Tensor):
        return (mass.detach() > 0).to(logits.device).expand(logits.shape[0])
    like = torch.ones_like if mass > 0 else torch.zeros_like
    return like(logits[:, 0], dtype=torch.bool)


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
        raise ValueError(
            f"mass={mass}: max_experts and cap_factor keep {float(kept[-1]):.4g} of the soft mass at most; raise them"
        )
    return int((~enough).sum()) if bool(total > 0) else 0
