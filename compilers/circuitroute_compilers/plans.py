"""Plan: what a constraint becomes before the order of the variables is known. Plan and order -> term: :func:`along`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from circuitroute import Constraint
from circuitroute.constraints.formula import Formula
from circuitroute_compilers.diagram import diagrams
from circuitroute_compilers.terms import Complement, HowMany, Machine, Scope, Term, scope_of


@dataclass(frozen=True)
class Proposition:
    """All of ``formulas``, which are connected by shared variables and came from ``constraint``, hold."""

    constraint: Constraint
    formulas: tuple[Formula, ...]

    @cached_property
    def scope(self) -> Scope:
        return scope_of({v for formula in self.formulas for v in formula.variables})


@dataclass(frozen=True)
class Negation:
    """The plan does not hold."""

    plan: Plan

    @property
    def scope(self) -> Scope:
        return self.plan.scope


@dataclass(frozen=True)
class Number:
    """``allows`` the number of ``plans`` that hold; ``names`` are the constraints they came from."""

    plans: tuple[Plan, ...]
    allows: Callable[[int], bool]
    names: tuple[Constraint, ...]

    @cached_property
    def scope(self) -> Scope:
        scope = 0
        for plan in self.plans:
            scope |= plan.scope
        return scope


Plan: TypeAlias = Machine | Proposition | Negation | Number


def number(plans: Sequence[Plan], names: Sequence[Constraint], allows: Callable[[int], bool]) -> Plan:
    """``allows`` the number of ``plans`` that hold; of a single plan, which must hold, the plan itself."""
    return plans[0] if len(plans) == 1 else Number(tuple(plans), allows, tuple(names))


def simple_parts(plan: Plan) -> Iterator[Machine | Proposition]:
    """The machines and propositions a plan is made of."""
    match plan:
        case Machine() | Proposition():
            yield plan
        case Negation(plan=inner):
            yield from simple_parts(inner)
        case Number(plans=inner):
            for each in inner:
                yield from simple_parts(each)


def along(plan: Plan, order: Sequence[int], limit: int) -> Term:
    """The term of a plan for trees that meet the variables in ``order``.

    Raises:
        CircuitTooLargeError: a formula needs more than ``limit`` nodes of decision diagrams.
    """
    match plan:
        case Machine():
            return plan
        case Proposition(constraint=constraint, formulas=formulas):
            found = diagrams(constraint, formulas, order, limit)
            return found[0] if len(found) == 1 else HowMany(tuple(found), len(found).__eq__)
        case Negation(plan=inner):
            return Complement(along(inner, order, limit))
        case Number(plans=inner, allows=allows):
            return HowMany(tuple(along(each, order, limit) for each in inner), allows)
