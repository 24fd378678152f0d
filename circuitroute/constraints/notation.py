"""Formulas as text, as Python would write them over variables x0, x1, ...: ``~x0 & (x1 >> x2)``, ``ITE(x0, x1, x2)``.

Read by a parser of its own, with Python's precedences; nothing is ever evaluated, and only the words below exist.
"""

from __future__ import annotations

import re

from circuitroute.constraints.formula import Formula, Writer

# Words for operators: the number of operands each takes (None: any), and how it is written in steps.
_CALLS: dict[str, tuple[int | None, str]] = {
    "And": (None, "and"),
    "Or": (None, "or"),
    "Xor": (None, "xor"),
    "Nand": (None, "not and"),
    "Nor": (None, "not or"),
    "Xnor": (None, "not xor"),
    "Equivalent": (None, "equivalent"),
    "Not": (1, "not"),
    "Implies": (2, "implies"),
    "ITE": (3, "ite"),
}
# From the loosest to the tightest, as in Python; "<<" is an implication backwards.
_INFIX = {"|": (1, "or"), "^": (2, "xor"), "&": (3, "and"), ">>": (4, "implies"), "<<": (4, "implies")}
_SIGNS = {"or": " | ", "xor": " ^ ", "and": " & ", "implies": " >> "}
_TOKEN = re.compile(r"\s*(?:([A-Za-z_]\w*)|(>>|<<|[&|^~(),]))", re.ASCII)
VARIABLE = re.compile(r"x(0|[1-9][0-9]*)", re.ASCII)


def written(formula: Formula) -> str:
    """The text of a formula; :func:`read` turns it back."""
    texts: list[str] = []
    for operator, operands in formula.steps:
        if operator == "var":
            texts.append(f"x{operands[0]}")
            continue
        parts = [texts[i] for i in operands]
        if operator in _SIGNS or operator == "not":
            loose = [formula.steps[i].operator in _SIGNS for i in operands]
            inside = [f"({part})" if wrap else part for part, wrap in zip(parts, loose, strict=True)]
            texts.append(f"~{inside[0]}" if operator == "not" else _SIGNS[operator].join(inside))
        elif operator in ("true", "false"):
            texts.append(operator.capitalize())
        else:
            texts.append(f"{'ITE' if operator == 'ite' else 'Equivalent'}({', '.join(parts)})")
    return texts[-1]


def read(text: str) -> Formula:
    """The formula a text stands for.

    Raises:
        ValueError: the text is no formula; says what was met where.
    """
    try:
        return _Reader(text).whole()
    except RecursionError:
        raise ValueError(f"expr={_shortened(text)}: nested too deeply to be read") from None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


class _Reader:
    """Precedence climbing over the tokens of a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._writer = Writer()
        self._token = self._next()

    def _next(self) -> str:
        """The token after the current position; "" at the end."""
        self._start = self._at
        if not self._text[self._at :].strip():
            return ""
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            rest = self._text[self._at :].lstrip()
            self._start = len(self._text) - len(rest)
            raise self._wrong(f"{rest.split()[0][:20]!r} has no meaning in a formula")
        self._start, self._at = found.start(1) if found[1] else found.start(2), found.end()
        return found[1] or found[2]

    def _wrong(self, what: str) -> ValueError:
        return ValueError(
            f"expr={_shortened(self._text)}: {what}, at position {self._start}; write variables x0, x1, ... with "
            f"~ & ^ | >>, True, False and {', '.join(_CALLS)}"
        )

    def _take(self, wanted: str = "") -> str:
        taken = self._token
        if wanted and taken != wanted:
            raise self._wrong(f"expected {wanted!r}, not {taken!r}" if taken else f"{wanted!r} is missing")
        self._token = self._next()
        return taken

    def whole(self) -> Formula:
        top = self._infix(1)
        if self._token:
            raise self._wrong(f"{self._token!r} is one too many")
        return self._writer.formula(top)

    def _infix(self, lowest: int) -> int:
        """Operands joined by operators that bind at least as tightly as ``lowest``; equal ones from left to right."""
        left = self._operand()
        while _INFIX.get(self._token, (0, ""))[0] >= lowest:
            sign = self._take()
            strength, operator = _INFIX[sign]
            right = self._infix(strength + 1)
            left = self._writer.add(operator, [right, left] if sign == "<<" else [left, right])
        return left

    def _operand(self) -> int:
        if self._token == "~":
            self._take()
            return self._writer.add("not", [self._operand()])
        if self._token == "(":
            self._take()
            inside = self._infix(1)
            self._take(")")
            return inside
        return self._word()

    def _word(self) -> int:
        word = self._token
        variable = VARIABLE.fullmatch(word)
        if not variable and word not in _CALLS and word not in ("True", "False"):
            raise self._wrong(f"expected a variable or a formula, not {word!r}" if word else "it ends too early")
        self._take()
        if variable:
            return self._writer.variable(int(variable[1]))
        return self._call(word) if word in _CALLS else self._writer.add(word.lower(), [])

    def _call(self, name: str) -> int:
        self._take("(")
        operands = [self._infix(1)]
        while self._token == ",":
            self._take()
            operands.append(self._infix(1))
        wanted, written_as = _CALLS[name]
        if wanted is not None and len(operands) != wanted:
            raise self._wrong(f"{name} takes {wanted} operands, not {len(operands)}")
        self._take(")")
        return apply(self._writer, written_as, operands)


def apply(writer: Writer, operators: str, operands: list[int]) -> int:
    """One or two operators on operands: "not and" is the negation of the conjunction."""
    negated, _, operator = operators.rpartition(" ")
    top = writer.add(operator, operands)
    return writer.add("not", [top]) if negated else top
