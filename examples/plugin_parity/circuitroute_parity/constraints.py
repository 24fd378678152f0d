"""What is allowed: one constraint that is a state machine, and one that leaves the work to a compiler."""

from __future__ import annotations

from dataclasses import dataclass

import circuitroute as cr
from circuitroute.constraints import State


@dataclass(frozen=True)
class Parity(cr.Constraint):
    """An odd (or even) number of variables is selected.

    Two states per block of variables, whatever their number. As ``CountIn({1, 3, 5, ...})`` it would keep count.
    """

    odd: bool

    def leaf(self, var: int) -> tuple[State | None, State | None]:
        return False, True

    def merge(self, left: State, right: State) -> State | None:
        return left != right

    def accepts(self, state: State) -> bool:
        return state == self.odd


@dataclass(frozen=True)
class Checksum(cr.Constraint):
    """The positions 1, 2, ... of the selected variables add up to ``remainder`` modulo ``modulus``.

    With ``modulus = n + 1`` the allowed subsets are the Varshamov-Tenengolts codewords, which correct one deletion
    (Levenshtein, 1965). There is no state machine here: ``circuitroute_parity.compilers`` writes the circuit.
    """

    modulus: int
    remainder: int

    def __post_init__(self) -> None:
        if self.modulus < 1:
            raise ValueError(f"modulus={self.modulus}: must be at least 1")
        if not 0 <= self.remainder < self.modulus:
            raise ValueError(f"remainder={self.remainder}: must lie in 0..{self.modulus - 1}")
