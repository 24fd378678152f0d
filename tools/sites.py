"""Where a Python source can be mutated, and how: one small mistake per site, written as a replacement of some text.

Mistakes of the kinds that people make: a sign, a bound, an end of a slice, the two sides of a choice, a line too few.
What is said to people (docstrings, annotations, messages of errors and of the log) is left alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BINARY: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
}
_COMPARE: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_OPPOSITE = {"min": "max", "minimum": "maximum", "amin": "amax", "argmin": "argmax", "any": "all"}
_OPPOSITE |= {other: name for name, other in _OPPOSITE.items()}
_CHOICES = {"where", "_where"}
# Functions and methods of one number, whose call can be forgotten.
_WRAPPERS = {"as_double", "double", "float", "abs", "magnitude", "detach", "clone", "contiguous", "clamp", "clamp_"}
_LOGS = {"_log", "logger", "warnings"}


@dataclass(frozen=True)
class Site:
    """One mutation: the bytes from ``start`` to ``end`` of the source become ``new``."""

    line: int
    operator: str
    start: int
    end: int
    old: str
    new: str

    def applied(self, source: bytes) -> bytes:
        """The mutant's source."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def find(source: bytes) -> list[Site]:
    """All sites of a source, from its beginning to its end."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return sorted(set(finder.sites), key=lambda site: (site.start, site.end, site.operator, site.new))


class _Finder(ast.NodeVisitor):
    def __init__(self, source: bytes) -> None:
        self.source = source
        self.sites: list[Site] = []
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    # ------------------------------------------------------------------ places

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        if node.end_lineno is None or node.end_col_offset is None:
            raise ValueError(f"node={node!r}: it was not parsed from a source")
        start = self._lines[node.lineno - 1] + node.col_offset
        return start, self._lines[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self._span(node)
        return self.source[start:end].decode()

    def _put(self, operator: str, start: int, end: int, new: str) -> None:
        line = self.source[:start].count(b"\n") + 1
        self.sites.append(Site(line, operator, start, end, self.source[start:end].decode(), new))

    def _replace(self, operator: str, node: ast.expr | ast.stmt, new: str) -> None:
        self._put(operator, *self._span(node), new)

    def _between(self, operator: str, left: ast.expr, right: ast.expr, symbol: str, new: str) -> None:
        """Replace the symbol that stands between two operands, where parentheses and comments stand, too."""
        start, end = self._span(left)[1], self._span(right)[0]
        gap = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), self.source[start:end])
        words = rb"\s+".join(re.escape(word).encode() for word in symbol.split())
        found = re.search(rb"\b" + words + rb"\b" if symbol[0].isalpha() else words, gap)
        if found:
            self._put(operator, start + found.start(), start + found.end(), new)

    # ------------------------------------------------------------------ what is left alone

    def visit_Import(self, node: ast.Import) -> None:
        """Nothing to mutate."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Nothing to mutate."""

    def visit_Raise(self, node: ast.Raise) -> None:
        """Messages."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """For the reader."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Messages, most of them."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """The value alone: not the annotation."""
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Defaults and the body: not decorators and annotations."""
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """The body alone: not decorators and bases."""
        for statement in node.body:
            self.visit(statement)

    # ------------------------------------------------------------------ statements

    def visit_Expr(self, node: ast.Expr) -> None:
        """A call for its effect can be forgotten."""
        if isinstance(node.value, ast.Call) and not _is_log(node.value):
            self._replace("statement", node, "pass")
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """It can be forgotten, or be of another operator."""
        self._replace("statement", node, "pass")
        if type(node.op) in _BINARY:
            symbol, new = _BINARY[type(node.op)]
            self._between("arithmetic", node.target, node.value, f"{symbol}=", f"{new}=")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """A place that had a value before can keep it."""
        if all(isinstance(target, (ast.Subscript, ast.Attribute)) for target in node.targets):
            self._replace("statement", node, "pass")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        """It can be forgotten."""
        self._replace("statement", node, "pass")

    def visit_Continue(self, node: ast.Continue) -> None:
        """It can be forgotten."""
        self._replace("statement", node, "pass")

    def _negate(self, test: ast.expr) -> None:
        self._replace("condition", test, f"not ({self._text(test)})")

    def visit_If(self, node: ast.If) -> None:
        """The other branch."""
        self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """The other value."""
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """The other items."""
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    # ------------------------------------------------------------------ expressions

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Another operator."""
        if type(node.op) in _BINARY and not (isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)):
            symbol, new = _BINARY[type(node.op)]
            kind = "boolean" if symbol in "&|" else "arithmetic"
            self._between(kind, node.left, node.right, symbol, new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Each ``and`` as ``or``, and the other way round."""
        symbol, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between("boolean", left, right, symbol, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Without it."""
        kind = "arithmetic" if isinstance(node.op, (ast.USub, ast.UAdd)) else "boolean"
        self._replace(kind, node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Each comparison: with or without equality, or the opposite."""
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            self._between("comparison", left, right, *_COMPARE[type(op)])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Another number."""
        for new in _others(node.value):
            self._replace("constant", node, new)

    def visit_Slice(self, node: ast.Slice) -> None:
        """One more, or one less, at an end."""
        if node.lower is not None and not isinstance(node.lower, ast.Constant):
            self._replace("slice", node.lower, f"({self._text(node.lower)}) + 1")
        if node.upper is not None and not isinstance(node.upper, ast.Constant):
            self._replace("slice", node.upper, f"({self._text(node.upper)}) - 1")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """The opposite function, arguments the other way round, or no call."""
        name = _name(node.func)
        end = self._span(node.func)[1]
        if name in _OPPOSITE:
            self._put("minmax", end - len(name), end, _OPPOSITE[name])
        if name in _CHOICES and len(node.args) == 3:
            _, a, b = node.args
            between = self.source[self._span(a)[1] : self._span(b)[0]].decode()
            new = f"{self._text(b)}{between}{self._text(a)}"
            self._put("swapped", self._span(a)[0], self._span(b)[1], new)
        if name in _WRAPPERS:
            method = isinstance(node.func, ast.Attribute) and _name(node.func.value) not in {"tl", "torch", "math"}
            inner = node.func.value if method and isinstance(node.func, ast.Attribute) else next(iter(node.args), None)
            if inner is not None:
                self._replace("no call", node, f"({self._text(inner)})")
        self.generic_visit(node)


def _name(function: ast.expr) -> str:
    """The last part of what is called."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_log(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and _name(call.func.value) in _LOGS


def _others(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
        if value == 1:
            yield "0"
    elif isinstance(value, float):
        yield repr(2 * value if value else 1.0)
