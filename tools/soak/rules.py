"""Random constraints, each with its meaning said a second time, without the library.

Legend: W subsets, N variables.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import circuitroute as cr
from circuitroute.constraints.counts import Count

Masks: TypeAlias = npt.NDArray[np.bool_]
Rng: TypeAlias = np.random.Generator
# A first state, (state, variable, selected) -> state, and which last states are allowed. States are a rule's own.
Walk: TypeAlias = tuple[Hashable, Callable[[Any, int, bool], Hashable], Callable[[Any], bool]]


@dataclass(frozen=True)
class Rule:
    """A constraint and what it means.

    Attributes:
        constraint: what is compiled.
        n: number of variables.
        allows: which of the subsets [W, N] are allowed, [W].
        kinds: the constraints it is made of, for the record of what was covered.
        walk: the same as a walk over the variables in increasing order, for rules over more variables than can be
            enumerated.
    """

    constraint: cr.Constraint
    n: int
    allows: Callable[[Masks], Masks]
    kinds: frozenset[str]
    walk: Walk | None = None


# ---------------------------------------------------------------------------------------------- machines of a user's


@dataclass(frozen=True)
class Remainder(cr.Constraint):
    """The number of selected variables leaves a remainder."""

    divisor: int
    rest: int

    def leaf(self, var: int) -> tuple[int, int]:
        return 0, 1 % self.divisor

    def merge(self, left: Any, right: Any) -> int:
        return int((left + right) % self.divisor)

    def accepts(self, state: Any) -> bool:
        return bool(state == self.rest)


@dataclass(frozen=True)
class NoNeighbours(cr.Constraint):
    """No two variables next to each other are selected; a state is (first selected, last selected)."""

    def leaf(self, var: int) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
        return (False, False), (True, True)

    def merge(self, left: Any, right: Any) -> tuple[bool, bool] | None:
        return None if left[1] and right[0] else (left[0], right[1])

    def accepts(self, state: Any) -> bool:
        return True


# ---------------------------------------------------------------------------------------------- meanings


def _active_of(z: Masks, groups: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """[W] how many groups a subset selects something of."""
    selected: Masks = np.stack([z[:, list(group)].any(axis=1) for group in groups], axis=1)
    counts: npt.NDArray[np.int64] = np.count_nonzero(selected, axis=1)
    return counts


def _all_of(parts: Sequence[Masks]) -> Masks:
    """[W] which subsets each of the parts [W] allows."""
    every: Masks = np.logical_and.reduce(list(parts), axis=0)
    return every


# ---------------------------------------------------------------------------------------------- drawing


def draw(rng: Rng, largest: int) -> Rule:
    """A rule over up to ``largest`` variables, composed of up to four parts."""
    n = int(rng.integers(1, largest + 1))
    if rng.random() < 0.25:  # engines have a fast way for these
        return _count(rng, n)
    return _some(rng, n, depth=int(rng.integers(0, 3)))


def draw_wide(rng: Rng) -> Rule:
    """A rule over more variables than can be enumerated."""
    return _WIDE[rng.integers(len(_WIDE))](rng)


def _some(rng: Rng, n: int, depth: int) -> Rule:
    if depth == 0 or n == 1:
        return _LEAVES[rng.integers(len(_LEAVES))](rng, n)
    return _COMPOSED[rng.integers(len(_COMPOSED))](rng, n, depth - 1)


def _count(rng: Rng, n: int) -> Rule:
    return _counted(rng, n)[1]


def _counted(rng: Rng, n: int) -> tuple[Count, Rule]:
    """A constraint on the count, and its rule."""
    kind = rng.integers(5)
    low, high = sorted(int(x) for x in rng.integers(0, n + 1, size=2))
    some = frozenset(int(x) for x in rng.integers(0, n + 1, size=rng.integers(1, 4)))
    constraint: Count = (
        cr.Exactly(low), cr.AtMost(high), cr.AtLeast(low), cr.Between(low, high), cr.CountIn(some)
    )[kind]  # fmt: skip
    counts = ({low}, range(high + 1), range(low, n + 1), range(low, high + 1), some)[kind]
    allowed = np.array([count in counts for count in range(n + 1)])
    walk: Walk = (0, lambda state, var, on: state + on, lambda state: bool(allowed[state]))
    return constraint, Rule(constraint, n, lambda z: allowed[z.sum(1)], frozenset({type(constraint).__name__}), walk)


def _cost(rng: Rng, n: int) -> Rule:
    costs = [int(x) for x in rng.integers(0, 5, size=n)]
    least, most = sorted(int(x) for x in rng.integers(0, sum(costs) + 2, size=2))
    kind = rng.integers(3)
    low, high = (0 if kind == 0 else least), (10**9 if kind == 1 else most)
    limits = ({"at_most": most}, {"at_least": least}, {"at_most": most, "at_least": least})[kind]
    walk: Walk = (0, lambda state, var, on: state + costs[var] * on, lambda state: low <= state <= high)
    return Rule(
        cr.Cost(costs, **limits), n, lambda z: (low <= z @ costs) & (z @ costs <= high), frozenset({"Cost"}), walk
    )


def _partition(rng: Rng, n: int, equal: bool) -> tuple[cr.Groups, list[list[int]]]:
    divisors = [g for g in range(1, n + 1) if n % g == 0]
    if equal:
        count = int(rng.choice(divisors))
        return cr.Groups(count), np.arange(n).reshape(count, -1).tolist()
    groups = [part.tolist() for part in np.split(rng.permutation(n), sorted(rng.integers(1, n + 1, size=2)))]
    groups = [sorted(part) for part in groups if part]
    return cr.Groups(groups), groups


def _active(rng: Rng, n: int, equal: bool | None = None) -> Rule:
    declared, groups = _partition(rng, n, bool(rng.integers(2)) if equal is None else equal)
    least, most = sorted(int(x) for x in rng.integers(0, len(groups) + 1, size=2))
    owner = {v: g for g, group in enumerate(groups) for v in group}
    walk: Walk = (
        frozenset(),
        lambda state, var, on: state | {owner[var]} if on else state,
        lambda state: least <= len(state) <= most,
    )

    def allows(z: Masks) -> Masks:
        active = _active_of(z, groups)
        return (active >= least) & (active <= most)

    return Rule(
        cr.ActiveGroups(declared, at_most=most, at_least=least), n, allows, frozenset({"ActiveGroups", "Groups"}), walk
    )


def _logic(rng: Rng, n: int) -> Rule:
    import sympy

    x = cr.variables(n)

    def formula(depth: int) -> tuple[Any, Callable[[Masks], Masks]]:
        if depth == 0:
            i = int(rng.integers(n))
            return x[i], lambda z: z[:, i]
        (a, of_a), (b, of_b) = formula(depth - 1), formula(depth - 1)
        return (
            (sympy.And(a, b), lambda z: of_a(z) & of_b(z)),
            (sympy.Or(a, b), lambda z: of_a(z) | of_b(z)),
            (sympy.Not(a), lambda z: ~of_a(z)),
            (sympy.Xor(a, b), lambda z: of_a(z) ^ of_b(z)),
            (sympy.Implies(a, b), lambda z: ~of_a(z) | of_b(z)),
            (sympy.Equivalent(a, b), lambda z: of_a(z) == of_b(z)),
        )[rng.integers(6)]

    expression, allows = formula(int(rng.integers(1, 4)))
    return Rule(cr.Logic(expression), n, allows, frozenset({"Logic"}))


def _machine(rng: Rng, n: int) -> Rule:
    if rng.integers(2):
        divisor = int(rng.integers(1, 4))
        rest = int(rng.integers(divisor))
        return Rule(Remainder(divisor, rest), n, lambda z: z.sum(1) % divisor == rest, frozenset({"user machine"}))
    return Rule(
        NoNeighbours(), n, lambda z: np.count_nonzero(z[:, 1:] & z[:, :-1], axis=1) == 0, frozenset({"user machine"})
    )


def _layers(rng: Rng, n: int) -> Rule:
    experts = int(rng.choice([d for d in range(1, n + 1) if n % d == 0]))
    layers, (total, in_all), (each, in_each) = n // experts, _counted(rng, n), _counted(rng, experts)
    constraint = cr.LayerBudget(layers, experts, each, total)

    def allows(z: Masks) -> Masks:
        return in_all.allows(z) & _all_of([in_each.allows(part) for part in np.split(z, layers, axis=1)])

    return Rule(constraint, n, allows, frozenset({"LayerBudget"}))


def _and(rng: Rng, n: int, depth: int) -> Rule:
    a, b = _some(rng, n, depth), _some(rng, n, depth)
    return Rule(a.constraint & b.constraint, n, lambda z: a.allows(z) & b.allows(z), a.kinds | b.kinds | {"&"})


def _or(rng: Rng, n: int, depth: int) -> Rule:
    a, b = _some(rng, n, depth), _some(rng, n, depth)
    return Rule(a.constraint | b.constraint, n, lambda z: a.allows(z) | b.allows(z), a.kinds | b.kinds | {"|"})


def _not(rng: Rng, n: int, depth: int) -> Rule:
    a = _some(rng, n, depth)
    return Rule(~a.constraint, n, lambda z: ~a.allows(z), a.kinds | {"~"})


def _over(rng: Rng, n: int, depth: int) -> Rule:
    scope = sorted(int(i) for i in rng.choice(n, size=rng.integers(1, n + 1), replace=False))
    a = _some(rng, len(scope), depth)
    return Rule(a.constraint.over(scope), n, lambda z: a.allows(z[:, scope]), a.kinds | {"over"})


def _each(rng: Rng, n: int, depth: int) -> Rule:
    count = int(rng.choice([g for g in range(1, n + 1) if n % g == 0]))
    groups = np.arange(n).reshape(count, -1)
    a = _some(rng, n // count, depth)
    return Rule(
        cr.EachGroup(cr.Groups(count), a.constraint),
        n,
        lambda z: _all_of([a.allows(z[:, group]) for group in groups]),
        a.kinds | {"EachGroup", "Groups"},
    )


def _both(a: Rule, b: Rule) -> Rule:
    """Two rules with walks, at once."""
    assert a.walk is not None
    assert b.walk is not None
    (first_a, step_a, last_a), (first_b, step_b, last_b) = a.walk, b.walk
    walk: Walk = (
        (first_a, first_b),
        lambda state, var, on: (step_a(state[0], var, on), step_b(state[1], var, on)),
        lambda state: last_a(state[0]) and last_b(state[1]),
    )
    both = a.constraint & b.constraint
    return Rule(both, a.n, lambda z: a.allows(z) & b.allows(z), a.kinds | b.kinds | {"&"}, walk)


def _wide_count(rng: Rng) -> Rule:
    n = int(rng.integers(13, 130))
    k = int(rng.integers(0, 9))
    counts = (k,) if rng.integers(2) else tuple(range(k, min(n, k + 5) + 1))
    constraint = cr.Exactly(k) if len(counts) == 1 else cr.Between(counts[0], counts[-1])
    walk: Walk = (0, lambda state, var, on: min(state + on, counts[-1] + 1), lambda state: state in counts)
    return Rule(constraint, n, lambda z: np.isin(z.sum(1), counts), frozenset({type(constraint).__name__}), walk)


def _wide_groups(rng: Rng) -> Rule:
    groups = int(rng.integers(2, 5))
    n = groups * int(rng.integers(5, 9))
    k = int(rng.integers(1, 5))
    walk: Walk = (0, lambda state, var, on: min(state + on, k + 1), lambda state: state == k)
    exact = Rule(cr.Exactly(k), n, lambda z: z.sum(1) == k, frozenset({"Exactly"}), walk)
    declared = np.arange(n).reshape(groups, -1).tolist()
    owner = [g for g, group in enumerate(declared) for _ in group]
    most = int(rng.integers(1, groups + 1))
    active = Rule(
        cr.ActiveGroups(cr.Groups(groups), at_most=most),
        n,
        lambda z: _active_of(z, declared) <= most,
        frozenset({"ActiveGroups", "Groups"}),
        (frozenset(), lambda s, var, on: s | {owner[var]} if on else s, lambda s: len(s) <= most),
    )
    return _both(active, exact)


def _wide_cost(rng: Rng) -> Rule:
    n = int(rng.integers(13, 30))
    costs = [int(x) for x in rng.integers(0, 5, size=n)]
    most = int(rng.integers(2, 15))
    walk: Walk = (0, lambda state, var, on: min(state + costs[var] * on, most + 1), lambda state: state <= most)
    return Rule(cr.Cost(costs, at_most=most), n, lambda z: z @ costs <= most, frozenset({"Cost"}), walk)


_LEAVES = (_count, _count, _cost, _active, _logic, _machine, _layers)
_COMPOSED = (_and, _or, _not, _over, _each)
_WIDE = (_wide_count, _wide_count, _wide_groups, _wide_cost)
