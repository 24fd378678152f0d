"""Simple paths between two corners of a grid, as a constraint on its edges; and shortest ones under hidden weights.

The constraint is a state machine of the frontier method (Sekine, Imai & Tani 1995; Knuth's simpath): a block of
neighbouring edges is known by the fragments of paths in it, of which only the ends matter, and by the vertices that are
used up. A vertex is forgotten as soon as all of its edges are in the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr

from .task import Task

SPREAD = 2.0
Edge = tuple[int, int]
# First and last edge of a block, the pairs of ends of its fragments, and the vertices that have two edges.
State = tuple[int, int, frozenset[Edge], frozenset[int]]


def grid_edges(rows: int, columns: int) -> tuple[Edge, ...]:
    """The edges of a grid, vertices numbered row by row: to the right of each vertex, then below it."""
    found: list[Edge] = []
    for v in range(rows * columns):
        if (v + 1) % columns:
            found.append((v, v + 1))
        if v + columns < rows * columns:
            found.append((v, v + columns))
    return tuple(found)


@dataclass(frozen=True)
class SimplePath(cr.Constraint):
    """The selected edges are a simple path from ``source`` to ``target``; edge i joins ``edges[i]``."""

    edges: tuple[Edge, ...]
    source: int
    target: int

    def leaf(self, var: int) -> tuple[State | None, State | None]:
        """An edge that is not taken, and one that is: a fragment of two ends."""
        nothing: frozenset[int] = frozenset()
        absent = self._checked(var, var, frozenset(), nothing)
        return absent, self._checked(var, var, frozenset([self.edges[var]]), nothing)

    def merge(self, left: Any, right: Any) -> State | None:
        """Fragments that meet at a vertex are joined; a vertex has two edges at most, and nothing closes a cycle."""
        used = set(left[3]) | set(right[3])
        if left[3] & right[3]:
            return None
        other_end: dict[int, int] = {}
        for a, b in (*left[2], *right[2]):
            if a in used or b in used:
                return None
            # The ends of what the new fragment extends, where it does.
            far_a, far_b = other_end.pop(a, a), other_end.pop(b, b)
            if far_a == b:
                return None  # both ends of one fragment: a cycle
            used.update(v for v, far in ((a, far_a), (b, far_b)) if v != far)
            other_end[far_a], other_end[far_b] = far_b, far_a
        pairs = frozenset((a, b) for a, b in other_end.items() if a < b)
        return self._checked(left[0], right[1], pairs, frozenset(used))

    def accepts(self, state: Any) -> bool:
        """One fragment is left, from source to target."""
        ends = (min(self.source, self.target), max(self.source, self.target))
        return bool(state[2] == frozenset([ends]))

    def _checked(self, first: int, last: int, pairs: frozenset[Edge], used: frozenset[int]) -> State | None:
        """The state, without what no longer matters; None if a vertex ended up with a wrong number of edges."""
        complete = _complete(self.edges, first, last)
        ends = {v for pair in pairs for v in pair}
        terminals = {self.source, self.target}
        if used & terminals or (ends & complete) - terminals or (complete & terminals) - ends:
            return None
        if (min(terminals), max(terminals)) in pairs and len(pairs) > 1:
            return None  # the path is whole, and something is left over
        return first, last, pairs, used - complete


@cache
def _complete(edges: tuple[Edge, ...], first: int, last: int) -> frozenset[int]:
    """The vertices all of whose edges are among edges[first..last]."""
    outside = {v for edge in (*edges[:first], *edges[last + 1 :]) for v in edge}
    return frozenset(v for edge in edges[first : last + 1] for v in edge if v not in outside)


def path_constraint(size: int) -> SimplePath:
    """Simple paths from one corner of a ``size`` x ``size`` grid to the opposite one."""
    return SimplePath(grid_edges(size, size), 0, size * size - 1)


def shortest_paths(
    train: int, validation: int, test: int, seed: int, size: int = 4, features: int = 12, noise: float = 0.2
) -> Task:
    """Rows of features, and the shortest path under edge weights that are a hidden function of them.

    The logarithms of the weights are a hidden two-layer network's outputs, with a standard deviation of ``SPREAD``;
    each is off by ``noise`` of that, anew in every row, so that no function of the features is always right.
    """
    circuit = cr.compile(path_constraint(size), len(grid_edges(size, size)))
    # The network is the same for all seeds; the rows and the noise are not.
    hidden = torch.Generator().manual_seed(2026)
    first = torch.randn(features, 32, generator=hidden) / features**0.5
    second = torch.randn(32, circuit.n, generator=hidden) / 32**0.5
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(train + validation + test, features, generator=generator)
    scores = torch.tanh(1.5 * (x @ first)) @ second
    scores = scores / scores.std() + noise * torch.randn(scores.shape, generator=generator)
    labels = _cheapest(circuit, (SPREAD * scores).exp())
    return Task.split("paths", circuit, x, labels, train, validation)


def _cheapest(circuit: cr.Circuit, costs: Tensor) -> Tensor:
    """[rows, N] bool: the best of all paths, of which a small grid has few enough to try."""
    paths = circuit(torch.zeros(circuit.n)).enumerate_support()
    return paths[(costs @ paths.t()).argmin(-1)].bool()
