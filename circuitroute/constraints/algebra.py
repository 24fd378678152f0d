"""``a & b``, ``a | b``, ``~a``: constraints from constraints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from circuitroute.constraints.base import Constraint


def _parts(kind: type[And] | type[Or], parts: Iterable[Constraint]) -> tuple[Constraint, ...]:
    """Nested uses of one operator flattened, repetitions dropped, order kept."""
    flat: list[Constraint] = []
    for i, part in enumerate(parts):
        if not isinstance(part, Constraint):
            raise TypeError(f"parts[{i}]={part!r}: expected a circuitroute Constraint, got {type(part).__name__}")
        flat.extend(part.parts if isinstance(part, kind) else (part,))
    if not flat:
        raise ValueError("parts=(): give at least one constraint")
    return tuple(dict.fromkeys(flat))


@dataclass(frozen=True, repr=False, init=False)
class And(Constraint):
    """All of ``parts`` hold; made by ``a & b``."""

    parts: tuple[Constraint, ...]

    def __init__(self, parts: Iterable[Constraint]) -> None:
        object.__setattr__(self, "parts", _parts(And, parts))

    @staticmethod
    def of(*parts: Constraint) -> Constraint:
        """The combination, which is the part itself where there is only one."""
        combined = And(parts)
        return combined.parts[0] if len(combined.parts) == 1 else combined

    def over(self, indices: Iterable[int]) -> Constraint:
        chosen = list(indices)
        return And.of(*(part.over(chosen) for part in self.parts))

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.parts))})"


@dataclass(frozen=True, repr=False, init=False)
class Or(Constraint):
    """At least one of ``parts`` holds; made by ``a | b``."""

    parts: tuple[Constraint, ...]

    def __init__(self, parts: Iterable[Constraint]) -> None:
        object.__setattr__(self, "parts", _parts(Or, parts))

    @staticmethod
    def of(*parts: Constraint) -> Constraint:
        """The combination, which is the part itself where there is only one."""
        combined = Or(parts)
        return combined.parts[0] if len(combined.parts) == 1 else combined

    def over(self, indices: Iterable[int]) -> Constraint:
        chosen = list(indices)
        return Or.of(*(part.over(chosen) for part in self.parts))

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.parts))})"


@dataclass(frozen=True, repr=False)
class Not(Constraint):
    """``part`` does not hold; made by ``~a``."""

    part: Constraint

    def __post_init__(self) -> None:
        if not isinstance(self.part, Constraint):
            raise TypeError(f"part={self.part!r}: expected a circuitroute Constraint, got {type(self.part).__name__}")

    @staticmethod
    def of(part: Constraint) -> Constraint:
        """The negation; of a negation, what it negates."""
        return part.part if isinstance(part, Not) else Not(part)

    def over(self, indices: Iterable[int]) -> Constraint:
        return Not.of(self.part.over(indices))

    def __repr__(self) -> str:
        return f"~{self.part!r}"
