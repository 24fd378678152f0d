"""Constraint -> Plan: sizes checked, groups resolved, counts of one scope joined, rules gathered into formulas.

Legend: a *scope* is a tuple of the n variables that a constraint is about, in the constraint's order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

from circuitroute import InfeasibleError
from circuitroute.compilation import unsupported
from circuitroute.constraints import (
    CNF,
    ActiveGroups,
    And,
    AtLeast,
    Constraint,
    Cost,
    Count,
    CountIn,
    EachGroup,
    LayerBudget,
    Logic,
    Not,
    Or,
    Over,
    State,
)
from circuitroute.deadline import tick
from circuitroute_compilers.plans import Negation, Number, Plan, number
from circuitroute_compilers.rules import check_indices, formula_of, propositions, torn_counts
from circuitroute_compilers.terms import Machine

Indices = tuple[int, ...]


@singledispatch
def lower(constraint: Constraint, scope: Indices) -> Plan:
    """The plan of a constraint over the variables ``scope``; constraints with a machine of their own need no rule here.

    Raises:
        ValueError: the constraint does not fit the number of variables.
        InfeasibleError: a part that nothing satisfies, named.
        UnsupportedConstraintError: neither a rule nor a machine.
    """
    tick()
    kind = type(constraint)
    if any(getattr(kind, name) is getattr(Constraint, name) for name in ("leaf", "merge", "accepts")):
        raise unsupported(constraint)
    return Machine(constraint, scope)


@lower.register
def _(constraint: Over, scope: Indices) -> Plan:
    check_indices(constraint, len(scope))
    return lower(constraint.constraint, tuple(scope[i] for i in constraint.indices))


@lower.register
def _(constraint: Count, scope: Indices) -> Plan:
    counts = allowed_counts(constraint, len(scope))
    if not counts:
        raise InfeasibleError(f"{constraint!r}: no count of 0 to {len(scope)} selected variables is allowed")
    return Machine(Capped(constraint, counts, len(scope)), scope)


def allowed_counts(constraint: Count, n: int) -> list[int]:
    """The counts of n variables that are allowed."""
    tick(n)
    return [j for j in range(n + 1) if constraint.allows(j)]


class Capped(Constraint):
    """A count that distinguishes only what matters: dead beyond the largest allowed count, and it stops counting where
    all larger counts are allowed (``goes_on``). Its states are the numbers 0 to ``cap``."""

    def __init__(self, constraint: Count, counts: list[int], n: int) -> None:
        self._constraint = constraint
        self._largest = counts[-1]
        self._enough = n
        while self._largest == n and self._enough > 0 and constraint.allows(self._enough - 1):
            self._enough -= 1
        self.goes_on = self._enough < n
        self.cap = min(self._largest, self._enough)

    def state(self, count: int) -> State | None:
        """The state of a block with ``count`` selected variables."""
        return None if count > self._largest else min(count, self._enough)

    def leaf(self, var: int) -> tuple[State | None, State | None]:
        return 0, self.state(1)

    def merge(self, left: State, right: State) -> State | None:
        return self.state(int(left) + int(right))  # type: ignore[call-overload]

    def accepts(self, state: State) -> bool:
        return self._constraint.allows(int(state))  # type: ignore[call-overload]

    def __repr__(self) -> str:
        return repr(self._constraint)


@lower.register
def _(constraint: Cost, scope: Indices) -> Plan:
    if len(constraint.costs) != len(scope):
        raise ValueError(
            f"costs has {len(constraint.costs)} entries, but there are {len(scope)} variables: give one cost each"
        )
    if sum(constraint.costs) < constraint.at_least:
        raise InfeasibleError(f"{constraint!r}: all costs together are {sum(constraint.costs)}")
    return Machine(constraint, scope)


@lower.register
def _(constraint: And, scope: Indices) -> Plan:
    n = len(scope)
    parts = joined(flattened(constraint, n), n)
    rules = {part: formula for part in parts if (formula := formula_of(part, n)) is not None}
    rules |= torn_counts(parts, n)
    plans = [(lower(part, scope), part) for part in parts if part not in rules]
    plans += propositions(rules, scope)
    if not plans:  # rules that are always true
        return lower(AtLeast(0), scope)
    each, names = zip(*plans, strict=True)
    return number(each, names, allows=len(plans).__eq__)


@lower.register
def _(constraint: Logic, scope: Indices) -> Plan:
    return lower(And([constraint]), scope)


@lower.register
def _(constraint: CNF, scope: Indices) -> Plan:
    return lower(And([constraint]), scope)


def flattened(constraint: Constraint, n: int) -> list[Constraint]:
    """The parts of a conjunction over n variables; nested conjunctions are taken apart."""
    tick()
    if isinstance(constraint, And):
        return [p for part in constraint.parts for p in flattened(part, n)]
    if isinstance(constraint, LayerBudget):
        return [*_layers(constraint, n), constraint.total]
    if isinstance(constraint, EachGroup):
        return [p for g in constraint.groups.of(n) for p in flattened(constraint.constraint.over(g), n)]
    formula = formula_of(constraint, n)
    return [constraint] if formula is None else [Logic.of(part) for part in formula.conjuncts()]


def joined(parts: list[Constraint], n: int) -> list[Constraint]:
    """The parts, with counts over the same scope joined into one; raises if nothing is in all of them."""
    counts: dict[Indices, list[Constraint]] = {}
    rest: list[Constraint] = []
    for part in parts:
        tick()
        count, over = count_of(part, n)
        if count is None:
            rest.append(part)
        else:
            counts.setdefault(over, []).append(part)
    return [_intersection(same, over, n) for over, same in counts.items()] + rest


def count_of(part: Constraint, n: int) -> tuple[Count | None, Indices]:
    if isinstance(part, Count):
        return part, tuple(range(n))
    if isinstance(part, Over) and isinstance(part.constraint, Count):
        return part.constraint, part.indices
    return None, ()


def _intersection(parts: list[Constraint], over: Indices, n: int) -> Constraint:
    if len(parts) == 1:
        return parts[0]
    counts = [count for part in parts if (count := count_of(part, n)[0]) is not None]
    common = set.intersection(*(set(allowed_counts(count, len(over))) for count in counts))
    if not common:
        named = " and ".join(map(repr, parts))
        raise InfeasibleError(f"{named} contradict each other: no count of {len(over)} variables satisfies all")
    return CountIn(common).over(over)


@lower.register
def _(constraint: Or, scope: Indices) -> Plan:
    if formula_of(constraint, len(scope)) is not None:
        return lower(And([constraint]), scope)
    plans: list[Plan] = []
    names: list[Constraint] = []
    reasons: list[str] = []
    for part in constraint.parts:
        try:
            plans.append(lower(part, scope))
            names.append(part)
        except InfeasibleError as error:  # the other alternatives may be possible
            reasons.append(str(error))
    if not plans:
        raise InfeasibleError(f"{constraint!r}: no alternative is possible: {'; '.join(reasons)}")
    return number(plans, names, allows=(0).__lt__)


@lower.register
def _(constraint: Not, scope: Indices) -> Plan:
    if formula_of(constraint, len(scope)) is not None:
        return lower(And([constraint]), scope)
    try:
        return Negation(lower(constraint.part, scope))
    except InfeasibleError:  # the negation of the impossible always holds
        return lower(AtLeast(0), scope)


@lower.register
def _(constraint: EachGroup, scope: Indices) -> Plan:
    return lower(And(flattened(constraint, len(scope))), scope)


@lower.register
def _(constraint: LayerBudget, scope: Indices) -> Plan:
    return lower(And(flattened(constraint, len(scope))), scope)


def _layers(constraint: LayerBudget, n: int) -> list[Constraint]:
    wanted = constraint.layers * constraint.experts
    if wanted != n:
        raise ValueError(
            f"{constraint!r} is over layers * experts = {wanted} variables, but n={n}: compile it with n={wanted}"
        )
    starts = range(0, wanted, constraint.experts)
    return [constraint.per_layer.over(range(start, start + constraint.experts)) for start in starts]


@lower.register
def _(constraint: ActiveGroups, scope: Indices) -> Plan:
    groups = constraint.groups.of(len(scope))
    active = tuple(lower(AtLeast(1), tuple(scope[i] for i in group)) for group in groups)
    low, high = constraint.at_least, len(groups) if constraint.at_most is None else constraint.at_most
    allows: Callable[[int], bool] = range(low, high + 1).__contains__
    return Number(active, allows, tuple(AtLeast(1).over(group) for group in groups))


def only_counts(constraint: Constraint, n: int) -> list[int] | None:
    """The allowed counts, increasing, if the constraint amounts to one count over all variables; else None."""
    found = _count_set(constraint, n)
    return None if found is None else sorted(found)


def _count_set(constraint: Constraint, n: int) -> set[int] | None:
    tick()
    if isinstance(constraint, Not):
        inner = _count_set(constraint.part, n)
        return None if inner is None else set(range(n + 1)) - inner
    if isinstance(constraint, (And, Or)):
        parts = [_count_set(part, n) for part in constraint.parts]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return set.intersection(*known) if isinstance(constraint, And) else set.union(*known)
    count, over = count_of(constraint, n)
    return None if count is None or len(over) != n else set(allowed_counts(count, n))
