"""Lowering, the part about formulas: recognise them, rename their variables, gather those that share variables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

from circuitroute import Constraint, InfeasibleError
from circuitroute.constraints import CNF, And, Count, Logic, Not, Or, Over
from circuitroute.constraints.formula import Formula, Writer, combined
from circuitroute.deadline import tick
from circuitroute_compilers.plans import Plan, Proposition

# Variables, the formulas connected by them, and the rules these came from.
_Gathered: TypeAlias = tuple[set[int], list[Formula], list[Constraint]]

# Counts over up to this many variables may become formulas.
FEW = 16


def check_indices(constraint: Over, n: int) -> None:
    """Raise ValueError if a scope reaches beyond ``n`` variables."""
    largest = max(constraint.indices)
    if largest >= n:
        raise ValueError(f"{constraint!r} uses variable {largest}, but n={n}: indices must be below n")


def formula_of(constraint: Constraint, n: int) -> Formula | None:
    """The constraint as a formula over ``n`` variables, or None if some part of it is not one.

    Raises:
        ValueError: it uses a variable that does not exist.
    """
    tick()
    match constraint:
        case Logic(formula=formula):
            largest = max(formula.variables, default=0)
            if largest >= n:
                raise ValueError(
                    f"{constraint!r} uses x{largest}, but n={n}: only x0 to x{n - 1} exist; compile it with "
                    f"n={largest + 1} or more"
                )
            return formula
        case CNF():
            if constraint.n > n:
                raise ValueError(f"n={n}: the CNF has {constraint.n} variables; leave out n or give a larger one")
            return constraint.formula
        case Over(constraint=inner, indices=indices):
            check_indices(constraint, n)
            found = formula_of(inner, len(indices))
            return None if found is None else found.renamed(indices)
        case Not(part=part):
            return _combined("not", (part,), n)
        case And(parts=parts):
            return _combined("and", parts, n)
        case Or(parts=parts):
            return _combined("or", parts, n)
    return None


def _combined(operator: str, parts: tuple[Constraint, ...], n: int) -> Formula | None:
    found = [formula for part in parts if (formula := formula_of(part, n)) is not None]
    return combined(operator, found) if len(found) == len(parts) else None


def torn_counts(parts: Sequence[Constraint], n: int) -> dict[Constraint, Formula]:
    """Counts over few variables, as formulas, whose scope overlaps that of another such count or formula in part.

    As machines their states would multiply; as one formula only the states that matter are kept.
    """
    scopes: dict[Constraint, int] = {}
    for part in parts:
        formula = formula_of(part, n)
        tick(len(parts) >> 2)
        if formula is not None:
            scopes[part] = sum(1 << v for v in formula.variables)
        elif isinstance(part, Over) and isinstance(part.constraint, Count) and len(part.indices) <= FEW:
            check_indices(part, n)
            scopes[part] = sum(1 << v for v in part.indices)
    return {
        part: count_formula(part.constraint, part.indices)
        for part, scope in scopes.items()
        if isinstance(part, Over) and isinstance(part.constraint, Count) and _is_torn(scope, scopes.values())
    }


def _is_torn(scope: int, others: Collection[int]) -> bool:
    """Whether a scope overlaps one of the others in part."""
    tick(1 + len(others) * (1 + (scope.bit_length() >> 12)) // 8)
    return any(scope & other and scope & ~other and other & ~scope for other in others)


def count_formula(count: Count, indices: Sequence[int]) -> Formula:
    """A count as a formula that decides one variable after the other and keeps a tally."""
    writer = Writer()
    tallies = [writer.add("true" if count.allows(j) else "false", []) for j in range(len(indices) + 1)]
    for v in indices:
        test = writer.variable(v)
        tallies = [writer.add("ite", [test, more, same]) for same, more in pairwise(tallies)]
    return writer.formula(tallies[0])


def propositions(rules: Mapping[Constraint, Formula], scope: tuple[int, ...]) -> list[tuple[Plan, Constraint]]:
    """A plan, and the constraint it stands for, per set of rules that are connected by shared variables.

    Raises:
        InfeasibleError: a rule is false whatever is selected.
    """
    gathered: list[_Gathered] = []
    for rule, whole in rules.items():
        for formula in whole.renamed(scope).conjuncts():
            if formula.variables:
                _gather(gathered, formula, rule)
            elif not formula.holds(lambda _: False):
                raise InfeasibleError(f"{rule!r} is false for every subset of {len(scope)} variables")
    return [(Proposition(And.of(*names), tuple(formulas)), And.of(*names)) for _, formulas, names in gathered]


def _gather(gathered: list[_Gathered], formula: Formula, rule: Constraint) -> None:
    """Add a formula to the set it shares variables with, joining all such sets."""
    tick(1 + (len(gathered) >> 2))
    variables, formulas, names = set(formula.variables), [formula], [rule]
    for known in [known for known in gathered if known[0] & variables]:
        gathered.remove(known)
        variables, formulas, names = known[0] | variables, known[1] + formulas, known[2] + names
    gathered.append((variables, formulas, names))
