"""The op: logits to log Z and marginals under a composed constraint.

Shapes: T tokens, N variables.

The loss sees log Z, so forward and backward together give log Z and the marginals, whichever pass of a provider
computes the latter.
"""

from __future__ import annotations

import random
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks.registry import BOTH, FORWARD, Outputs, op
from circuitroute.compilation import clear_cache

# The naive engine is slow: this many tokens of a case are held against it.
CHECKED_TOKENS = 64


def group_limited(n: int) -> cr.Constraint:
    """DeepSeek-V3's rule: at most 4 of 8 groups, 8 experts in all."""
    return cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8)


def layer_budget(n: int) -> cr.Constraint:
    """Layers of 64 experts, 2 to 12 each, an average of 8 over the network."""
    layers = n // 64
    return cr.LayerBudget(layers=layers, experts=64, per_layer=cr.Between(2, 12), total=cr.AtMost(8 * layers))


def costs(n: int) -> cr.Constraint:
    """Costs without any regularity, so that no two blocks are alike."""
    each = random.Random(0).choices(range(1, 100), k=n)
    return cr.Cost(each, at_most=sum(each) // 8)


CONSTRAINTS: dict[str, Callable[[int], cr.Constraint]] = {
    "groups": group_limited,
    "layers": layer_budget,
    "costs": costs,
}


@dataclass(frozen=True)
class LayeredCase:
    """T rows of N standard normal logits, and a constraint by name."""

    name: str
    tokens: int
    n: int
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CONSTRAINTS:
            raise ValueError(f"no constraint {self.name!r}; there are {', '.join(CONSTRAINTS)}")
        if self.tokens < 1 or self.n < 64 or self.n % 64:
            raise ValueError(f"need tokens >= 1 and n a multiple of 64, got {self}")

    @cached_property
    def circuit(self) -> cr.Circuit:
        """The constraint, compiled."""
        return self._compiled[0]

    @cached_property
    def _compiled(self) -> tuple[cr.Circuit, float]:
        """The circuit, and the seconds of CPU time that compiling it took."""
        clear_cache()
        start = time.process_time()
        return cr.compile(CONSTRAINTS[self.name](self.n), self.n), time.process_time() - start

    @cached_property
    def logits(self) -> Tensor:
        """[T, N]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.tokens, self.n, generator=generator).to(self.device)

    def upstream(self, result: Tensor) -> Tensor:
        """Ones: the gradient of log Z is the marginals."""
        return torch.ones_like(result)

    def describe(self) -> dict[str, Any]:
        sizes = {"T": self.tokens, "n": self.n, "constraint": self.name}
        circuit, seconds = self._compiled
        return {**sizes, **shape_of(circuit), "compile_s": round(seconds, 4), "dtype": "float32"}


def shape_of(circuit: cr.Circuit) -> dict[str, Any]:
    """The row fields that describe a circuit."""
    return {"nodes": circuit.num_nodes, "edges": circuit.num_edges, "depth": circuit.depth}


@op
class Layered:
    """Exact inference under composed constraints, against softmax + topk + gather and other circuit libraries."""

    name = "layered"
    baseline = "topk"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--circuits", default="groups:64", help="name:n,name:n,... of groups, layers, costs (default: groups:64)"
        )

    def cases(self, options: Namespace) -> Sequence[LayeredCase]:
        pairs = [_named("--circuits", text) for text in options.circuits.split(",")]
        return [LayeredCase(name, options.tokens, n, options.device, options.seed) for name, n in pairs]

    def errors(self, case: LayeredCase, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
        if "log_partition" not in outputs.values:
            return {FORWARD: None, BOTH: None}
        of: cr.Circuit = outputs.values.get("circuit", case.circuit)
        truth = of.with_engine("naive")(case.logits[:CHECKED_TOKENS].double().cpu())
        found = outputs.values["log_partition"][:CHECKED_TOKENS].detach().cpu().double()
        relative = (found - truth.log_partition).abs() / truth.log_partition.abs().clamp(min=1)
        marginals = gradient[:CHECKED_TOKENS].cpu().double()
        return {FORWARD: float(relative.max()), BOTH: float((marginals - truth.marginals).abs().max())}


def _named(option: str, text: str) -> tuple[str, int]:
    name, _, number = text.partition(":")
    if not number.strip().isdigit():
        raise ValueError(f"{option} {text!r}: expected a name and a number separated by a colon, such as groups:64")
    return name.strip(), int(number)
