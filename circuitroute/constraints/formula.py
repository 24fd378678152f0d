"""Propositional formulas as plain data: steps in order, each an operator on earlier ones.

Steps rather than a tree: shared parts are kept once, and nothing here recurses. Formulas compare as they are written,
up to the order and nesting of "and", "or", "xor" and "equivalent".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from circuitroute.deadline import tick
from circuitroute.errors import CircuitTooLargeError

# The value of each operator, given those of its operands.
MEANING: dict[str, Callable[[Sequence[bool]], bool]] = {
    "true": lambda _: True,
    "false": lambda _: False,
    "not": lambda a: not a[0],
    "and": all,
    "or": any,
    "xor": lambda a: sum(a) % 2 == 1,
    "implies": lambda a: not a[0] or a[1],
    "equivalent": lambda a: all(a) or not any(a),
    "ite": lambda a: a[1] if a[0] else a[2],
}
_IN_ANY_ORDER = ("and", "or", "xor", "equivalent")
_ASSOCIATIVE = ("and", "or", "xor")
_IDEMPOTENT = ("and", "or", "equivalent")
# All operands of all steps that one writer makes: those of a chain nested to the right add up to half its square.
MAX_OPERANDS = 20_000_000


class Step(NamedTuple):
    """``operator`` on the steps ``operands``; ``"var"`` has one operand, the variable itself."""

    operator: str
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Formula:
    """Steps, operands before their uses; the last one is the formula. Made by a :class:`Writer`."""

    steps: tuple[Step, ...]

    @cached_property
    def variables(self) -> tuple[int, ...]:
        """The variables in it, increasing."""
        return tuple(sorted(step.operands[0] for step in self.steps if step.operator == "var"))

    def scopes(self) -> tuple[int, ...]:
        """For each step the variables it depends on, a bit per variable."""
        found: list[int] = []
        for operator, operands in self.steps:
            tick(1 + len(operands))
            scope = 0
            for i in operands:
                scope |= 1 << i if operator == "var" else found[i]
            found.append(scope)
        return tuple(found)

    def holds(self, selected: Callable[[int], bool]) -> bool:
        """Its value where ``selected`` tells which variables are present."""
        values: list[bool] = []
        for operator, operands in self.steps:
            if operator == "var":
                values.append(bool(selected(operands[0])))
            else:
                values.append(bool(MEANING[operator]([values[i] for i in operands])))
        return values[-1]

    def renamed(self, indices: Sequence[int]) -> Formula:
        """The same formula with variable i called ``indices[i]``."""
        writer = Writer()
        return writer.formula(writer.copy(self, indices))

    def conjuncts(self) -> tuple[Formula, ...]:
        """Formulas whose conjunction is this one: the outermost conjunction taken apart, however it is written."""
        writer = Writer()
        found: list[int] = []
        waiting = [writer.copy(self)]
        while waiting:
            tick()
            top = waiting.pop()
            parts = _parts(writer, top)
            waiting.extend(reversed(parts))
            found.extend([] if parts else [top])
        return tuple(writer.formula(top) for top in dict.fromkeys(found))


def _parts(writer: Writer, top: int) -> list[int]:
    """The parts of a conjunction, a negated disjunction or a negated implication; none of anything else."""
    operator, operands = writer.steps[top]
    if operator == "and":
        return list(operands)
    if operator != "not":
        return []
    inner, below = writer.steps[operands[0]]
    if inner == "or":
        return [writer.add("not", [i]) for i in below]
    return [below[0], writer.add("not", [below[1]])] if inner == "implies" else []


def combined(operator: str, formulas: Iterable[Formula]) -> Formula:
    """``operator`` on whole formulas."""
    writer = Writer()
    return writer.formula(writer.add(operator, [writer.copy(formula) for formula in formulas]))


class Writer:
    """Writes steps in a normal form: each once, nested uses of one associative operator flattened, operands
    sorted by the variables in them where their order does not matter."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._known: dict[Step, int] = {}
        self._keys: list[tuple[int, int, bytes]] = []
        self._operands = 0

    def variable(self, index: int) -> int:
        """The step of a variable."""
        return self._step(Step("var", (index,)), (index, 1, b"%d" % index))

    def add(self, operator: str, operands: Iterable[int]) -> int:
        """The step of an operator on earlier steps."""
        some = list(operands)
        if operator in _ASSOCIATIVE:
            some = [j for i in some for j in (self.steps[i].operands if self.steps[i].operator == operator else (i,))]
        tick(1 + len(some))
        if operator in _IDEMPOTENT:
            some = list(dict.fromkeys(some))
        if operator in _IN_ANY_ORDER:
            some.sort(key=self._keys.__getitem__)
        if operator in _ASSOCIATIVE and len(some) == 1:
            return some[0]
        if operator == "not" and self.steps[some[0]].operator == "not":
            return self.steps[some[0]].operands[0]
        return self._step(Step(operator, tuple(some)), self._key(operator, [self._keys[i] for i in some]))

    def _key(self, operator: str, keys: list[tuple[int, int, bytes]]) -> tuple[int, int, bytes]:
        """Sorts by the first variable, then by size; the digest tells apart what differs otherwise."""
        digest = hashlib.blake2b(operator.encode(), digest_size=16)
        for _, _, below in keys:
            digest.update(b"(" + below)
        return min((key[0] for key in keys), default=-1), 1 + sum(key[1] for key in keys), digest.digest()

    def _step(self, step: Step, key: tuple[int, int, bytes]) -> int:
        index = self._known.setdefault(step, len(self.steps))
        if index == len(self.steps):
            self._operands += len(step.operands)
            if self._operands > MAX_OPERANDS:
                raise CircuitTooLargeError(
                    f"a formula whose steps have more than {MAX_OPERANDS} operands: write long chains of one operator "
                    "flat, a & b & c rather than a & (b & c)"
                )
            self.steps.append(step)
            self._keys.append(key)
        return index

    def copy(self, formula: Formula, indices: Sequence[int] | None = None) -> int:
        """The step of a whole formula, its variable i being ``indices[i]`` if these are given."""
        place: list[int] = []
        for operator, operands in formula.steps:
            tick()
            if operator == "var":
                place.append(self.variable(operands[0] if indices is None else indices[operands[0]]))
            else:
                place.append(self.add(operator, [place[i] for i in operands]))
        return place[-1]

    def formula(self, top: int) -> Formula:
        """The formula of a step, with the steps it needs in the order in which its operands call for them."""
        place: dict[int, int] = {}
        steps: list[Step] = []
        waiting = [top]
        while waiting:
            here = waiting[-1]
            operator, operands = self.steps[here]
            tick(1 + len(operands))
            missing = [] if operator == "var" else [i for i in operands if i not in place]
            if missing:
                waiting.extend(reversed(missing))
                continue
            waiting.pop()
            if here not in place:
                place[here] = len(steps)
                steps.append(Step(operator, operands if operator == "var" else tuple(place[i] for i in operands)))
        return Formula(tuple(steps))
