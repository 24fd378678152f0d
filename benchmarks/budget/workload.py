"""The op: hidden states to gates in every layer of a model; backward from all gates to hidden states and weights.

Shapes: T tokens, L layers, H hidden size, N experts, K the largest count of a layer.

The routers' linear maps are part of what is timed, since they are part of every router here.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import BOTH, FORWARD, Outputs, op

HIDDEN = 256


@dataclass(frozen=True)
class BudgetCase:
    """T standard normal hidden states per layer, kmin..k experts per layer, ``total`` at most over the layers."""

    tokens: int
    layers: int
    n: int
    kmin: int
    k: int
    total: int
    device: str = "cpu"
    seed: int = 0

    @cached_property
    def logits(self) -> Tensor:
        """[L, T, H] the input that gradients are taken in: hidden states."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.layers, self.tokens, HIDDEN, generator=generator).to(self.device)

    @cached_property
    def _upstream(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.layers, self.tokens, self.n, generator=generator).to(self.device)

    def upstream(self, result: Tensor) -> Tensor:
        """[L, T, N] for gates, its first columns for the weights of a shorter list."""
        return self._upstream[..., : result.shape[-1]]

    def describe(self) -> dict[str, Any]:
        sizes = {"T": self.tokens, "layers": self.layers, "n": self.n, "kmin": self.kmin, "k": self.k}
        return {**sizes, "total": self.total, "dtype": "float32"}


@op
class Budget:
    """Routing through the layers of a model, against top-k routers."""

    name = "budget"
    baseline = "topk"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--layers", type=int, default=8, help="layers that route, for op budget (default: 8)")

    def cases(self, options: Namespace) -> Sequence[BudgetCase]:
        """4..8 of 64 experts per layer, and 6 per layer in all."""
        return [BudgetCase(options.tokens, options.layers, 64, 4, 8, 6 * options.layers, options.device, options.seed)]

    def errors(self, case: BudgetCase, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
        """What tokens spend beyond their budget; nothing else has a truth of its own here."""
        if "counts" not in outputs.values:
            return {FORWARD: None, BOTH: None}
        counts_LT = outputs.values["counts"]
        if not ((counts_LT >= case.kmin) & (counts_LT <= case.k)).all():
            raise ValueError(f"a layer took a number of experts outside {case.kmin}..{case.k}")
        total = outputs.values["total"]
        over = None if total is None else float((counts_LT.sum(0) - total).clamp(min=0).max())
        return {FORWARD: over, BOTH: None}
