"""KLay (Maene, Derkinderen & Zuidberg Dos Martires, ICLR 2025) on the same file, batched in every way it offers.

Shapes: T rows, N variables.

It takes log-probabilities of the literals, so logits enter as those of coins, whose normaliser is added to what comes
out: log Z = log P(circuit) + sum of softplus(theta). With coins that sum to one no circuit need be smooth. The
marginals are the gradient. The batch is

    klay             a dimension of the tensors, which its modules take since 0.1
    klay:real        the same in the semiring of probabilities: faster, until float32 underflows
    klay:vmap        ``torch.vmap`` of a module, as its documentation says
    klay:compiled    as ``klay``, through ``torch.compile``, its default; minutes for every shape, so on request only
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.circuits.workload import CircuitCase
from benchmarks.registry import Forward, Outputs, UnavailableError, provider

# vmap runs KLay's segments one row after the other: more rows take seconds, in proportion.
MAX_VMAP_ROWS = 256


@provider("circuits", "klay", engine="klay")
def build(case: CircuitCase) -> Forward:
    """The batch as a dimension, log space."""
    return _forward(case, _of_logs(_module(case.path, "log")))


@provider("circuits", "klay:real", engine="klay")
def build_real(case: CircuitCase) -> Forward:
    """The batch as a dimension, probabilities."""
    log_partition = _of_probs(_module(case.path, "real"))
    logits = case.logits.clone().requires_grad_()
    value_T = log_partition(logits)
    (marginals,) = torch.autograd.grad(value_T.sum(), logits)
    lost = int((~(value_T.isfinite() & marginals.isfinite().all(-1))).sum())
    if lost:
        raise UnavailableError(f"{case.path.stem}: its float32 underflows in {lost} of {case.rows} rows")
    return _forward(case, log_partition)


@provider("circuits", "klay:vmap", engine="klay")
def build_vmap(case: CircuitCase) -> Forward:
    """The batch by vmap."""
    if case.rows > MAX_VMAP_ROWS:
        raise UnavailableError(f"takes seconds at more than {MAX_VMAP_ROWS} rows, in proportion to their number")
    batched = torch.vmap(_module(case.path, "log"))

    def module(present_TN: Tensor, absent_TN: Tensor) -> Tensor:
        with warnings.catch_warnings():  # torch has no batched segment_reduce, which is what is measured here
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            value: Tensor = batched(present_TN, absent_TN)
        return value

    return _forward(case, _of_logs(module))


@provider("circuits", "klay:compiled", engine="klay", by_default=False)
def build_compiled(case: CircuitCase) -> Forward:
    """The batch as a dimension, through torch.compile."""
    return _forward(case, _of_logs(_module(case.path, "log", compiled=True)))


def _of_logs(module: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def log_partition(logits_TN: Tensor) -> Tensor:
        value_T = module(F.logsigmoid(logits_TN), F.logsigmoid(-logits_TN)).squeeze(-1)
        return value_T + F.softplus(logits_TN).sum(-1)

    return log_partition


def _of_probs(module: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def log_partition(logits_TN: Tensor) -> Tensor:
        value_T = module(torch.sigmoid(logits_TN), torch.sigmoid(-logits_TN)).squeeze(-1)
        return value_T.log() + F.softplus(logits_TN).sum(-1)

    return log_partition


def _forward(case: CircuitCase, log_partition: Callable[[Tensor], Tensor]) -> Forward:
    about = shape_of(case.path)

    def forward(logits_TN: Tensor) -> Outputs:
        log_partition_T = log_partition(logits_TN)
        return Outputs(log_partition_T, {"log_partition": log_partition_T}, about=about)

    return forward


@cache
def shape_of(path: Path) -> dict[str, Any]:
    """The row fields of KLay's own circuit: it merges equal nodes, and pads its layers."""
    circuit = _circuit(path)
    layers = circuit.to_torch_module(compile=False).layers
    return {"nodes": circuit.nb_nodes(), "edges": sum(len(layer.ix_in) for layer in layers), "depth": len(layers)}


@cache
def _module(path: Path, semiring: str, compiled: bool = False) -> Any:
    # Of a circuit of its own: each further module of a circuit has one more layer, for its root.
    return _circuit(path).to_torch_module(semiring=semiring, compile=compiled)


def _circuit(path: Path) -> Any:
    try:
        import klay
    except ImportError as reason:
        raise UnavailableError("KLay is not installed: pip install klaycircuits") from reason
    circuit = klay.Circuit()
    if path.suffix == ".sdd":
        circuit.add_sdd_from_file(str(path))
        return circuit
    with path.open() as lines:
        if next(lines).startswith("nnf"):
            circuit.set_root(_of_c2d(circuit, lines))
            return circuit
    circuit.add_d4_from_file(str(path))
    return circuit


def _of_c2d(circuit: Any, lines: Iterable[str]) -> Any:
    """The root of a d-DNNF in c2d's format, which KLay does not read; see :func:`circuitroute.read_nnf`."""
    nodes: list[Any] = []
    for kind, *rest in map(str.split, lines):
        if kind == "L":
            nodes.append(circuit.literal_node(int(rest[0])))
            continue
        children = [nodes[int(child)] for child in rest[1 if kind == "A" else 2 :]]
        if kind == "A":
            nodes.append(circuit.and_node(children) if children else circuit.true_node())
        else:
            nodes.append(circuit.or_node(children) if children else circuit.false_node())
    return nodes[-1]
