"""Formulas in conjunctive normal form, with what model counters add to them: weights of literals, shown variables.

Legend: literals are DIMACS's, variables counted from 1 and negative where absent: the literal -3 says that variable 2
is absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from numbers import Rational

import torch
from torch import Tensor

from circuitroute._validate import as_int, as_items, as_number, index_tuple, int_at_least
from circuitroute.constraints.base import Constraint
from circuitroute.constraints.formula import Formula, Writer
from circuitroute.constraints.resolution import eliminated
from circuitroute.deadline import tick, within

Clause = tuple[int, ...]
Number = int | float | str | Fraction | Decimal

# How a weight may be written. Its digits and its exponent are bounded: "1e999999999" is short, and a huge number.
_WRITTEN = re.compile(r"[+-]?(?:\d+/\d+|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?)", re.ASCII)
MAX_DIGITS = 4_000


def exact(text: str) -> Fraction | None:
    """The number that a text writes as a decimal, in scientific notation or as a fraction; None if it does not."""
    if len(text) > MAX_DIGITS or not _WRITTEN.fullmatch(text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None


@dataclass(frozen=True, repr=False, init=False)
class CNF(Constraint):
    """All ``clauses`` hold, each a disjunction of literals: ``cr.CNF([[1, -2], [3]], n=4)``.

    Literals are those of DIMACS files, counted from 1: ``3`` says that variable 2 is present and ``-3`` that it is
    absent. Repeated literals and clauses are dropped, and so are clauses that hold both literals of a variable; the
    clause without literals is false. :func:`circuitroute.read_cnf` reads one from a file.

    Weights and shown variables say what to count (:attr:`weights`, :meth:`projected`); which subsets are allowed does
    not depend on them. The weight of a subset is the product of the weights of its N literals, and the weighted count
    is the sum over the allowed ones: ``circuit.weighted_count()``, exactly, or ``circuit(cnf.logits).log_partition +
    cnf.log_constant``.

    Args:
        clauses: literals per clause.
        n: number of variables; the largest one named where it is None.
        weights: for literals their weights: integers, fractions, decimals, floats (taken as the exact binary fraction
            that they are) or texts such as "0.3", "1e-3" and "1/3". Both literals of a variable, or neither, which
            gives both the weight 1.
        show: the variables (from 1) onto which models are projected where they are counted; None: all of them.

    Raises:
        TypeError: literals that are not integers, weights that are not numbers.
        ValueError: 0 or a literal beyond ``n``; the weight of one literal of a variable without the other's; a weight
            that is not finite; a shown variable that does not exist, or twice.
    """

    clauses: tuple[Clause, ...]
    n: int
    weighted: tuple[tuple[int, Fraction], ...] = field(default=())
    show: tuple[int, ...] | None = None

    def __init__(
        self,
        clauses: Iterable[Iterable[int]],
        n: int | None = None,
        weights: Mapping[int, Number] | None = None,
        show: Iterable[int] | None = None,
    ) -> None:
        with within(doing=lambda: "reading clauses", remedy="give fewer"):
            given = [
                tuple(
                    as_int(f"clauses[{i}][{j}]", v) for j, v in enumerate(as_items(f"clauses[{i}]", clause, _LITERALS))
                )
                for i, clause in enumerate(as_items("clauses", clauses, "a sequence of clauses"))
            ]
            largest = max((abs(literal) for clause in given for literal in clause), default=0)
            n = largest if n is None else int_at_least("n", n, 0)
            for i, clause in enumerate(given):
                tick(1 + len(clause))
                for literal in clause:
                    _check_literal(f"clauses[{i}]", literal, n)
            kept = [simple for clause in given if (simple := _simplified(clause)) is not None]
            object.__setattr__(self, "clauses", tuple(dict.fromkeys(kept)))
            object.__setattr__(self, "n", n)
            object.__setattr__(self, "weighted", _weights(weights, n))
            object.__setattr__(self, "show", None if show is None else _shown(show, n))

    @cached_property
    def weights(self) -> dict[int, Fraction]:
        """Literal -> weight, of the variables that have weights; those of the others are 1."""
        return dict(self.weighted)

    @cached_property
    def formula(self) -> Formula:
        """The clauses as a formula over variables that are counted from 0."""
        writer = Writer()
        sides: dict[int, int] = {}
        for v in sorted({abs(literal) for clause in self.clauses for literal in clause}):
            sides[v] = writer.variable(v - 1)
            sides[-v] = writer.add("not", [sides[v]])
        parts = [writer.add("or" if clause else "false", [sides[i] for i in clause]) for clause in self.clauses]
        return writer.formula(writer.add("and", parts) if parts else writer.add("true", []))

    @property
    def logits(self) -> Tensor:
        """Float64 [N]: log W(v) - log W(-v) per variable v, so that a circuit's distribution weighs subsets as the
        weights do; zero weights forbid (-inf) or force (+inf). See :attr:`log_constant`.

        Raises:
            ValueError: a negative weight, which no distribution has; both weights of a variable are 0.
        """
        found = torch.zeros(self.n, dtype=torch.float64)
        for present, absent, v in self._pairs():
            found[v - 1] = -math.inf if not present else math.inf if not absent else _log_ratio(present, absent)
        return found

    @property
    def log_constant(self) -> float:
        """What the log-partition at :attr:`logits` lacks of the logarithm of the weighted count: the sum of log W(-v),
        or of log W(v) where W(-v) is 0.

        Raises:
            ValueError: as :attr:`logits` does.
        """
        return math.fsum(_log(absent or present) for present, absent, _ in self._pairs())

    def _pairs(self) -> list[tuple[Fraction, Fraction, int]]:
        """W(v), W(-v) and v where these are not 1."""
        weights = self.weights
        pairs = [(weights[v], weights[-v], v) for v in weights if v > 0]
        for present, absent, v in pairs:
            if min(present, absent) < 0:
                raise ValueError(
                    f"weights: literal {v if present < 0 else -v} has the weight {min(present, absent)}, and only "
                    "weights from 0 have logits; circuit.weighted_count() takes any"
                )
            if not present and not absent:
                raise ValueError(
                    f"weights: both literals of variable {v} have the weight 0, so that the weighted count is 0 and "
                    "there is no distribution; circuit.weighted_count() takes any"
                )
        return pairs

    def projected(self, max_clauses: int = 20_000) -> CNF:
        """The shown variables alone: what is left where the others are quantified existentially, by resolution
        (Davis & Putnam 1960), over ``len(show)`` variables in increasing order, with their weights.

        Its model count is the projected model count. This is meant for few hidden variables, or easy ones: each may
        square the clauses that name it.

        Args:
            max_clauses: give up where there are more clauses than this at any time.

        Returns:
            The projection; the CNF itself where all variables are shown.

        Raises:
            CircuitTooLargeError: more than ``max_clauses`` clauses, or than the time there is.
        """
        max_clauses = int_at_least("max_clauses", max_clauses, 1)
        if self.show is None:
            return self
        place = {v: i for i, v in enumerate(sorted(self.show), start=1)}
        left = eliminated(self.clauses, lambda v: v not in place, max_clauses)
        place |= {-v: -i for v, i in place.items()}
        weights = {place[literal]: weight for literal, weight in self.weighted if literal in place}
        return CNF([[place[literal] for literal in clause] for clause in left], len(self.show), weights)

    def over(self, indices: Iterable[int]) -> Constraint:
        chosen = index_tuple("indices", indices)
        if len(chosen) < self.n:
            raise ValueError(
                f"indices={list(chosen)}: the CNF has n={self.n} variables, so at least {self.n} indices are needed"
            )
        return super().over(chosen)

    def _known_variables(self) -> int | None:
        return self.n

    @cached_property
    def _hash(self) -> int:
        return hash((self.clauses, self.n, self.weighted, self.show))

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        parts = [f"{[list(clause) for clause in self.clauses]!r}", f"n={self.n}"]
        if self.weighted:
            parts.append(f"weights={ {v: str(w) for v, w in self.weighted}!r}")
        if self.show is not None:
            parts.append(f"show={list(self.show)!r}")
        return f"CNF({', '.join(parts)})"


_LITERALS = "a sequence of literals, such as [1, -2]"


def _check_literal(name: str, literal: int, n: int) -> None:
    if not 1 <= abs(literal) <= n:
        raise ValueError(f"{name}: there is no literal {literal}: they are 1 to n={n} and their negatives")


def _simplified(clause: Clause) -> Clause | None:
    """Literals once and in order; None if the clause always holds."""
    found = set(clause)
    if any(-literal in found for literal in found):
        return None
    return tuple(sorted(found, key=abs))


def _weights(weights: Mapping[int, Number] | None, n: int) -> tuple[tuple[int, Fraction], ...]:
    if weights is None:
        return ()
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights={weights!r}: expected a mapping of literals to weights, got {type(weights).__name__}")
    found: dict[int, Fraction] = {}
    for key, weight in weights.items():
        literal = as_int("weights: literal", key)
        _check_literal("weights", literal, n)
        found[literal] = _as_weight(literal, weight)
    for literal in found:
        if -literal not in found:
            raise ValueError(
                f"weights: literal {literal} has a weight and {-literal} has none; give both (counters take 1 or 1 - w "
                "for the other, and they do not agree which)"
            )
    return tuple(sorted(found.items(), key=lambda item: (abs(item[0]), -item[0])))


def _as_weight(literal: int, weight: object) -> Fraction:
    name = f"weights[{literal}]"
    if isinstance(weight, str):
        found = exact(weight)
        if found is None:
            raise ValueError(f"{name}={weight!r}: expected a number such as 0.3, 1e-3 or 1/3")
        return found
    if isinstance(weight, Decimal) and weight.is_finite():
        return Fraction(weight)
    if not isinstance(weight, bool) and isinstance(weight, Rational):
        return Fraction(int(weight.numerator), int(weight.denominator))
    number = as_number(name, weight)
    if not math.isfinite(number):
        raise ValueError(f"{name}={weight!r}: weights must be finite")
    return Fraction(number)


def _shown(show: Iterable[int], n: int) -> tuple[int, ...]:
    found = [as_int(f"show[{i}]", v) for i, v in enumerate(as_items("show", show, "a sequence of variables"))]
    for v in found:
        if not 1 <= v <= n:
            raise ValueError(f"show: there is no variable {v}: they are 1 to n={n}")
    if len(set(found)) < len(found):
        raise ValueError(f"show={found}: a variable is given twice")
    return tuple(found)


def _log(weight: Fraction) -> float:
    return _log_ratio(weight, Fraction(1))


def _log_ratio(a: Fraction, b: Fraction) -> float:
    """log(a / b), to the last digits where they are nearly equal, and where neither is a float."""
    ratio = a / b
    if Fraction(1, 2) < ratio < 2:
        return math.log1p(ratio - 1)
    return math.log(ratio.numerator) - math.log(ratio.denominator)
