"""Our circuits in KLay (Maene, Derkinderen & Zuidberg Dos Martires, ICLR 2025): gather and scatter in log space.

Shapes: T tokens, N variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks.registry import UnavailableError
from circuitroute.circuit import Graph, NodeKind


def log_partition_of(circuit: cr.Circuit, device: str) -> Callable[[Tensor], Tensor]:
    """KLay's log Z [T] as a function of the logits [T, N]; rows go in as a batch. The marginals are its gradient.

    Raises:
        UnavailableError: KLay is not installed.
    """
    module = _module(circuit.graph).to(device)

    def log_partition(logits_TN: Tensor) -> Tensor:
        # Log weights of the literals: present theta, absent 0.
        log_partition_T: Tensor = module(logits_TN, torch.zeros_like(logits_TN)).squeeze(-1)
        return log_partition_T

    return log_partition


def _module(graph: Graph) -> Any:
    try:
        import klay
    except ImportError as reason:
        raise UnavailableError("KLay is not installed: pip install klaycircuits") from reason
    target = klay.Circuit()
    nodes: list[Any] = []
    for i, (kind, variable) in enumerate(zip(graph.kind.tolist(), graph.variable.tolist(), strict=True)):
        if kind == NodeKind.SUM:
            span = range(int(graph.first[i]), int(graph.first[i + 1]))
            pairs = [(int(graph.left[e]), int(graph.right[e])) for e in span]
            nodes.append(target.or_node([target.and_node([nodes[a], nodes[b]]) for a, b in pairs]))
        elif kind == NodeKind.TRUE:
            nodes.append(target.true_node())
        else:
            nodes.append(target.literal_node(variable + 1 if kind == NodeKind.PRESENT else -(variable + 1)))
    target.set_root(nodes[-1])
    return target.to_torch_module(semiring="log", compile=False)
