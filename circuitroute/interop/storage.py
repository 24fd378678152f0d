"""Saved circuits: checked, versioned, free of code.

A file is ASCII text (``docs/files.md`` specifies it byte for byte)::

    circuitroute circuit 1
    {"n": 4, "nodes": 21, "elements": 19, "counts": [2], "constraint": "Exactly(2)", "builtin": true}
    kind <base64 of uint8>
    variable <base64 of int32>
    first <base64 of int64>
    left <base64 of int32>
    right <base64 of int32>
    sha256 <hexadecimal digest of all bytes before this line>
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from circuitroute._files import as_path, replace_file, sealed, unsealed
from circuitroute.circuit import Compiled, Graph, NodeKind, Parts
from circuitroute.circuit.graph import count_range, model_count
from circuitroute.circuit.verify.conflicts import UnverifiedError
from circuitroute.circuit.verify.properties import check
from circuitroute.constraints import Constraint
from circuitroute.deadline import tick
from circuitroute.errors import CircuitFileError, CircuitPropertyError, CircuitTooLargeError
from circuitroute.interop.imported import Opaque
from circuitroute.interop.reprs import parse_constraint, rebuilt
from circuitroute.interop.text import kind_of

MAGIC = b"circuitroute circuit "
VERSION = 1
_SEAL = b"sha256 ", b"\n"
_ARRAYS = {"kind": "<u1", "variable": "<i4", "first": "<i8", "left": "<i4", "right": "<i4"}
# Count potentials are compared modulo this prime, at a random point.
_PRIME = (1 << 61) - 1


class _Header(NamedTuple):
    n: int
    nodes: int
    elements: int
    counts: tuple[int, ...] | None
    constraint: str
    builtin: bool


# ---------------------------------------------------------------------------------------------- saving


def save(circuit: Compiled, path: str | os.PathLike[str]) -> None:
    """Write a circuit to a file that :func:`read` reads; a file that is there is replaced in one step.

    A forced engine is not part of the file.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, content(circuit))


def content(circuit: Compiled) -> bytes:
    """What :func:`save` writes: ASCII."""
    graph = circuit.graph
    header = {
        "n": graph.n,
        "nodes": graph.num_nodes,
        "elements": graph.num_edges,
        "counts": None if circuit.counts is None else list(circuit.counts),
        "constraint": repr(circuit.constraint),
        "builtin": rebuilt(circuit.constraint) is not None,
    }
    lines = [MAGIC + str(VERSION).encode(), json.dumps(header).encode("ascii")]
    for name, dtype in _ARRAYS.items():
        data = np.ascontiguousarray(getattr(graph, name), dtype=dtype).tobytes()
        lines.append(name.encode() + b" " + base64.b64encode(data))
    return sealed(b"\n".join([*lines, b""]), *_SEAL)


# ---------------------------------------------------------------------------------------------- loading


def read(path: str | os.PathLike[str]) -> Parts:
    """The parts of a circuit that :func:`save` wrote, verified; see :func:`circuitroute.load`."""
    source = as_path("path", path)
    return parse(source, source.read_bytes())


def parse(source: Path | str, data: bytes) -> Parts:
    """The parts of a circuit from what :func:`content` made of it, verified; ``source`` names it in errors."""
    lines = _verified_lines(source, data)
    header = _header(source, lines[1])
    try:
        graph = _graph(header, lines[2:])
        _check_graph(graph, header)
    except CircuitTooLargeError:
        raise
    except (ValueError, CircuitPropertyError) as error:
        raise CircuitFileError(f"{source} does not hold a valid circuit: {error}") from None
    return Parts(graph, _constraint(header), header.counts)


def _verified_lines(path: Path | str, data: bytes) -> list[bytes]:
    """The lines before the checksum, which is right."""
    if not data.startswith(MAGIC):
        raise CircuitFileError(f"{path} is not a saved circuit: it looks like {kind_of(data)}")
    version = data[len(MAGIC) : len(MAGIC) + 20].split(b"\n")[0]
    if version != str(VERSION).encode():
        if version.isdigit() and int(version) > VERSION:
            raise CircuitFileError(
                f"{path} is a saved circuit of version {int(version)}, and this circuitroute reads version {VERSION}: "
                "update circuitroute, or save the circuit again with this one"
            )
        raise CircuitFileError(f"{path} is damaged: its first line gives no version")
    try:
        *lines, last = unsealed(data, *_SEAL).split(b"\n")
    except ValueError as error:
        raise CircuitFileError(f"{path} is damaged: {error}") from None
    if last or len(lines) != 2 + len(_ARRAYS):
        raise CircuitFileError(f"{path} has {len(lines)} lines before its checksum, expected {2 + len(_ARRAYS)}")
    return lines


