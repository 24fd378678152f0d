"""Propositional rules between variables: sympy Booleans as constraints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuitroute._validate import index_tuple, int_at_least
from circuitroute.constraints.base import Constraint
from circuitroute.constraints.formula import Formula, Writer
from circuitroute.constraints.notation import VARIABLE, read, written
from circuitroute.deadline import tick, within

# Steps by the name of the sympy class.
_OPERATORS = {
    "BooleanTrue": "true",
    "BooleanFalse": "false",
    "Not": "not",
    "And": "and",
    "Or": "or",
    "Xor": "xor",
    "Implies": "implies",
    "Equivalent": "equivalent",
    "ITE": "ite",
}

# The parts of an expression that is printed in a message.
MAX_PRINTED = 1_000


def variables(n: int) -> tuple[Any, ...]:
    """The sympy symbols x0, ..., x{n-1} of ``n`` variables, to write :class:`Logic` with.

    Combine them with ``& | ~ >> ^`` and sympy's functions, never with Python's ``and``, ``or``, ``not``, ``==``: to
    these a sympy expression is true as it stands, so that ``x[0] and x[1]`` is just ``x[1]``, ``not x[0]`` is False,
    and ``x[0] == x[1]``, which compares names, is False too (``sympy.Equivalent(x[0], x[1])`` is meant).

    Raises:
        ValueError: n is below 1.
        TypeError: n is not an integer.
    """
    from sympy import Symbol

    return tuple(Symbol(f"x{i}") for i in range(int_at_least("n", n, 1)))


@dataclass(frozen=True, repr=False, init=False)
class Logic(Constraint):
    """A propositional formula over the variables holds: ``x = cr.variables(8); cr.Logic(x[3] >> x[5])``.

    Args:
        expr: a sympy Boolean over :func:`variables` (And, Or, Not, Xor, Implies, Equivalent, ITE, ...), True or
            False, or a text of the form that ``repr`` shows, such as ``"x3 >> x5"``.

    Raises:
        ValueError: a symbol that is not one of x0, x1, ..., or a text that is not a formula.
        TypeError: not a Boolean of these operators: a number, an equation, an inequality.
    """

    formula: Formula

    def __init__(self, expr: Any) -> None:
        if isinstance(expr, (bool, np.bool_)):
            expr = str(bool(expr))
        with within(doing=lambda: "reading a formula", remedy="write it shorter"):
            object.__setattr__(self, "formula", read(expr) if isinstance(expr, str) else _from_sympy(expr))

    @classmethod
    def of(cls, formula: Formula) -> Logic:
        """The constraint that a formula holds."""
        made = cls.__new__(cls)
        object.__setattr__(made, "formula", formula)
        return made

    @property
    def expr(self) -> Any:
        """The formula as a sympy Boolean."""
        import sympy

        classes = {operator: getattr(sympy, name) for name, operator in _OPERATORS.items() if hasattr(sympy, name)}
        values: list[Any] = []
        for operator, operands in self.formula.steps:
            if operator == "var":
                values.append(sympy.Symbol(f"x{operands[0]}"))
            elif operator in ("true", "false"):
                values.append(getattr(sympy, operator))
            else:
                values.append(classes[operator](*(values[i] for i in operands)))
        return values[-1]

    def over(self, indices: Iterable[int]) -> Constraint:
        chosen = index_tuple("indices", indices)
        largest = max(self.formula.variables, default=0)
        if largest >= len(chosen):
            raise ValueError(
                f"indices={list(chosen)}: {self!r} uses x{largest}, so at least {largest + 1} indices are needed"
            )
        return super().over(chosen)

    def __repr__(self) -> str:
        return f"Logic({written(self.formula)!r})"


def _from_sympy(expr: Any) -> Formula:
    """The formula of a sympy Boolean, shared parts once."""
    writer = Writer()
    place: dict[Any, int] = {}
    waiting = [expr]
    while waiting:
        here = waiting[-1]
        operator = _operator(here, expr)
        tick(1 + len(here.args))
        missing = [] if operator == "var" else [part for part in here.args if part not in place]
        if missing:
            waiting.extend(reversed(missing))
            continue
        waiting.pop()
        if operator == "var":
            place[here] = writer.variable(_index(here))
        else:
            place[here] = writer.add(operator, [place[part] for part in here.args])
    return writer.formula(place[expr])


def _operator(part: Any, expr: Any) -> str:
    from sympy import Dummy, Symbol
    from sympy.logic import boolalg

    if isinstance(part, Symbol) and not isinstance(part, Dummy):
        return "var"
    name = type(part).__name__
    if name not in _OPERATORS or not isinstance(part, getattr(boolalg, name)):
        inside = "" if part is expr else f", in expr={_brief(expr)}"
        raise TypeError(
            f"expr={_brief(part)}{inside}: expected a sympy Boolean over cr.variables(n) made of And, Or, Not, Xor, "
            f"Implies, Equivalent and ITE, got {type(part).__name__}; for sums of variables use cr.Exactly, cr.AtMost "
            "or cr.Cost"
        )
    return _OPERATORS[name]


def _brief(expr: Any) -> str:
    """An expression as text; only its class if it is long, since shared parts are printed as often as they occur."""
    waiting, found = [expr], 0
    while waiting and found <= MAX_PRINTED:
        found += 1
        waiting += getattr(waiting.pop(), "args", ())
    return str(expr) if found <= MAX_PRINTED else f"{type(expr).__name__}(...)"


def _index(symbol: Any) -> int:
    found = VARIABLE.fullmatch(symbol.name)
    if found is None:
        raise ValueError(
            f"expr uses the symbol {symbol.name}: only x0, x1, ..., x{{n-1}} are variables; write it with "
            "x = cr.variables(n)"
        )
    return int(found[1])
