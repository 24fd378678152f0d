"""Clauses in the DIMACS format, with the additions of model counters; see :func:`circuitroute.read_cnf`.

A header, and literals in clauses that 0 ends (DIMACS 1993); comments may mean something (Fichte, Hecher & Hamiti, The
Model Counting Competition 2020, and its format of 2021)::

    c t wmc                     the track: weighted model counting
    p cnf 3 2                   variables, clauses
    c p weight 1 0.3 0          a literal's weight
    c p weight -1 0.7 0
    c p show 1 2 0              the variables onto which models are projected
    1 -2 0
    2 3 0

Nothing is as large as a number in the file says: what is read is bounded by what is there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction

from circuitroute.constraints import CNF
from circuitroute.constraints.cnf import exact
from circuitroute.interop.text import Line, TextFile

_HEADER = "the header: p cnf, the number of variables and that of clauses"
_CLAUSE = "literals, and 0 after each clause"
_WEIGHT = "a literal and its weight, such as 0.3, 1e-3 or 1/3"
_SHOW = "variables, each once, and 0"
# What headers begin with, and whether weights (w) and shown variables (vp) have lines of their own after them.
_KINDS = {b"cnf": (True, False), b"wcnf": (True, False), b"pcnf": (False, True), b"wpcnf": (True, True)}


def read(path: str | os.PathLike[str]) -> CNF:
    """The clauses of a file."""
    return _Reader(TextFile(path)).read()


class _Reader:
    """Reads a file line by line."""

    def __init__(self, file: TextFile) -> None:
        self._file = file
        self._header: Line | None = None
        self._kind = b""
        self._sizes = [0, 0]
        self._clauses: list[list[int]] = []
        self._open: list[int] | None = None
        # Of competition's weights and of those of w lines, what each literal has and where it was said.
        self._weights: dict[int, tuple[Fraction, int]] = {}
        self._by_w: dict[int, tuple[Fraction, int]] = {}
        self._show: dict[int, int] | None = None
        # Weights and variables may be said before the header, which says which variables there are.
        self._early: list[tuple[Line, int]] = []

    def read(self) -> CNF:
        for line in self._file.lines(comments=True):
            if line.words[0] == b"%":
                break
            self._take(line)
        if self._header is None:
            raise self._file.wrong("a CNF (p cnf ...)")
        if self._open is not None:  # the last 0 may be missing
            self._clauses.append(self._open)
        if len(self._clauses) != self._sizes[1]:
            raise self._file.error(
                self._header.number, f"{self._sizes[1]} clauses", f"as many as there are, {len(self._clauses)}"
            )
        if self._kind in (b"wcnf", b"wpcnf") and not self._by_w and not self._weights:
            raise self._file.error(
                self._header.number,
                b" ".join(self._header.words),
                "weights of literals (w 1 0.3): without any this is a MaxSAT instance, whose weights are of clauses",
            )
        weights = self._both()
        return CNF(self._clauses, self._sizes[0], weights or None, None if self._show is None else list(self._show))

    def _take(self, line: Line) -> None:
        match line.words:
            case [b"c", b"p", b"weight", *_]:
                self._later(line, 3)
            case [b"c", b"p", b"show", *_]:
                self._later(line, 3)
            case [b"c", b"ind", *rest] if rest[-1:] == [b"0"] and b"".join(rest).isdigit():
                self._later(line, 2)
            case [b"c", *_]:
                pass
            case [b"p", *_]:
                self._read_header(line)
            case _ if self._header is None:
                raise self._file.wrong("a CNF (p cnf ...)")
            case [b"w", *_] if _KINDS[self._kind][0]:
                self._weight(line, 1, self._by_w)
            case [b"vp", *_] if _KINDS[self._kind][1]:
                self._shown(line, 1)
            case _:
                self._read_clauses(line)

    def _later(self, line: Line, skip: int) -> None:
        """A comment that means something, if the header has been met; else when it is."""
        if self._header is None:
            self._early.append((line, skip))
        elif line.words[2] == b"weight":
            self._weight(line, skip, self._weights)
        else:
            self._shown(line, skip)

    def _read_header(self, line: Line) -> None:
        if self._header is not None:
            raise self._file.error(line.number, b" ".join(line.words), "one header")
        if len(line.words) < 2 or line.words[1] not in _KINDS:
            raise self._file.error(line.number, b" ".join(line.words), _HEADER)
        if line.words[1] == b"wcnf" and len(line.words) == 5:
            raise self._file.error(line.number, b" ".join(line.words), f"{_HEADER}; this is a MaxSAT instance")
        sizes = self._file.numbers(line, _HEADER, skip=2)
        if len(sizes) != 2 or min(sizes) < 0:
            raise self._file.error(line.number, b" ".join(line.words), _HEADER)
        self._header, self._kind, self._sizes = line, line.words[1], sizes
        for early, skip in self._early:
            self._later(early, skip)

    def _read_clauses(self, line: Line) -> None:
        clause = [] if self._open is None else self._open
        literals = self._file.numbers(line, _CLAUSE, skip=0)
        for literal in literals:
            if literal == 0:
                self._clauses.append(clause)
                clause = []
            else:
                self._check(line, literal)
                clause.append(literal)
        self._open = clause if literals[-1] else None

    def _check(self, line: Line, literal: int) -> None:
        if abs(literal) > self._sizes[0]:
            expected = f"1 to {self._sizes[0]} or its negative, as the header says"
            raise self._file.error(line.number, f"literal {literal}", expected)

    def _weight(self, line: Line, skip: int, into: dict[int, tuple[Fraction, int]]) -> None:
        words = line.words[skip:]
        if len(words) == 3 and words[2] == b"0":
            words = words[:2]
        elif into is self._weights:
            raise self._file.error(line.number, b" ".join(line.words), f"c p weight, {_WEIGHT}, and 0")
        weight = exact(words[1].decode("ascii", "replace")) if len(words) == 2 else None
        if weight is None:
            raise self._file.error(line.number, b" ".join(line.words), _WEIGHT)
        [literal] = self._file.numbers(Line(line.number, words[:1]), _WEIGHT, skip=0)
        if literal == 0:
            raise self._file.error(line.number, "literal 0", _WEIGHT)
        self._check(line, literal)
        before = self._weights.get(literal) or self._by_w.get(literal)
        if before is not None:
            raise self._file.error(
                line.number, f"a weight of literal {literal}", f"one (line {before[1]} says {before[0]})"
            )
        into[literal] = weight, line.number

    def _shown(self, line: Line, skip: int) -> None:
        numbers: Sequence[int] = self._file.numbers(line, _SHOW, skip=skip)
        if not numbers or numbers[-1] != 0 or min(numbers[:-1], default=1) < 1:
            raise self._file.error(line.number, b" ".join(line.words), _SHOW)
        self._show = {} if self._show is None else self._show
        for v in numbers[:-1]:  # several lines add up
            self._check(line, v)
            if v in self._show:
                raise self._file.error(line.number, f"variable {v}", f"each once (line {self._show[v]} has it)")
            self._show[v] = line.number

    def _both(self) -> dict[int, Fraction]:
        """Literal -> weight, those of w lines completed as Cachet does."""
        found = {literal: weight for literal, (weight, _) in self._weights.items()}
        for v, (weight, _) in self._by_w.items():
            if v > 0 and -v not in self._by_w:
                found |= {v: Fraction(1), -v: Fraction(1)} if weight == -1 else {v: weight, -v: 1 - weight}
            else:
                found[v] = weight
        for literal in found:
            if -literal not in found:
                where = (self._weights.get(literal) or self._by_w[literal])[1]
                expected = f"one of {-literal}, too (counters take 1 or 1 - w for it, and they do not agree which)"
                raise self._file.error(where, f"a weight of literal {literal}", expected)
        return found
