"""KLay on the case's own circuit, node for node: log Z, and the marginals as its gradient.

Shapes: T tokens, N variables.

It is less than the op asks for, and its rows say so: forward is log Z alone, and backward goes through log Z, with
ones from above, which gives the marginals. There are no gates, no sample, and no gradient of the marginals. Its
errors are those of log Z and of the marginals.
"""

from __future__ import annotations

from torch import Tensor

import circuitroute as cr
from benchmarks.klay_circuits import log_partition_of
from benchmarks.registry import Forward, Outputs, provider
from benchmarks.subset.workload import SubsetCase


@provider("subset", "klay", engine="klay", note="log Z and marginals only")
def build(case: SubsetCase) -> Forward:
    """The count circuit, batched, in float32."""
    log_partition = log_partition_of(cr.compile(cr.Between(case.kmin, case.k), case.n), case.device)

    def forward(logits_TN: Tensor) -> Outputs:
        log_partition_T = log_partition(logits_TN)
        return Outputs(log_partition_T, {"log_partition": log_partition_T})

    return forward
