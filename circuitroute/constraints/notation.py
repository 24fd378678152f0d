"""Formulas as text, as Python would write them over variables x0, x1, ...: ``~x0 & (x1 >> x2)``, ``ITE(x0, x1, x2)``.

Python's precedences, but not Python's parser: ``ast`` gives up at 200 nested parentheses or some 3000 operators in a
row, and formulas are longer than that. Nothing is ever evaluated, and only the words below exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

from circuitroute.constraints.formula import Formula, Writer
from circuitroute.deadline import tick

# Words for operators, and what they are in steps: "not and" is the negation of the conjunction.
_CALLS = {
    "And": "and",
    "Or": "or",
    "Xor": "xor",
    "Nand": "not and",
    "Nor": "not or",
    "Xnor": "not xor",
    "Equivalent": "equivalent",
    "Not": "not",
    "Implies": "implies",
    "ITE": "ite",
}
_SIZES = {"Not": 1, "Implies": 2, "ITE": 3}  # the number of operands; the others take any
# Signs, from the loosest to the tightest, as in Python; "<<" is an implication backwards.
_SIGNS = {"|": (1, "or"), "^": (2, "xor"), "&": (3, "and"), "<<": (4, "implies"), ">>": (4, "implies"), "~": (5, "not")}
_INFIX = {operator: f" {sign} " for sign, (_, operator) in _SIGNS.items() if sign != "~"}
_TOKEN = re.compile(r"\s*(?:([A-Za-z_]\w*|>>|<<|[&|^~(),]|\Z)|(\S+))", re.ASCII)
VARIABLE = re.compile(r"x(0|[1-9][0-9]*)", re.ASCII)
# Longer texts are cut off: shared steps are written as often as they occur.
MAX_TEXT = 1 << 22
_Taker: TypeAlias = Callable[[str], Any]  # takes a token and returns what takes the next one


def written(formula: Formula) -> str:
    """The text of a formula; :func:`read` turns it back, unless it is longer than ``MAX_TEXT``, where it is cut off.

    Written from the top, since the texts of all steps together can be far longer than that of the last.
    """
    texts: list[str] = []
    length = 0
    waiting: list[int | str] = [len(formula.steps) - 1]
    while waiting and length <= MAX_TEXT:
        here = waiting.pop()
        if isinstance(here, str):
            texts.append(here)
            length += len(here)
        else:
            waiting.extend(reversed(_pieces(formula, here)))
    text = "".join(texts)
    return text if length <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def _pieces(formula: Formula, index: int) -> list[int | str]:
    """What the text of a step consists of: texts, and steps in the place of theirs."""
    operator, operands = formula.steps[index]
    if operator == "var":
        return [f"x{operands[0]}"]
    if operator in ("true", "false"):
        return [operator.capitalize()]
    if operator in _INFIX or operator == "not":
        inside: list[list[int | str]] = [
            ["(", i, ")"] if formula.steps[i].operator in _INFIX else [i] for i in operands
        ]
        return ["~", *inside[0]] if operator == "not" else _separated(inside, _INFIX[operator])
    name = "ITE" if operator == "ite" else "Equivalent"
    return [f"{name}(", *_separated([[i] for i in operands], ", "), ")"]


def _separated(parts: list[list[int | str]], separator: str) -> list[int | str]:
    return [piece for part in parts for piece in (separator, *part)][1:]


def read(text: str) -> Formula:
    """The formula a text stands for.

    Raises:
        ValueError: the text is not a formula; says what was found where.
    """
    return _Reader(text).whole()


class _Reader:
    """Operator precedence with a stack, since formulas may be nested deeper than Python calls functions."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._writer = Writer()
        self._operands: list[int] = []
        # Signs, calls and "(" that are not complete, and how many operands there are before their first.
        self._pending: list[tuple[str, int]] = []

    def whole(self) -> Formula:
        take: _Taker = self._operand
        for found in _TOKEN.finditer(self._text.rstrip()):
            tick()
            self._at = found.start(found.lastindex or 0)
            if found[2]:
                raise self._wrong(f"{found[2][:20]!r} has no meaning in a formula")
            take = take(found[1])
        return self._writer.formula(self._operands[0])

    def _operand(self, token: str) -> _Taker:
        if token in ("~", "(") or token in _CALLS:
            self._pending.append((token, len(self._operands)))
            return self._parenthesis if token in _CALLS else self._operand
        if variable := VARIABLE.fullmatch(token):
            self._operands.append(self._writer.variable(int(variable[1])))
        elif token in ("True", "False"):
            self._operands.append(self._writer.add(token.lower(), []))
        else:
            raise self._wrong(f"expected a variable or a formula, not {token!r}" if token else "it ends too early")
        return self._operator

    def _parenthesis(self, token: str) -> _Taker:
        if token != "(":
            raise self._wrong(f"expected '(', not {token!r}" if token else "'(' is missing")
        return self._operand

    def _operator(self, token: str) -> _Taker:
        strength = _SIGNS[token][0] if token in _SIGNS and token != "~" else 0
        while self._pending and _SIGNS.get(self._pending[-1][0], (0,))[0] >= max(strength, 1):
            if token in ("|", "^", "&") and self._pending[-1][0] == token:
                return self._operand  # one more of the same
            self._complete()
        if strength:
            self._pending.append((token, len(self._operands) - 1))
            return self._operand
        opened = self._pending[-1][0] if self._pending else ""
        if token == "," and opened in _CALLS:
            return self._operand
        if token == ")" and opened:
            self._complete()
        elif token or opened:
            wrong = f"expected ')', not {token!r}" if opened else f"{token!r} is one too many"
            raise self._wrong(wrong if token else "')' is missing")
        return self._operator

    def _complete(self) -> None:
        """Put the step of the last pending operator in the place of its operands."""
        name, start = self._pending.pop()
        operands = self._operands[start:]
        if name == "(":
            return
        if len(operands) != _SIZES.get(name, len(operands)):
            raise self._wrong(f"{name} takes {_SIZES[name]} operands, not {len(operands)}")
        negated, _, operator = (_CALLS.get(name) or _SIGNS[name][1]).rpartition(" ")
        step = self._writer.add(operator, reversed(operands) if name == "<<" else operands)
        self._operands[start:] = [self._writer.add("not", [step]) if negated else step]

    def _wrong(self, what: str) -> ValueError:
        shown = self._text if len(self._text) <= 80 else f"{self._text[:77]}..."
        return ValueError(
            f"expr={shown!r}: {what}, at position {self._at}; write variables x0, x1, ... with "
            f"~ & ^ | >>, True, False and {', '.join(_CALLS)}"
        )
