"""What all serving functions have in common: their call, their tables, their weights.

Legend: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from circuitroute._validate import int_at_least
from circuitroute.engines.tables import Array, Tables
from circuitroute.integrations.hosted import divided_by_sum
from circuitroute.integrations.serving.checks import check_place, check_tensors
from circuitroute.routing.weights import weigh_by_logits

ServedCombine: TypeAlias = Literal["softmax", "normalized", "sigmoid"]
ServedScore: TypeAlias = Literal["logits", "sigmoid", "softmax"]


class ServedFunction(nn.Module):
    """``f(hidden_states, gating_output, topk, renormalize) -> (weights, ids)``, as vLLM and SGLang call it.

    A module without parameters and with nothing in its ``state_dict``, so that it moves with a model.

    Attributes:
        num_experts: E.
        combine, score, scaling: as given to its maker.
        largest: the most experts that a token may have.
        rule: what chooses, as text.
        portable: whether it can be exported.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        combine: ServedCombine,
        score: ServedScore,
        bias: Tensor | None,
        scaling: float,
        largest: int,
        rule: str,
        tables: Mapping[str, Array],
    ) -> None:
        super().__init__()
        self.portable = True
        self.num_experts, self.combine, self.score, self.scaling = num_experts, combine, score, scaling
        self.largest, self.rule = largest, rule  # not looked up where it may be traced
        self.biased = bias is not None
        self.tables = Tables({**tables, **({} if bias is None else {"bias": bias.numpy(force=True)})})
        # Nothing, in the place where tables are to be: it moves with the module.
        self.register_buffer("place", torch.empty(0, device="cpu"), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ServedFunction:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self.modules():
            tables = getattr(module, "tables", None)
            if isinstance(tables, Tables):
                tables.prepare(self.get_buffer("place").device)
        return self

    def _scored(self, gating_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([T, E] float32 logits, [T, E] what is chosen by, without NaN, [T] which tokens had NaN)."""
        # In one order of memory, so that sums over experts are rounded alike.
        logits = gating_output.detach().to(torch.float32).contiguous()
        score = logits
        if self.score == "sigmoid":
            score = torch.sigmoid(logits)
        elif self.score == "softmax":
            score = torch.softmax(logits, -1)
        if self.biased:
            score = score + self.tables.on(score.device)["bias"]
        bad = score.isnan().any(-1)
        return logits, torch.where(bad[:, None], 0.0, score), bad

    def _weighed(
        self, logits: Tensor, ids: Tensor, used: Tensor, valid: Tensor, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """What a call returns, from ids and whether they are used, [T, K] each; NaN where a token is not ``valid``."""
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, used)
        # By the library's own rule, to the last bit. Renormalised softmax is not made of the softmax over all experts,
        # which may be too small for float32 on all chosen ones.
        rule: ServedCombine = "normalized" if self.combine == "softmax" and renormalize else self.combine
        weights = weigh_by_logits(mask.to(logits.dtype), mask, logits, rule).gather(-1, ids)
        weights = torch.where(used, weights, 0.0)
        if rule == "sigmoid" and renormalize:
            weights = divided_by_sum(weights)
        return torch.where(valid[:, None], weights * self.scaling, math.nan), ids.to(torch.int32)

    def _check(self, hidden_states: Tensor, gating_output: Tensor, topk: int) -> int:
        """``topk``, as a plain integer."""
        if not is_compiling():
            check_tensors(hidden_states, gating_output, self.num_experts)
            check_place(gating_output, self.get_buffer("place").device)
            topk = int_at_least("topk", topk, 1)
        if topk < self.largest:
            raise ValueError(
                f"topk={topk}: {self.rule} chooses up to {self.largest} experts per token; give the "
                f"server topk={self.largest} (num_experts_per_tok in most models' configurations)"
            )
        if topk > self.num_experts:
            raise ValueError(f"topk={topk}: there are only {self.num_experts} experts")
        return topk

    @property
    def keyed(self) -> tuple[str, ...]:
        """Arguments of a call beyond the four, [T] int64 each."""
        return ()

    def require_portable(self) -> None:
        """Raise ValueError where it cannot be exported."""

    def extra_repr(self) -> str:
        """What repr() shows."""
        return (
            f"{self.rule}, num_experts={self.num_experts}, combine={self.combine!r}, "
            f"score={self.score!r}, scaling={self.scaling}"
        )


def placed(function: Any, device: torch.device | str | None) -> Any:
    """The function, with its tables on a device; torch's default device when None."""
    # Of a tensor, since torch 2.6 does not tell of a default set by "with".
    return function.to(torch.empty(0).device if device is None else torch.device(device))
