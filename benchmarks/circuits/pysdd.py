"""PySDD's own weighted model counting: the SDD node by node, children first, one row after the other, in float64.

Shapes: T rows, N variables.

One pass finds the count and all derivatives, so forward alone costs as much as both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.circuits.workload import CircuitCase
from benchmarks.registry import Forward, Outputs, UnavailableError, provider

# Rows take their time one by one: more say nothing new.
MAX_ROWS = 16


@provider("circuits", "pysdd", engine="pysdd")
def build(case: CircuitCase) -> Forward:
    """Row by row."""
    if case.path.suffix != ".sdd":
        raise UnavailableError("PySDD reads SDDs only")
    if case.rows > MAX_ROWS:
        raise UnavailableError(f"PySDD has no batch: not timed at more than {MAX_ROWS} rows, one after the other")
    node = _node(case.path)

    def forward(logits_TN: Tensor) -> Outputs:
        log_partition_T: Tensor = _Count.apply(logits_TN, node)  # type: ignore[no-untyped-call]
        return Outputs(log_partition_T, {"log_partition": log_partition_T})

    return forward


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TN: Tensor, node: Any) -> Tensor:
        counter, found, marginals = node.wmc(log_mode=True), [], []
        n = logits_TN.shape[1]
        logits = logits_TN.double()
        weights = torch.cat([F.logsigmoid(-logits).flip(1), F.logsigmoid(logits)], 1).numpy()
        for row in weights:
            counter.set_literal_weights_from_array(row)
            found.append(counter.propagate())
            marginals.append([counter.literal_pr(i + 1) for i in range(n)])
        ctx.save_for_backward(torch.from_numpy(np.exp(marginals)).to(logits_TN.dtype))
        return (logits.new_tensor(found) + F.softplus(logits).sum(-1)).to(logits_TN.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream_T: Tensor) -> tuple[Tensor, None]:
        (marginals_TN,) = ctx.saved_tensors
        return upstream_T[:, None] * marginals_TN, None


@cache
def _node(path: Path) -> Any:
    try:
        from pysdd.sdd import SddManager, Vtree
    except ImportError as reason:
        raise UnavailableError("PySDD is not installed: pip install pysdd") from reason
    vtree = path.with_suffix(".vtree")
    if not vtree.exists():
        raise UnavailableError("PySDD needs the vtree beside the SDD")
    manager = SddManager.from_vtree(Vtree.from_file(str(vtree).encode()))
    return manager.read_sdd_file(str(path).encode())
