"""Constraints known only by their origin: a circuit in a file, or a repr that cannot be read back."""

from __future__ import annotations

from dataclasses import dataclass

from circuitroute.constraints import Constraint


@dataclass(frozen=True)
class Imported(Constraint):
    """The constraint of a circuit read from a file; equal for files of equal content.

    It has no compiler: only the circuit is known.

    Attributes:
        format: "c2d", "d4" or "sdd".
        digest: the SHA-256 of the file's content, in hexadecimal (of an SDD and its vtree, one after the other).
    """

    format: str
    digest: str


@dataclass(frozen=True)
class Opaque(Constraint):
    """The constraint of a loaded circuit that could not be rebuilt, such as one of a user's own class.

    It has no compiler: only its circuit can be used.

    Attributes:
        text: the ``repr`` of the constraint when it was saved.
    """

    text: str
