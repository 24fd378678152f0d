"""What everything below :class:`circuitroute.Circuit` needs to know about one.

Engines, evidence, distributions and file formats take anything of this shape; the class itself stands above them all,
since it can be called, drawn and saved.

Traced programs (torch.compile, torch.export) refer to a circuit by a *handle*, a name in this process.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

from circuitroute.circuit.graph import Graph
from circuitroute.constraints import Constraint

_numbers = itertools.count()
_alive: WeakValueDictionary[str, Compiled] = WeakValueDictionary()


class Parts(NamedTuple):
    """What a circuit is made of, in the order of :class:`circuitroute.Circuit`'s arguments: what parsers return."""

    graph: Graph
    constraint: Constraint
    counts: tuple[int, ...] | None = None


class Compiled(Protocol):
    """A compiled constraint; see :class:`circuitroute.Circuit` for what each of these means."""

    @property
    def n(self) -> int:
        """Number of variables N."""

    @property
    def constraint(self) -> Constraint:
        """What was compiled."""

    @property
    def graph(self) -> Graph:
        """The arrays."""

    @property
    def counts(self) -> tuple[int, ...] | None:
        """The allowed counts of a pure count constraint over all variables, increasing; None otherwise."""

    @property
    def min_count(self) -> int:
        """The smallest number of variables an allowed subset selects."""

    @property
    def max_count(self) -> int:
        """The largest number of variables any allowed subset selects (K)."""

    @property
    def engine(self) -> str | None:
        """The name of a forced engine, or None to choose by device."""

    @property
    def handle(self) -> str:
        """A name for this object in this process."""


def name(circuit: Compiled) -> str:
    """A new handle, by which :func:`of_handle` finds the circuit while it is alive."""
    handle = f"circuit {next(_numbers)}"
    _alive[handle] = circuit
    return handle


def of_handle(handle: str) -> Compiled:
    """The circuit with that handle.

    Raises:
        KeyError: there is no such circuit, or it is gone: traced programs need theirs to be kept alive.
    """
    try:
        return _alive[handle]
    except KeyError:
        raise KeyError(f"{handle!r} is not in memory: keep the circuit that was traced alive") from None
