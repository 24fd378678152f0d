"""Constraint -> formulas whose conjunction it is, for compilers of formulas: counts and groups are written as such."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from circuitroute import Constraint, InfeasibleError, UnsupportedConstraintError
from circuitroute.compilation import SHOWN
from circuitroute.constraints import ActiveGroups, And, AtLeast, Count, CountIn, Not, Or, Over, shown
from circuitroute.constraints.formula import Formula, Writer, combined
from circuitroute.deadline import tick
from circuitroute_compilers.lowering import count_of, flattened
from circuitroute_compilers.rules import check_indices, count_formula, formula_of


def conjuncts(constraint: Constraint, n: int) -> list[Formula]:
    """Formulas over ``n`` variables that together are the constraint, each once.

    Raises:
        InfeasibleError: one of them is false, as it is written.
        UnsupportedConstraintError: a part that is no formula, by name.
        ValueError: a part does not fit the number of variables.
    """
    found: dict[Formula, None] = {}
    for part in flattened(constraint, n):
        for formula in _whole(part, n).conjuncts():
            if formula.variables:
                found[formula] = None
            elif not formula.holds(lambda _: False):
                raise InfeasibleError(f"no subset of {n} variables satisfies {shown(constraint, SHOWN)}")
    return list(found)


def _whole(constraint: Constraint, n: int) -> Formula:
    """The formula of a constraint."""
    tick()
    formula = formula_of(constraint, n)
    if formula is not None:
        return formula
    count, indices = count_of(constraint, n)
    if count is not None:
        return _counted(count, constraint, indices, n)
    match constraint:
        case Over(constraint=inner, indices=indices):
            check_indices(constraint, n)
            return _whole(inner, len(indices)).renamed(indices)
        case Not(part=part):
            return combined("not", [_whole(part, n)])
        case And(parts=parts):
            return combined("and", [_whole(part, n) for part in parts])
        case Or(parts=parts):
            return combined("or", [_whole(part, n) for part in parts])
        case ActiveGroups():
            return _active(constraint, n)
    taken_apart = flattened(constraint, n)
    if taken_apart == [constraint]:
        raise UnsupportedConstraintError(
            f"compiler='sdd' does not compile {type(constraint).__qualname__}, which is no formula: it takes clauses, "
            "rules, counts, and what is composed of them; leave out compiler for the built-in one, which takes machines"
        )
    return combined("and", [_whole(part, n) for part in taken_apart])


def _counted(count: Count, constraint: Constraint, indices: Iterable[int], n: int) -> Formula:
    if isinstance(constraint, Over):
        check_indices(constraint, n)
    return count_formula(count, tuple(indices))


def _active(constraint: ActiveGroups, n: int) -> Formula:
    """How many groups are active, as a count over formulas that say so."""
    groups = constraint.groups.of(n)
    most = len(groups) if constraint.at_most is None else constraint.at_most
    counted = count_formula(CountIn(range(constraint.at_least, min(most, len(groups)) + 1)), range(len(groups)))
    return substituted(counted, [_whole(AtLeast(1).over(group), n) for group in groups])


def substituted(outer: Formula, inner: Sequence[Formula]) -> Formula:
    """``outer`` with ``inner[i]`` in the place of its variable i."""
    writer = Writer()
    tops = [writer.copy(formula) for formula in inner]
    place: list[int] = []
    for operator, operands in outer.steps:
        tick()
        place.append(tops[operands[0]] if operator == "var" else writer.add(operator, [place[i] for i in operands]))
    return writer.formula(place[-1])
