"""The circuit in Boolean arithmetic: which subsets are allowed, and which evidence leaves any.

Legend: T tokens, N variables, M nodes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from circuitroute._validate import as_mask
from circuitroute.circuit.compiled import Compiled
from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.deadline import tick

# Values of nodes that are held at once.
MAX_VALUES = 1 << 28


def satisfies(circuit: Compiled, mask: Tensor) -> Tensor:
    """[...] bool, whether each subset [..., N] (bool, or numbers that are all 0 or 1) is allowed.

    Raises:
        ValueError: the last dimension is not N, or a value is neither 0 nor 1.
    """
    selected = as_mask("mask", mask, circuit.n)
    if circuit.counts is not None:
        allowed = torch.zeros(circuit.n + 1, dtype=torch.bool, device=selected.device)
        allowed[list(circuit.counts)] = True
        return allowed[selected.sum(-1)]
    rows = selected.reshape(-1, circuit.n)
    # A value per node and row: as many rows at once as a quarter of a gibibyte holds.
    most = max(1, MAX_VALUES // circuit.graph.num_nodes)
    parts = [holds(circuit.graph, ~some, some) for some in rows.split(most)]
    return torch.cat(parts).reshape(selected.shape[:-1])


def holds(graph: Graph, absent_TN: Tensor, present_TN: Tensor) -> Tensor:
    """[T] bool: the circuit's value on literals that are each given as true or false.

    With exactly one of a variable's literals true this tells whether the subset is allowed; with both true for the
    undecided ones, whether any completion is.
    """
    device = present_TN.device
    kind = torch.as_tensor(graph.kind.astype(np.int64), device=device)[:, None]
    variable = torch.as_tensor(np.maximum(graph.variable, 0).astype(np.int64), device=device)
    literal_MT = torch.where(kind == NodeKind.ABSENT, absent_TN.t()[variable], present_TN.t()[variable])
    holds_MT = literal_MT | (kind == NodeKind.TRUE)
    for level in graph.levels:
        tick(1 + len(level.left) * holds_MT.shape[1] // 1000)
        arrays = (level.left, level.right, level.nodes, level.segment)
        left, right, nodes, segment = (torch.as_tensor(a, device=device) for a in arrays)
        both = (holds_MT[left] & holds_MT[right]).to(torch.int32)
        hits = both.new_zeros(len(nodes), both.shape[1]).index_add_(0, segment, both)
        holds_MT[nodes] = hits > 0
    return holds_MT[-1]
