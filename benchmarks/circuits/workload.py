"""The op: logits to log Z and marginals, on circuits from files.

Shapes: T rows, N variables.

A collection is a folder of circuits: SDDs with their vtrees (``name.sdd``, ``name.vtree``) and d-DNNFs (``name.nnf``).
The loss sees log Z, so forward and backward together give log Z and the marginals, whichever pass of a provider
computes the latter.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks.registry import BOTH, FORWARD, Outputs, op

SUFFIXES = (".sdd", ".nnf")
# The truth is slow: this many rows of a case are held against it.
CHECKED_ROWS = 16
# The largest circuit that is read.
MAX_NODES = 10_000_000


@cache
def read_circuit(path: Path) -> cr.Circuit:
    """The circuit of a file, by this library's own readers; read once."""
    if path.suffix == ".nnf":
        return cr.read_nnf(path, max_nodes=MAX_NODES, max_seconds=None)
    return cr.read_sdd(path, path.with_suffix(".vtree"), max_nodes=MAX_NODES, max_seconds=None)


@dataclass(frozen=True)
class CircuitCase:
    """T rows of N standard normal logits, and a circuit from a file of a collection."""

    collection: str
    path: Path
    rows: int
    seed: int = 0

    @cached_property
    def circuit(self) -> cr.Circuit:
        """The circuit, as this library reads it."""
        return read_circuit(self.path)

    @cached_property
    def logits(self) -> Tensor:
        """[T, N] float32."""
        return torch.randn(self.rows, self.circuit.n, generator=torch.Generator().manual_seed(self.seed))

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """(log Z [C], marginals [C, N]) of the first rows, float64, by the plainest engine."""
        dist = self.circuit.with_engine("naive")(self.logits[:CHECKED_ROWS].double())
        return dist.log_partition, dist.marginals

    def upstream(self, result: Tensor) -> Tensor:
        """Ones: the gradient of log Z is the marginals."""
        return torch.ones_like(result)

    def describe(self) -> dict[str, Any]:
        """The row fields that identify the case; of the file, its name alone."""
        names = {"collection": self.collection, "constraint": self.path.stem, "format": self.path.suffix[1:]}
        circuit = self.circuit
        sizes = {"nodes": circuit.num_nodes, "edges": circuit.num_edges, "depth": circuit.depth}
        return {"T": self.rows, "n": circuit.n, **names, **sizes, "dtype": "float32"}


@op
class Circuits:
    """Exact inference on circuits that others compiled, against the libraries that people evaluate them with."""

    name = "circuits"
    baseline = "circuitroute:torch"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--collection",
            action="append",
            default=[],
            metavar="NAME=FOLDER",
            help="a folder of .sdd (with .vtree) and .nnf files, for op circuits; may be given again",
        )
        parser.add_argument("--only", help="the circuits of these names, separated by commas, for op circuits")
        parser.add_argument("--batches", default="256", help="rows, for op circuits: T,T,... (default: 256)")

    def cases(self, options: Namespace) -> Sequence[CircuitCase]:
        if not options.collection:
            raise ValueError("op circuits needs circuits: give at least one --collection NAME=FOLDER")
        batches = [_batch(text) for text in options.batches.split(",")]
        files = [pair for text in options.collection for pair in _files(text)]
        if options.only is not None:
            files = _only(files, options.only.split(","))
        files = [pair for pair in files if _is_read(pair[1])]
        return [CircuitCase(name, path, rows, options.seed) for name, path in files for rows in batches]

    def errors(self, case: CircuitCase, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
        log_partition, marginals = case.truth
        found = outputs.values["log_partition"][:CHECKED_ROWS].detach().double()
        relative = (found - log_partition).abs() / log_partition.abs().clamp(min=1)
        apart = (gradient[:CHECKED_ROWS].double() - marginals).abs()
        return {FORWARD: float(relative.max()), BOTH: float(apart.max())}


def _files(text: str) -> list[tuple[str, Path]]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ValueError(f"--collection {text!r}: expected a name and a folder, such as spl=circuits/spl")
    if not Path(folder).is_dir():
        raise ValueError(f"--collection {text!r}: there is no folder {folder!r}")
    # Left out where a checkout holds a file's name alone.
    found = [path for path in Path(folder).iterdir() if path.suffix in SUFFIXES and path.stat().st_size]
    if not found:
        raise ValueError(f"--collection {text!r}: no {' or '.join(SUFFIXES)} file in {folder!r}")
    return [(name, path) for path in sorted(found)]


def _is_read(path: Path) -> bool:
    """Whether this library reads the circuit; if not it says why."""
    try:
        read_circuit(path)
    except cr.CircuitRouteError as reason:
        print(f"left out {path.name}: {reason}", flush=True)
        return False
    return True


def _only(files: list[tuple[str, Path]], names: Sequence[str]) -> list[tuple[str, Path]]:
    known = {path.stem for _, path in files}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--only: no circuit {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [(name, path) for name, path in files if path.stem in names]


def _batch(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"--batches: {text.strip()!r} is not a whole number of at least 1")
    return int(text)
