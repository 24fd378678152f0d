"""cirkit (the APRIL lab's library of probabilistic circuits) on an SDD: its own reader, folded layers, log space.

Shapes: T rows, N variables.

Parameters are shared by all rows there, so weights that differ by row enter as data: a literal is the polynomial x of
its variable, or 1 - x, and the circuit is evaluated at x = sigmoid(theta). It is made smooth first, without which not
every circuit is built. Runs on request: for some circuits that takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.circuits.workload import CircuitCase
from benchmarks.registry import Forward, Outputs, UnavailableError, provider


@provider("circuits", "cirkit", engine="cirkit", by_default=False)
def build(case: CircuitCase) -> Forward:
    """The batch as a dimension, log space."""
    if case.path.suffix != ".sdd":
        raise UnavailableError("cirkit reads SDDs only")
    if case.rows == 1:
        raise UnavailableError("cirkit's polynomials take a batch of one row for something else")
    module, about = _module(case.path)

    def forward(logits_TN: Tensor) -> Outputs:
        value_T = module(torch.sigmoid(logits_TN)).reshape(len(logits_TN))
        log_partition_T = value_T + F.softplus(logits_TN).sum(-1)
        return Outputs(log_partition_T, {"log_partition": log_partition_T}, about=about)

    return forward


@cache
def _module(path: Path) -> tuple[Any, dict[str, Any]]:
    """The circuit in torch, and the row fields of its shape."""
    try:
        from cirkit.pipeline import PipelineContext
        from cirkit.templates.logic import SDD
    except ImportError as reason:
        raise UnavailableError(f"cirkit cannot be imported ({reason}): pip install cirkit") from reason
    symbolic = SDD.load(str(path)).build_circuit(_literal(0.0, 1.0), _literal(1.0, -1.0))
    context = PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True)
    module = context.compile(symbolic).requires_grad_(False)
    edges = sum(len(symbolic.layer_inputs(layer)) for layer in symbolic.layers)
    return module, {"nodes": len(list(symbolic.layers)), "edges": edges, "depth": len(list(module.layers))}


def _literal(constant: float, slope: float) -> Callable[..., Any]:
    """A factory of input layers constant + slope x."""
    from cirkit.symbolic.initializers import ConstantTensorInitializer
    from cirkit.symbolic.layers import PolynomialLayer
    from cirkit.symbolic.parameters import Parameter, TensorParameter

    def layer(scope: Any, num_units: int) -> Any:
        value = ConstantTensorInitializer(np.array([constant, slope]))
        coefficients = Parameter.from_input(TensorParameter(num_units, 2, initializer=value, learnable=False))
        return PolynomialLayer(scope, num_units, degree=1, coeff=coefficients)

    return layer
