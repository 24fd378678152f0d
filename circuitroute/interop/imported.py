"""Constraints that are only known by where they came from: a circuit in a file, or text nobody here can read back."""

from __future__ import annotations

from dataclasses import dataclass

from circuitroute.constraints import Constraint


@dataclass(frozen=True)
class Imported(Constraint):
    """What a circuit read from a file says; equal for files of equal content.

    It has no compiler: the circuit is all that is known of it.

    Attributes:
        format: "c2d", "d4" or "sdd".
        digest: the SHA-256 of the file's content, in hexadecimal (of an SDD and its vtree, one after the other).
    """

    format: str
    digest: str


@dataclass(frozen=True)
class Opaque(Constraint):
    """The constraint of a loaded circuit that could not be rebuilt, such as one of a user's own class.

    It has no compiler: the circuit beside it is all that can be used.

    Attributes:
        text: the ``repr`` of the constraint when it was saved.
    """

    text: str
