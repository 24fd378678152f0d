"""The compiler of :class:`Checksum`: a circuit written by hand, as a chain over the variables.

Node (i, r) stands for "the positions of the selected variables from i on add up to r, modulo the modulus". It has two
elements: variable i is absent and (i + 1, r) holds, or it is present and (i + 1, r - position) does. Both mention the
variables from i on, which makes the circuit smooth; they differ in a literal, which makes it deterministic.
"""

from __future__ import annotations

import numpy as np

import circuitroute as cr
from circuitroute.circuit import Graph, NodeKind
from circuitroute_parity.constraints import Checksum


@cr.register_compiler(Checksum)
def compile_checksum(constraint: Checksum, n: int, max_nodes: int) -> cr.Circuit:
    """Compile to about ``n * (modulus + 2)`` nodes.

    Raises:
        InfeasibleError: no subset of ``n`` variables has this checksum.
        CircuitTooLargeError: more than ``max_nodes`` nodes.
    """
    asked = _asked(constraint, n)
    arrays = _Arrays(constraint, n, max_nodes)
    below = {0: arrays.add(NodeKind.TRUE)}  # after the last variable nothing is left to add
    for i in reversed(range(n)):
        below = _level(arrays, i, asked[i], below, constraint.modulus)
    if constraint.remainder not in below:
        raise cr.InfeasibleError(f"no subset of {n} variables satisfies {constraint!r}")
    return cr.Circuit(arrays.graph(), constraint)


def _asked(constraint: Checksum, n: int) -> list[set[int]]:
    """Per variable the remainders that its nodes are needed for, from the root down: no node is built in vain."""
    asked = [{constraint.remainder}]
    for i in range(n - 1):
        asked.append({(r - taken) % constraint.modulus for r in asked[i] for taken in (0, i + 1)})
    return asked


def _level(arrays: _Arrays, i: int, asked: set[int], below: dict[int, int], modulus: int) -> dict[int, int]:
    """The nodes of variable i by remainder; those that nothing satisfies are left out."""
    rests = {r: {NodeKind.ABSENT: r, NodeKind.PRESENT: (r - i - 1) % modulus} for r in sorted(asked)}
    possible = {r: {kind: below[s] for kind, s in some.items() if s in below} for r, some in rests.items()}
    used = sorted({kind for some in possible.values() for kind in some})
    literal = {kind: arrays.add(kind, i) for kind in used}
    return {
        r: arrays.add(NodeKind.SUM, elements=[(literal[kind], node) for kind, node in some.items()])
        for r, some in possible.items()
        if some
    }


class _Arrays:
    """A graph under construction: children before parents, the root last."""

    def __init__(self, constraint: Checksum, n: int, max_nodes: int) -> None:
        self._constraint, self._n, self._max_nodes = constraint, n, max_nodes
        self._kind: list[int] = []
        self._variable: list[int] = []
        self._first = [0]
        self._elements: list[tuple[int, int]] = []

    def add(self, kind: NodeKind, variable: int = -1, elements: list[tuple[int, int]] | None = None) -> int:
        """Append a node; returns its index."""
        if len(self._kind) == self._max_nodes:
            raise cr.CircuitTooLargeError(
                f"{self._constraint!r} over {self._n} variables needs more than max_nodes={self._max_nodes} nodes; "
                "raise max_nodes or lower the modulus"
            )
        self._kind.append(int(kind))
        self._variable.append(variable)
        self._elements += elements or []
        self._first.append(len(self._elements))
        return len(self._kind) - 1

    def graph(self) -> Graph:
        """The arrays in the types that a graph wants."""
        left, right = np.array(self._elements, dtype=np.int32).T
        return Graph(
            n=self._n,
            kind=np.array(self._kind, dtype=np.uint8),
            variable=np.array(self._variable, dtype=np.int32),
            first=np.array(self._first, dtype=np.int64),
            left=left,
            right=right,
        )
