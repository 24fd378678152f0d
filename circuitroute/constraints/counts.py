"""Constraints on the number of selected variables: exactly k, at most, at least, between, one of a set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from circuitroute._validate import as_items, index_tuple, int_at_least
from circuitroute.constraints.base import Constraint, Over, State


class Count(Constraint):
    """A constraint on the number of selected variables; the state of a block is its count.

    Subclasses say which counts are allowed in :meth:`allows` and give :attr:`largest`, beyond which a block
    is dead (``None``: no limit).

    Raises:
        NotImplementedError: :attr:`largest` or :meth:`allows` is used of a subclass that does not define it.
    """

    @property
    def largest(self) -> int | None:
        """The largest allowed count, or None when every large count is allowed."""
        raise NotImplementedError(f"{type(self).__name__} does not define largest")

    def allows(self, count: int) -> bool:
        """Whether ``count`` selected variables are allowed."""
        raise NotImplementedError(f"{type(self).__name__} does not define allows(count)")

    def leaf(self, var: int) -> tuple[State | None, State | None]:
        return 0, (None if self.largest == 0 else 1)

    def merge(self, left: State, right: State) -> State | None:
        total = int(left) + int(right)  # type: ignore[call-overload]
        return None if self.largest is not None and total > self.largest else total

    def accepts(self, state: State) -> bool:
        return self.allows(int(state))  # type: ignore[call-overload]

    def over(self, indices: Iterable[int]) -> Constraint:
        # A count does not depend on the order, so equal scopes make equal constraints.
        return Over(self, tuple(sorted(index_tuple("indices", indices))))


@dataclass(frozen=True, repr=False)
class _CountOfK(Count):
    """Allows counts by how they compare with ``k``."""

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", int_at_least("k", self.k, 0))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.k})"


class Exactly(_CountOfK):
    """Exactly ``k`` variables are selected."""

    @property
    def largest(self) -> int:
        return self.k

    def allows(self, count: int) -> bool:
        return count == self.k


class AtMost(_CountOfK):
    """At most ``k`` variables are selected."""

    @property
    def largest(self) -> int:
        return self.k

    def allows(self, count: int) -> bool:
        return count <= self.k


class AtLeast(_CountOfK):
    """At least ``k`` variables are selected."""

    @property
    def largest(self) -> None:
        return None

    def allows(self, count: int) -> bool:
        return count >= self.k


@dataclass(frozen=True, repr=False)
class Between(Count):
    """Between ``kmin`` and ``kmax`` variables are selected, both included.

    Raises:
        TypeError: a bound that is no integer.
        ValueError: a negative bound, or ``kmax`` below ``kmin``.
    """

    kmin: int
    kmax: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "kmin", int_at_least("kmin", self.kmin, 0))
        object.__setattr__(self, "kmax", int_at_least("kmax", self.kmax, 0))
        if self.kmax < self.kmin:
            raise ValueError(f"kmax={self.kmax}: must be at least kmin={self.kmin}")

    @property
    def largest(self) -> int:
        return self.kmax

    def allows(self, count: int) -> bool:
        return self.kmin <= count <= self.kmax

    def __repr__(self) -> str:
        return f"Between({self.kmin}, {self.kmax})"


@dataclass(frozen=True, repr=False, init=False)
class CountIn(Count):
    """The number of selected variables is one of ``counts``.

    Raises:
        TypeError: something else than integers.
        ValueError: no count, or a negative one.
    """

    counts: frozenset[int]

    def __init__(self, counts: Iterable[int]) -> None:
        items = as_items("counts", counts, "a set of integers such as {2, 4, 8}")
        values = frozenset(int_at_least("counts", c, 0) for c in items)
        if not values:
            raise ValueError("counts=set(): give at least one allowed count")
        object.__setattr__(self, "counts", values)

    @property
    def largest(self) -> int:
        return max(self.counts)

    def allows(self, count: int) -> bool:
        return count in self.counts

    def __repr__(self) -> str:
        return f"CountIn({{{', '.join(map(str, sorted(self.counts)))}}})"
