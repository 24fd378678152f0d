"""Constraints from their repr, parsed and never evaluated.

The text is parsed to a syntax tree, and only these forms mean anything: the built-in constraint classes called with
literals, ``.over([...])``, and ``&``, ``|``, ``~`` between them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from circuitroute import constraints
from circuitroute.constraints import Constraint
from circuitroute.interop.imported import Imported, Opaque

_CLASSES: dict[str, Callable[..., Any]] = {
    name: getattr(constraints, name)
    for name in (
        "ActiveGroups",
        "AtLeast",
        "AtMost",
        "Between",
        "CNF",
        "Cost",
        "CountIn",
        "EachGroup",
        "Exactly",
        "Groups",
        "LayerBudget",
        "Logic",
    )
} | {"Imported": Imported, "Opaque": Opaque}
MAX_LENGTH = 1 << 22


def parse_constraint(text: str) -> Constraint | None:
    """The constraint whose repr is ``text``; None if it is not made of built-in constraints and literals."""
    if len(text) > MAX_LENGTH:
        return None
    try:
        found = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return found if isinstance(found, Constraint) and repr(found) == text else None


def rebuilt(constraint: Constraint) -> Constraint | None:
    """The constraint that its repr gives again; None where that is not the same one, and only looks like it.

    A subclass may have inherited the repr of a built-in constraint, and a foreign class may have the same name as one.
    """
    again = parse_constraint(repr(constraint))
    return again if type(again) is type(constraint) and again == constraint else None


def _value(node: ast.expr) -> Any:
    """The value of a syntax tree; ValueError for every form but those above."""
    match node:
        case ast.Constant(value=value) if value is None or type(value) in (int, str):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) is int:
            return -value
        case ast.List(elts=parts):
            return [_value(part) for part in parts]
        case ast.Dict(keys=keys, values=values):
            return {_value(_given(key)): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Set(elts=parts):
            return {_value(part) for part in parts}
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_constraint(operand)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            return _combined(node)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _CLASSES:
            named = {_keyword(keyword): _value(keyword.value) for keyword in keywords}
            return _CLASSES[name](*(_value(arg) for arg in args), **named)
        case ast.Call(func=ast.Attribute(value=inner, attr="over"), args=[indices], keywords=[]):
            return _constraint(inner).over(_value(indices))
    raise ValueError(f"{ast.dump(node)[:80]} is not part of a constraint")


def _given(key: ast.expr | None) -> ast.expr:
    if key is None:
        raise ValueError("** is not part of a constraint")
    return key


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("** is not part of a constraint")
    return keyword.arg


def _constraint(node: ast.expr) -> Constraint:
    found = _value(node)
    if not isinstance(found, Constraint):
        raise ValueError(f"{found!r} is not a constraint")
    return found


def _combined(node: ast.BinOp) -> Constraint:
    """A chain of one operator, without recursion along it."""
    kind = type(node.op)
    parts: list[ast.expr] = []
    rest: ast.expr = node
    while isinstance(rest, ast.BinOp) and type(rest.op) is kind:
        parts.append(rest.right)
        rest = rest.left
    found = [_constraint(part) for part in (rest, *reversed(parts))]
    return constraints.And.of(*found) if kind is ast.BitAnd else constraints.Or.of(*found)
