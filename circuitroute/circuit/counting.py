"""A circuit that also knows how many variables are selected: every node split by its count.

The product of a circuit with a counter on the circuit's own tree. Below the root every node of the result has one
definite number of selected variables, and the root's elements come in order of theirs.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from circuitroute.circuit.graph import Graph, NodeKind, count_ranges
from circuitroute.deadline import tick

# (left, right) node pairs
Pairs = list[tuple[int, int]]


def has_definite_counts(graph: Graph) -> bool:
    """Whether below the root every node has one definite number of selected variables."""
    fewest, most = count_ranges(graph)
    last = slice(int(graph.first[-2]), int(graph.first[-1]))
    children = np.concatenate([graph.left[last], graph.right[last]])
    return bool((fewest[children] == most[children]).all())


def most_elements_split(graph: Graph) -> int:
    """An upper bound on the elements of :func:`split_by_count`, from the counts each node can have."""
    fewest, most = count_ranges(graph)
    counts = most - fewest + 1
    return int((counts[graph.left] * counts[graph.right]).sum())


def split_by_count(graph: Graph) -> Graph:
    """The same subsets from nodes of definite count: node v becomes one node per count its subsets have."""
    kinds: list[int] = []
    variables: list[int] = []
    elements: list[Pairs] = []

    def add(kind: int, variable: int, pairs: Pairs) -> int:
        kinds.append(kind)
        variables.append(variable)
        elements.append(pairs)
        return len(kinds) - 1

    parts: list[dict[int, int]] = []  # of every node: count -> new node
    first, left, right = graph.first.tolist(), graph.left.tolist(), graph.right.tolist()
    root = graph.num_nodes - 1
    for node, (kind, variable) in enumerate(zip(graph.kind.tolist(), graph.variable.tolist(), strict=True)):
        if kind != NodeKind.SUM:
            parts.append({int(kind == NodeKind.PRESENT): add(kind, variable, [])})
            continue
        by_count: dict[int, Pairs] = defaultdict(list)
        for e in range(first[node], first[node + 1]):
            tick(1 + len(parts[left[e]]) * len(parts[right[e]]) // 4)
            for i, a in parts[left[e]].items():
                for j, b in parts[right[e]].items():
                    by_count[i + j].append((a, b))
        if node == root:
            add(kind, variable, [pair for count in sorted(by_count) for pair in by_count[count]])
        else:
            parts.append({count: add(kind, variable, pairs) for count, pairs in sorted(by_count.items())})
    return Graph.of(graph.n, kinds, variables, elements)
