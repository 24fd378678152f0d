"""A circuit as a PyJuice circuit (Liu, Ahmed and Van den Broeck, Scaling tractable probabilistic circuits, 2024).

Nodes over the same variables become one vector of PyJuice nodes. Every variable has two inputs, absent and present, of
the distribution ``External``, whose log-values are given per sample: that is how logits enter. PyJuice wants the
weights of a sum to add up to 1 (compiling makes them so), hence an element weighs as many subsets as it has out of
those of its sum: with all inputs at 1 the root is 1, the uniform distribution over the allowed subsets. So

    log Z = root + log(circuit.model_count())      where the inputs are (0, theta_i)

Declaring needs no GPU. Compiling and running PyJuice does::

    pc = pyjuice.compile(circuit.to_pyjuice()).to("cuda")
    inputs = soft_evidence(logits).cuda()                                            # [T, N, 2]
    data = torch.zeros(len(logits), circuit.n, dtype=torch.int64, device="cuda")     # not looked at
    log_partition = pc(data, external_soft_evi=inputs)[:, 0] + math.log(circuit.model_count())

Legend: T tokens, N variables.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.circuit.verify.properties import node_scopes

# Stands for log 0: PyJuice's kernels subtract infinities from one another, and sums of thousands of these are finite.
LOG_ZERO = -1e30
SMALLEST = float(np.finfo(np.float32).tiny)

# (scope, is it the root, depth within the scope): nodes of one key do not depend on one another
Key: TypeAlias = tuple[int, bool, int]


def to_pyjuice(graph: Graph, name: str) -> Any:
    """The root of a circuit as ``pyjuice`` nodes, for ``pyjuice.compile``; ``name`` is what messages call it.

    Raises:
        ImportError: PyJuice is not installed.
        ValueError: some weight is too small for PyJuice's float32.
    """
    pyjuice = imported("circuit.to_pyjuice")
    if graph.kind[-1] != NodeKind.SUM:  # a single literal
        inputs = pyjuice.inputs(0, num_nodes=2, dist=pyjuice.distributions.External())
        return _sums(pyjuice, 1, {(inputs,): [(0, (_side(graph, -1),), 1.0)]})
    return _Declaration(pyjuice, graph, name).root()


def soft_evidence(logits_TN: Tensor) -> Tensor:
    """[T, N, 2] float32, the inputs (absent, present) for logits [T, N]: (0, theta), and log 0 where decided."""
    absent = torch.where(logits_TN == math.inf, LOG_ZERO, 0.0)
    present = torch.where(torch.isinf(logits_TN), torch.where(logits_TN > 0, 0.0, LOG_ZERO), logits_TN)
    return torch.stack([absent, present], -1).float()


def imported(what: str) -> Any:
    """The package; ``what`` needs it.

    Raises:
        ImportError: PyJuice is not installed.
    """
    try:
        import pyjuice
    except ImportError as error:
        raise ImportError(
            f"{what} needs PyJuice ({error}): pip install 'circuitroute[pyjuice]'", name="pyjuice"
        ) from error
    return pyjuice


class _Declaration:
    """The vectors declared so far, and where each node of the circuit stands: (vector, index)."""

    def __init__(self, pyjuice: Any, graph: Graph, name: str) -> None:
        self._pyjuice, self._graph = pyjuice, graph
        self._name = f"{name} over {graph.n} variables"
        self._scopes = node_scopes(graph)
        self._counts: list[int] = graph.fold(np.ones(graph.num_nodes, dtype=object), np.multiply, np.add).tolist()
        self._place: dict[int, tuple[Any, int]] = {}

    def root(self) -> Any:
        """Declares all vectors, those over fewer variables first; the last one is the root."""
        graph, vector = self._graph, None
        external = self._pyjuice.distributions.External
        inputs = [self._pyjuice.inputs(v, num_nodes=2, dist=external()) for v in range(graph.n)]
        for node in np.flatnonzero(graph.variable >= 0).tolist():
            self._place[node] = (inputs[graph.variable[node]], _side(graph, node))
        groups = self._groups()
        for key in sorted(groups, key=lambda key: (key[0].bit_count(), *key[1:])):
            vector = self._vector(groups[key])
            self._place.update((node, (vector, i)) for i, node in enumerate(groups[key]))
        return vector

    def _groups(self) -> dict[Key, list[int]]:
        """The sums that become one vector: of one scope, and none below another."""
        graph, scopes = self._graph, self._scopes
        depth = [0] * graph.num_nodes
        groups: dict[Key, list[int]] = defaultdict(list)
        for node in np.flatnonzero(graph.kind == NodeKind.SUM).tolist():
            span = slice(int(graph.first[node]), int(graph.first[node + 1]))
            children = [*graph.left[span].tolist(), *graph.right[span].tolist()]
            same = [depth[child] + 1 for child in children if scopes[child] == scopes[node]]
            depth[node] = max(same, default=0)
            if scopes[node]:  # a sum over nothing is a constant
                groups[scopes[node], node == graph.num_nodes - 1, depth[node]].append(node)
        return groups

    def _vector(self, nodes: list[int]) -> Any:
        """A vector of sums, over one vector of products for each combination of vectors they multiply."""
        graph = self._graph
        products: dict[tuple[Any, ...], list[tuple[int, tuple[int, ...], float]]] = defaultdict(list)
        for i, node in enumerate(nodes):
            for e in range(int(graph.first[node]), int(graph.first[node + 1])):
                pair = [int(child) for child in (graph.left[e], graph.right[e]) if self._scopes[child]]
                vectors, indices = zip(*(self._place[child] for child in pair), strict=True)
                products[vectors].append((i, indices, self._weight(node, pair)))
        return _sums(self._pyjuice, len(nodes), products)

    def _weight(self, node: int, pair: list[int]) -> float:
        weight = math.prod(self._counts[child] for child in pair) / self._counts[node]
        if weight < SMALLEST:
            raise ValueError(
                f"{self._name}: an element has {weight:.1e} of the subsets of its sum, and PyJuice's float32 weights "
                f"end at {SMALLEST:.1e}: take fewer variables or a tighter constraint, or an engine of circuitroute"
            )
        return weight


def _side(graph: Graph, literal: int) -> int:
    return int(graph.kind[literal] == NodeKind.PRESENT)


def _sums(pyjuice: Any, size: int, products: dict[tuple[Any, ...], list[tuple[int, tuple[int, ...], float]]]) -> Any:
    """A vector of ``size`` sums; products are given by the vectors they multiply: (sum, indices, weight)."""
    vectors = [
        pyjuice.multiply(*children, edge_ids=torch.tensor([indices for _, indices, _ in elements], device="cpu"))
        for children, elements in products.items()
    ]
    elements = [element for group in products.values() for element in group]
    edges = torch.tensor([[i for i, _, _ in elements], list(range(len(elements)))], device="cpu")
    sums = pyjuice.summate(*vectors, num_nodes=size, edge_ids=edges)
    sums.set_params(torch.tensor([weight for _, _, weight in elements], device="cpu"), normalize=False)
    return sums
