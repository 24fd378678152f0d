"""The facts about a circuit, as data."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

import circuitroute as cr
from circuitroute.circuit.verify.properties import node_scopes
from circuitroute.compilation import Prediction
from circuitroute.engines import cost

# Python neither prints nor parses much longer ints.
LONGEST_INT = 4000
PREDICTED = ("nodes", "edges", "width", "seconds")


@dataclass(frozen=True)
class LevelFacts:
    """One level of sums, counted from the literals.

    Attributes:
        sums, elements: how many sums, and products under them.
        widest: the most sums of this level that share one scope.
    """

    level: int
    sums: int
    elements: int
    widest: int


@dataclass(frozen=True)
class Facts:
    """A circuit and its predicted share of a router's arithmetic.

    Attributes:
        circuit: the compiled constraint.
        seconds: how long compiling took.
        predicted: its predicted size; None if the compiler does not predict.
        hidden: size of the router's input.
        device: the device that the engine is chosen for.
        levels: from the literals up.
    """

    circuit: cr.Circuit
    seconds: float
    predicted: Prediction | None
    hidden: int
    device: str
    levels: tuple[LevelFacts, ...]

    @property
    def multiply_adds(self) -> int:
        """Per token, for the marginals."""
        return cost(self.circuit).multiply_adds

    @property
    def router_multiply_adds(self) -> int:
        """Per token, of the linear layer that makes the logits: hidden x n."""
        return self.hidden * self.circuit.n

    @property
    def share(self) -> float:
        """The circuit's share of both together."""
        return self.multiply_adds / (self.multiply_adds + self.router_multiply_adds)

    def to_json(self) -> dict[str, Any]:
        """The facts as numbers, strings and lists; model_count is null where it has over 4000 digits."""
        circuit, estimate = self.circuit, cost(self.circuit)
        count = circuit.model_count()
        digits = math.log10(count)
        return {
            "constraint": repr(circuit.constraint),
            "n": circuit.n,
            "model_count": count if digits < LONGEST_INT else None,
            "log10_model_count": digits,
            "min_count": circuit.min_count,
            "max_count": circuit.max_count,
            "nodes": circuit.num_nodes,
            "edges": circuit.num_edges,
            "depth": circuit.depth,
            "width": circuit.width,
            "seconds_to_compile": self.seconds,
            "predicted": self.predicted and {name: getattr(self.predicted, name) for name in PREDICTED},
            "levels": [vars(level) for level in self.levels],
            "op": circuit.op,
            "device": self.device,
            "engine": circuit.engine_for(self.device),
            "multiply_adds_per_token": estimate.multiply_adds,
            "gradient_multiply_adds_per_token": estimate.backward,
            "bytes_per_token": estimate.bytes_moved,
            "hidden": self.hidden,
            "router_multiply_adds_per_token": self.router_multiply_adds,
            "predicted_share_of_router": self.share,
        }


def facts_of(circuit: cr.Circuit, seconds: float, predicted: Prediction | None, hidden: int) -> Facts:
    """The facts about a circuit on this machine's device, and for routers of this hidden size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Facts(circuit, seconds, predicted, hidden, device, _levels(circuit))


def _levels(circuit: cr.Circuit) -> tuple[LevelFacts, ...]:
    scopes = node_scopes(circuit.graph)
    levels = []
    for i, level in enumerate(circuit.graph.levels):
        widest = max(Counter(scopes[node] for node in level.nodes.tolist()).values())
        levels.append(LevelFacts(i + 1, len(level.nodes), len(level.left), widest))
    return tuple(levels)