def _header(path: Path | str, line: bytes) -> _Header:
    try:
        given: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise CircuitFileError(f"{path}, line 2: expected an object in JSON") from None
    if not isinstance(given, dict) or set(given) != set(_Header._fields):
        raise CircuitFileError(f"{path}, line 2: expected an object with {', '.join(_Header._fields)}")
    counts = given["counts"]
    sizes = [given["n"], given["nodes"], given["elements"], *(counts if isinstance(counts, list) else [])]
    if not (
        all(type(size) is int and 0 <= size < 1 << 31 for size in sizes)
        and given["n"] >= 1
        and (counts is None or (isinstance(counts, list) and counts and counts == sorted(set(counts))))
        and isinstance(given["constraint"], str)
        and isinstance(given["builtin"], bool)
    ):
        raise CircuitFileError(
            f"{path}, line 2: expected whole numbers n, nodes, elements, counts null or increasing, constraint text, "
            "builtin true or false"
        )
    return _Header(**{**given, "counts": None if counts is None else tuple(counts)})


def _graph(header: _Header, lines: list[bytes]) -> Graph:
    lengths = {
        "kind": header.nodes,
        "variable": header.nodes,
        "first": header.nodes + 1,
        "left": header.elements,
        "right": header.elements,
    }
    arrays = {
        name: _array(name, dtype, lengths[name], line)
        for (name, dtype), line in zip(_ARRAYS.items(), lines, strict=True)
    }
    return Graph(n=header.n, **arrays)


def _array(name: str, dtype: str, length: int, line: bytes) -> npt.NDArray[Any]:
    word, _, text = line.partition(b" ")
    if word != name.encode():
        raise ValueError(f"expected the array {name}")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError(f"the array {name} is not base64") from None
    array = np.frombuffer(data, dtype=dtype) if len(data) % np.dtype(dtype).itemsize == 0 else None
    if array is None or len(array) != length:
        raise ValueError(f"the array {name} has {len(data)} bytes, expected {length} numbers of type {dtype[1:]}")
    return array.astype(np.dtype(dtype).newbyteorder("="))


# ---------------------------------------------------------------------------------------------- what a graph must be


def _check_graph(graph: Graph, header: _Header) -> None:
    _check_arrays(graph)
    if header.counts is not None and header.counts[-1] > graph.n:
        raise ValueError(f"the count {header.counts[-1]} is larger than n={graph.n}")
    # A circuit without a known fault is taken as compiled: the checksum says that it is what was saved.
    with suppress(UnverifiedError):
        check(graph)
    if header.counts is not None:
        _check_counts(graph, header.counts)


def _check_arrays(graph: Graph) -> None:
    """Check kinds, variables, ranges of elements, and that children come before parents."""
    kind, variable, first = graph.kind, graph.variable, graph.first
    literal = (kind == NodeKind.ABSENT) | (kind == NodeKind.PRESENT)
    sizes = np.diff(first)
    owner_ok = bool(graph.num_nodes) and first[0] == 0 and first[-1] == graph.num_edges and bool((sizes >= 0).all())
    rules = {
        "it has no nodes": bool(graph.num_nodes),
        "there are more variables than literals": graph.n <= int(literal.sum()),
        "a node is of an unknown kind": bool((kind <= NodeKind.SUM).all()),
        "a literal has no variable in 0..n-1, or another node has one": bool(
            ((variable[literal] >= 0) & (variable[literal] < graph.n)).all() and (variable[~literal] == -1).all()
        ),
        "the elements do not belong to the nodes in order": owner_ok,
        "a sum has no elements, or another node has some": bool(((sizes > 0) == (kind == NodeKind.SUM)).all()),
    }
    broken = next((rule for rule, holds in rules.items() if not holds), None)
    if broken is None:
        owner = np.repeat(np.arange(graph.num_nodes), sizes)
        children = np.concatenate([graph.left, graph.right])
        if (children < 0).any() or (children >= np.tile(owner, 2)).any():
            broken = "a node comes before its child"
    if broken is not None:
        raise ValueError(broken)


def _check_counts(graph: Graph, counts: tuple[int, ...]) -> None:
    """The subsets of a count circuit are all those of the allowed sizes, and no others.

    As many models as there should be, of sizes between the smallest and the largest, and the same number of each
    size: the polynomials sum_j (models of size j) x^j agree at a random point modulo a prime.
    """
    models = expected = 0
    point = secrets.randbelow(_PRIME)
    leaves = np.where(graph.kind == NodeKind.PRESENT, point, 1).astype(object)
    value = graph.fold(leaves, lambda a, b: a * b % _PRIME, np.add)[-1] % _PRIME
    for count in counts:
        size = _comb(graph.n, count)
        models, expected = models + size, (expected + size * pow(point, count, _PRIME)) % _PRIME
    if value != expected or model_count(graph) != models or count_range(graph) != (counts[0], counts[-1]):
        raise ValueError("the allowed counts are not those of the circuit")


def _comb(n: int, count: int) -> int:
    tick(1 + min(count, n - count) // 4)
    return math.comb(n, count)


def _constraint(header: _Header) -> Constraint:
    found = parse_constraint(header.constraint) if header.builtin else None
    return Opaque(header.constraint) if found is None else found
