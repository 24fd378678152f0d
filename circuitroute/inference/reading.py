"""Circuits and constraints from files: what a parser of :mod:`circuitroute.interop` returns, made into a
:class:`Circuit`; clauses, which :func:`circuitroute.compile` does that to, as they are."""

from __future__ import annotations

import os

from circuitroute.constraints import CNF
from circuitroute.deadline import DEFAULT_SECONDS, within
from circuitroute.inference.circuit import Circuit
from circuitroute.interop import cnf, nnf, sdd, storage

_REMEDY = "write a smaller circuit, whose or-nodes decide variables"


def load(path: str | os.PathLike[str], max_seconds: float | None = DEFAULT_SECONDS) -> Circuit:
    """Read a circuit that :meth:`Circuit.save` wrote: the same arrays, so the same results and the same samples.

    The file is verified: its checksum, its structure, that the circuit is smooth, decomposable and, where that can
    be decided, deterministic, and that the allowed counts are what the circuit says. Nothing in it is executed. The
    constraint is rebuilt if it is made of built-in ones, and is otherwise a placeholder that carries its repr.

    Args:
        path: the file.
        max_seconds: how long reading and verifying may take, in CPU seconds of this thread; None for no limit.

    Raises:
        FileNotFoundError: there is no such file.
        CircuitFileError: the file is damaged, of another kind, or of a newer version; names the path.
        CircuitTooLargeError: the scopes of the circuit's nodes do not fit in memory, to be verified, or it takes more
            than ``max_seconds`` seconds.
    """
    with within(max_seconds, lambda: f"loading and verifying {os.fspath(path)}", "save a smaller circuit"):
        return Circuit(*storage.read(path))


def read_cnf(path: str | os.PathLike[str], max_seconds: float | None = DEFAULT_SECONDS) -> CNF:
    """Read clauses in the DIMACS format, and what model counters add to them, as a constraint to compile.

    ``circuit = cr.compile(cr.read_cnf(path))``. Comments may stand anywhere, clauses go over lines as they like, the
    last 0 may be missing and a line ``%`` ends the file (SATLIB). Understood beyond clauses:

    - ``c p weight LITERAL WEIGHT 0``, ``c p show VARIABLES... 0`` and ``c t TRACK``, the model counting competition's
      since 2021, and ``c ind VARIABLES... 0``, which other counters write for ``c p show``;
    - ``w LITERAL WEIGHT`` after ``p cnf``, ``p wcnf`` or ``p wpcnf``, and ``vp VARIABLES... 0`` after ``p pcnf`` or
      ``p wpcnf``, the competition's of 2020. As in Cachet's files, of a variable whose positive literal alone has such
      a weight w the other has 1 - w, and w = -1 gives both the weight 1.

    Weights are kept exactly, as fractions.

    Args:
        path: the file.
        max_seconds: how long reading may take, in CPU seconds of this thread; None for no limit.

    Returns:
        The constraint over the file's variables, 1 becoming 0; see :class:`circuitroute.CNF`.

    Raises:
        FileNotFoundError: there is no such file.
        CircuitFileError: the file is malformed, or of another kind; names path, line, what was found and expected.
        CircuitTooLargeError: reading takes more than ``max_seconds`` seconds.
    """
    with within(max_seconds, lambda: f"reading {os.fspath(path)}", "give fewer clauses"):
        return cnf.read(path)


def read_nnf(
    path: str | os.PathLike[str],
    n: int | None = None,
    max_nodes: int = 1_000_000,
    max_seconds: float | None = DEFAULT_SECONDS,
) -> Circuit:
    """Read a d-DNNF circuit in the format of c2d or of d4 (the content tells which).

    The circuit is made smooth, and verified: what is not decomposable, or cannot be seen to be deterministic, is
    refused. Elements of an or-node must imply opposite literals, as they do where a compiler decided a variable, or
    depend on at most 16 variables, or the whole circuit must be structured.

    Args:
        path: the file.
        n: number of variables, if there are more than the file speaks of; the others are left free.
        max_nodes: the largest circuit to build, in nodes.
        max_seconds: how long reading and verifying may take, in CPU seconds of this thread; None for no limit.

    Returns:
        A circuit over the file's variables, 1 becoming 0; its constraint only tells where it came from.

    Raises:
        CircuitFileError: the file is malformed, or of another kind; names path, line, what was found and expected.
        CircuitPropertyError: a node is not decomposable, or not (seen to be) deterministic; named as in the file.
        InfeasibleError: the circuit is false.
        CircuitTooLargeError: the smooth circuit needs more than ``max_nodes`` nodes or ``max_seconds`` seconds.
        ValueError: ``n`` is smaller than the file's number of variables.
    """
    with within(max_seconds, lambda: f"reading and verifying {os.fspath(path)}", _REMEDY):
        return Circuit(*nnf.read(path, n, max_nodes))


def read_sdd(
    path: str | os.PathLike[str],
    vtree: str | os.PathLike[str],
    max_nodes: int = 1_000_000,
    max_seconds: float | None = DEFAULT_SECONDS,
) -> Circuit:
    """Read a sentential decision diagram and its vtree, as libsdd and PySDD save them.

    The circuit is made smooth along the vtree, so that it stays structured, and verified to be decomposable and
    deterministic: by the values of its decisions' primes at a point of a large field, in linear time, where they are
    partitions, as libsdd's are; else exactly, as :meth:`circuitroute.Circuit.check` does.

    Args:
        path: the SDD.
        vtree: the file of the vtree it was saved with.
        max_nodes: the largest circuit to build, in nodes.
        max_seconds: how long reading and verifying may take, in CPU seconds of this thread; None for no limit.

    Returns:
        A circuit over the vtree's variables, 1 becoming 0; its constraint only tells where it came from.

    Raises:
        CircuitFileError: a file is malformed, of another kind, or not the vtree of this SDD; names path, line, what
            was found and expected.
        CircuitPropertyError: a node is not deterministic, or could not be verified to be; named as in the file.
        InfeasibleError: the circuit is false.
        CircuitTooLargeError: the smooth circuit needs more than ``max_nodes`` nodes or ``max_seconds`` seconds.
    """
    with within(max_seconds, lambda: f"reading and verifying {os.fspath(path)}", _REMEDY):
        return Circuit(*sdd.read(path, vtree, max_nodes))
