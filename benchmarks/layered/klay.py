"""KLay (Maene, Derkinderen & Zuidberg Dos Martires, ICLR 2025): layered circuits by gather and scatter in log space.

Shapes: T tokens, N variables.

Rows of literal weights go in as a batch. It gives log Z, and the marginals as its gradient. ``klay`` is the case's own
circuit, node for node, ``klay:exactly 8`` plain "exactly 8 of N" on a balanced tree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks.layered.workload import LayeredCase
from benchmarks.registry import Forward, Outputs, UnavailableError, provider
from circuitroute.circuit import Graph, NodeKind


@provider("layered", "klay", engine="klay")
def build_same(case: LayeredCase) -> Forward:
    """The case's circuit."""
    return _forward(case, case.circuit)


@provider("layered", "klay:exactly 8", engine="klay")
def build_exactly(case: LayeredCase) -> Forward:
    """Exactly 8 of N, a smaller circuit."""
    return _forward(case, cr.compile(cr.Exactly(8), case.n))


def _forward(case: LayeredCase, circuit: cr.Circuit) -> Forward:
    module = _module(circuit.graph).to(case.device)

    def forward(logits_TN: Tensor) -> Outputs:
        # Log weights of the literals: present theta, absent 0.
        log_partition_T = module(logits_TN, torch.zeros_like(logits_TN)).squeeze(-1)
        return Outputs(log_partition_T, {"log_partition": log_partition_T, "circuit": circuit})

    return forward


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
