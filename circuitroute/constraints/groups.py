"""Partitions of the variables, and constraints on their groups: node limits, per-group and per-layer budgets.

Legend: G groups, N variables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from circuitroute._validate import index_tuple, int_at_least
from circuitroute.constraints.base import Constraint, shown
from circuitroute.constraints.counts import Count


@dataclass(frozen=True, repr=False, init=False)
class Groups:
    """A partition of the variables: ``Groups(8)`` equal contiguous groups, or ``Groups([[0, 1], [2, 3, 4]])``.

    Raises:
        ValueError: no groups, an empty one, groups that overlap, or a variable in none of them.
    """

    groups: int | tuple[tuple[int, ...], ...]

    def __init__(self, groups: int | Iterable[Iterable[int]]) -> None:
        if isinstance(groups, Iterable) and getattr(groups, "ndim", 1) > 0:  # not a tensor that is one number
            given = tuple(tuple(sorted(index_tuple(f"groups[{i}]", g))) for i, g in enumerate(groups))
            _check_partition(given)
            object.__setattr__(self, "groups", given)
        else:
            object.__setattr__(self, "groups", int_at_least("groups", groups, 1))

    @property
    def count(self) -> int:
        """G, the number of groups."""
        return self.groups if isinstance(self.groups, int) else len(self.groups)

    def of(self, n: int) -> tuple[tuple[int, ...], ...]:
        """The groups of ``n`` variables.

        Raises:
            ValueError: n is not a multiple of the number of equal groups, or not what the given groups cover.
        """
        if isinstance(self.groups, int):
            if n % self.groups:
                raise ValueError(f"{self!r}: n={n} variables do not divide into {self.groups} equal groups")
            size = n // self.groups
            return tuple(tuple(range(i, i + size)) for i in range(0, n, size))
        if self.covered != n:
            raise ValueError(
                f"{self!r} covers {self.covered} variables, but there are n={n}: groups must cover all of them"
            )
        return self.groups

    @property
    def covered(self) -> int | None:
        """How many variables given groups cover; None of equal groups, which divide any number."""
        return None if isinstance(self.groups, int) else sum(map(len, self.groups))

    def __repr__(self) -> str:
        shown = self.groups if isinstance(self.groups, int) else [list(g) for g in self.groups]
        return f"Groups({shown!r})"


def _check_partition(groups: tuple[tuple[int, ...], ...]) -> None:
    if not groups:
        raise ValueError("groups=[]: give at least one group")
    owner: dict[int, int] = {}
    for i, group in enumerate(groups):
        for v in group:
            if v in owner:
                raise ValueError(f"groups[{owner[v]}] and groups[{i}] overlap in variable {v}")
            owner[v] = i
    missing = sorted(set(range(max(owner) + 1)) - set(owner))
    if missing:
        raise ValueError(f"groups leave out the variables {missing}: every variable must be in one group")


def _as_groups(groups: object) -> Groups:
    if not isinstance(groups, Groups):
        raise TypeError(f"groups={groups!r}: expected cr.Groups, such as cr.Groups(8) or cr.Groups([[0, 1], [2, 3]])")
    return groups


@dataclass(frozen=True, repr=False)
class EachGroup(Constraint):
    """Every group satisfies ``constraint``, which sees the group's variables as 0, 1, ...

    Raises:
        TypeError: ``groups`` that are no :class:`Groups`, or a ``constraint`` that is none.
    """

    groups: Groups
    constraint: Constraint

    def __post_init__(self) -> None:
        _as_groups(self.groups)
        if not isinstance(self.constraint, Constraint):
            raise TypeError(f"constraint={self.constraint!r}: expected a circuitroute Constraint")

    def _pieces(self) -> Iterable[Constraint | str]:
        return f"EachGroup({self.groups!r}, ", self.constraint, ")"

    def _known_variables(self) -> int | None:
        return self.groups.covered

    def __repr__(self) -> str:
        return shown(self)


@dataclass(frozen=True, repr=False)
class ActiveGroups(Constraint):
    """Between ``at_least`` and ``at_most`` groups have any selected variable.

    DeepSeek-V3's node limit, at most 4 of 8 groups and 8 experts in all, is
    ``ActiveGroups(Groups(8), at_most=4) & Exactly(8)``.

    Raises:
        TypeError: ``groups`` that are no :class:`Groups`, or a bound that is no integer.
        ValueError: a negative bound, ``at_most`` below ``at_least``, or ``at_least`` above the number of groups.
    """

    groups: Groups
    at_most: int | None = None
    at_least: int = 0

    def __post_init__(self) -> None:
        _as_groups(self.groups)
        object.__setattr__(self, "at_least", int_at_least("at_least", self.at_least, 0))
        if self.at_most is not None:
            object.__setattr__(self, "at_most", int_at_least("at_most", self.at_most, 0))
            if self.at_most < self.at_least:
                raise ValueError(f"at_most={self.at_most}: must be at least at_least={self.at_least}")
        if self.at_least > self.groups.count:
            raise ValueError(f"at_least={self.at_least}: there are only {self.groups.count} groups")

    def _known_variables(self) -> int | None:
        return self.groups.covered

    def __repr__(self) -> str:
        return f"ActiveGroups({self.groups!r}, at_most={self.at_most!r}, at_least={self.at_least!r})"


@dataclass(frozen=True, repr=False)
class LayerBudget(Constraint):
    """A joint budget over the experts of all layers: variable ``layer * experts + expert``.

    Every layer's count satisfies ``per_layer``, the count over all layers ``total``.

    Raises:
        TypeError: sizes that are no integers, or ``per_layer`` or ``total`` that are no counts.
        ValueError: no layers, or no experts.
    """

    layers: int
    experts: int
    per_layer: Count
    total: Count

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", int_at_least("layers", self.layers, 1))
        object.__setattr__(self, "experts", int_at_least("experts", self.experts, 1))
        for name in ("per_layer", "total"):
            if not isinstance(getattr(self, name), Count):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected a count such as cr.AtMost(128)")

    def _known_variables(self) -> int | None:
        return self.layers * self.experts

    def __repr__(self) -> str:
        return (
            f"LayerBudget(layers={self.layers!r}, experts={self.experts!r}, per_layer={self.per_layer!r}, "
            f"total={self.total!r})"
        )
