"""KLay (Maene, Derkinderen & Zuidberg Dos Martires, ICLR 2025): layered circuits by gather and scatter in log space.

Shapes: T tokens, N variables.

It gives log Z, and the marginals as its gradient. ``klay`` is the case's own circuit, node for node, ``klay:exactly
8`` plain "exactly 8 of N" on a balanced tree.
"""

from __future__ import annotations

from torch import Tensor

import circuitroute as cr
from benchmarks.klay_circuits import log_partition_of
from benchmarks.layered.workload import LayeredCase, shape_of
from benchmarks.registry import Forward, Outputs, provider


@provider("layered", "klay", engine="klay")
def build_same(case: LayeredCase) -> Forward:
    """The case's circuit."""
    return _forward(case, case.circuit)


@provider("layered", "klay:exactly 8", engine="klay", note="another circuit, of as many variables")
def build_exactly(case: LayeredCase) -> Forward:
    """Exactly 8 of N, a smaller circuit."""
    return _forward(case, cr.compile(cr.Exactly(8), case.n))


def _forward(case: LayeredCase, circuit: cr.Circuit) -> Forward:
    log_partition = log_partition_of(circuit, case.device)

    def forward(logits_TN: Tensor) -> Outputs:
        log_partition_T = log_partition(logits_TN)
        values = {"log_partition": log_partition_T, "circuit": circuit}
        return Outputs(log_partition_T, values, about=shape_of(circuit))

    return forward
