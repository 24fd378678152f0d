"""The bad constraints and files, by name: each a function that gives a circuit or raises.

What a case needs to be stated (a formula, a file) is made by ``prepare``; only what it returns is measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from tempfile import mkdtemp
from typing import TypeAlias

import circuitroute as cr

Action: TypeAlias = Callable[[], object]
Prepare: TypeAlias = Callable[[], Action]
CASES: dict[str, Prepare] = {}


def case(prepare: Prepare) -> Prepare:
    """Add a case under its function's name."""
    CASES[prepare.__name__.strip("_").replace("_", "-")] = prepare
    return prepare


def compiling(constraint: cr.Constraint, n: int) -> Action:
    """What compiles a constraint."""
    return lambda: cr.compile(constraint, n)


def all_of(parts: Iterator[cr.Constraint]) -> cr.Constraint:
    """The conjunction."""
    return reduce(lambda a, b: a & b, parts)


# ---------------------------------------------------------------------------------------------- machines of a user


@dataclass(frozen=True)
class Remember(cr.Constraint):
    """A state per subset; accepts those of even size, so that all of them matter."""

    most: int = 1 << 30

    def leaf(self, var: int) -> tuple[object, object]:
        return (), (var,)

    def merge(self, left: tuple[int, ...], right: tuple[int, ...]) -> object:  # type: ignore[override]
        return None if len(left) + len(right) > self.most else left + right

    def accepts(self, state: tuple[int, ...]) -> bool:  # type: ignore[override]
        return sum(state) % 2 == 0


@dataclass(frozen=True)
class Slow(cr.Constraint):
    """A parity whose merge takes a hundredth of a second and whose states are many."""

    modulus: int = 1000

    def leaf(self, var: int) -> tuple[int, int]:
        return 0, var + 1

    def merge(self, left: int, right: int) -> int:  # type: ignore[override]
        sum(range(300_000))
        return (left + right) % self.modulus

    def accepts(self, state: int) -> bool:  # type: ignore[override]
        return state == 0


@dataclass(frozen=True)
class Sum(cr.Constraint):
    """The squares of the selected variables' numbers add up to a multiple of a modulus."""

    modulus: int

    def leaf(self, var: int) -> tuple[int, int]:
        return 0, (var * var + 7 * var + 1) % self.modulus

    def merge(self, left: int, right: int) -> int:  # type: ignore[override]
        return (left + right) % self.modulus

    def accepts(self, state: int) -> bool:  # type: ignore[override]
        return state == 0


for _n in (20, 22, 24, 32, 64):
    CASES[f"subset-states-{_n}"] = lambda n=_n: compiling(Remember(), n)  # type: ignore[misc]
CASES["subset-states-3-of-300"] = lambda: compiling(Remember(3), 300)
CASES["slow-merge"] = lambda: compiling(Slow(), 64)
CASES["modulus-5000"] = lambda: compiling(Sum(5000), 64)
CASES["modulus-100003"] = lambda: compiling(Sum(100_003), 256)
CASES["modulus-or"] = lambda: compiling(Sum(997) | Sum(1009) | Sum(1013), 64)
CASES["modulus-and-of-five"] = lambda: compiling(all_of(Sum(m) for m in (7, 11, 13, 17, 19)), 64)


# ---------------------------------------------------------------------------------------------- formulas


def clauses(variables: int, ratio: float, seed: int) -> list[tuple[int, int, int]]:
    """A random 3-CNF, literals counted from 1."""
    draw = random.Random(seed)
    return [
        tuple(v * draw.choice((-1, 1)) for v in draw.sample(range(1, variables + 1), 3))  # type: ignore[misc]
        for _ in range(int(ratio * variables))
    ]


def text_of(cnf: list[tuple[int, int, int]]) -> str:
    """A CNF as a text that ``cr.Logic`` reads."""
    literal = lambda v: f"{'~' if v < 0 else ''}x{abs(v) - 1}"  # noqa: E731
    return " & ".join(f"({' | '.join(map(literal, clause))})" for clause in cnf)


for _ratio in (1.5, 3.0, 4.2):
    CASES[f"3-cnf-60-at-{_ratio}"] = lambda r=_ratio: compiling(cr.Logic(text_of(clauses(60, r, 1))), 60)  # type: ignore[misc]
CASES["3-cnf-60-separate"] = lambda: compiling(
    all_of(cr.Logic(text_of([clause])) for clause in clauses(60, 3.0, 2)), 60
)
CASES["3-cnf-300-at-2"] = lambda: compiling(cr.Logic(text_of(clauses(300, 2.0, 3))), 300)
CASES["not-3-cnf-60"] = lambda: compiling(~cr.Logic(text_of(clauses(60, 3.0, 4))) & cr.Exactly(8), 60)


@case
def xor_of_products() -> Action:
    """The inner product of two halves: any order that splits them is exponential."""
    return compiling(cr.Logic(" ^ ".join(f"(x{i} & x{(i * 37 + 11) % 90 + 90})" for i in range(90))), 180)


@case
def xor_chain() -> Action:
    """Sixty variables, each x_i ^ x_j twice: small diagrams, and a huge CNF if one were written."""
    import sympy

    x = cr.variables(60)
    return lambda: cr.compile(cr.Logic(sympy.Xor(*x)), 60)


def _multiplied(bits: int) -> str:
    """The middle bit of a product of two numbers: exponential in every order (Bryant 1991)."""
    columns: list[list[str]] = [[] for _ in range(2 * bits)]
    for i in range(bits):
        for j in range(bits):
            columns[i + j].append(f"(x{i} & x{bits + j})")
    for place in range(bits):
        while len(columns[place]) > 1:
            a, b, *rest = columns[place]
            c = rest[0] if rest else "False"
            columns[place] = [*rest[1:], f"({a} ^ {b} ^ {c})"] if place == bits - 1 else [*rest[1:], f"({a} ^ {b})"]
    return columns[bits - 1][0]


CASES["multiplier-column"] = lambda: compiling(cr.Logic(_multiplied(16)), 32)


def shared_formula(depth: int) -> cr.Constraint:
    """A formula of ``depth`` steps that is 2 ** depth long when it is written out."""
    from circuitroute.constraints.formula import Writer

    writer = Writer()
    top = writer.variable(0)
    for i in range(1, depth):
        top = writer.add("ite", [writer.variable(i), top, writer.add("not", [top])])
    return cr.Logic.of(writer.formula(top))


CASES["shared-formula-repr"] = lambda: lambda: len(repr(shared_formula(60)))
CASES["shared-formula"] = lambda: compiling(shared_formula(60), 60)
CASES["shared-formula-refused"] = lambda: lambda: cr.compile(shared_formula(60), 10)
CASES["text-of-100000-nested"] = lambda: (
    lambda: cr.compile(cr.Logic("~(x0 & ~(x1 | " * 50_000 + "x2" + "))" * 50_000), 3)
)
CASES["sympy-nested"] = lambda: _sympy_nested


def _sympy_nested() -> object:
    import sympy

    x = cr.variables(60)
    expr = x[0]
    for i in range(1, 60):
        expr = sympy.ITE(x[i], expr, sympy.Not(expr, evaluate=False), evaluate=False)
    return cr.compile(cr.Logic(expr), 60)


# ---------------------------------------------------------------------------------------------- nested rules


def nested(depth: int, n: int) -> cr.Constraint:
    """~(a & ~(b | ~(...))) of counts on overlapping scopes."""
    draw = random.Random(5)
    rule: cr.Constraint = cr.AtMost(2).over(draw.sample(range(n), 5))
    for level in range(depth):
        part = cr.AtMost(2).over(draw.sample(range(n), 5))
        rule = ~(part & rule) if level % 2 else ~(part | rule)
    return rule


CASES["nested-60"] = lambda: lambda: cr.compile(nested(60, 32), 32)
CASES["nested-60-disjoint"] = lambda: (
    lambda: cr.compile(
        reduce(
            lambda rule, i: ~(cr.Exactly(1).over([3 * i, 3 * i + 1, 3 * i + 2]) & ~rule),
            range(1, 60),
            cr.Exactly(1).over([0, 1, 2]),
        ),
        180,
    )
)
CASES["nested-3000"] = lambda: lambda: cr.compile(nested(3000, 32), 32)


def doubled(depth: int) -> cr.Constraint:
    """A rule that holds its predecessor twice: 2 ** depth parts, depth objects."""
    rule: cr.Constraint = cr.AtMost(2).over(range(5))
    for i in range(depth):
        rule = (rule & cr.AtMost(2).over([i, i + 1, i + 2])) | (~rule & cr.AtMost(3).over([i, i + 3, i + 4, i + 5]))
    return rule


CASES["doubled-60"] = lambda: lambda: cr.compile(doubled(60), 70)


@case
def each_of_each() -> Action:
    """EachGroup of EachGroup, eight deep."""
    rule: cr.Constraint = cr.Between(1, 2)
    for _ in range(8):
        rule = cr.EachGroup(cr.Groups(2), rule)
    return compiling(rule & cr.AtMost(400), 1024)


@case
def over_of_over() -> Action:
    """A rule over a permutation of a permutation of ..."""

    def run() -> object:
        draw = random.Random(6)
        rule: cr.Constraint = cr.AtMost(4).over(range(12)) & ~cr.Cost(range(24), at_most=40).over(range(24))
        for _ in range(60):
            rule = rule.over(draw.sample(range(24), 24)) | cr.Exactly(3).over(draw.sample(range(24), 7))
        return cr.compile(rule, 24)

    return run


# ---------------------------------------------------------------------------------------------- counts and costs


def overlapping(number: int, size: int, n: int, k: int) -> cr.Constraint:
    """Counts over random sets of variables."""
    draw = random.Random(7)
    return all_of(cr.AtMost(k).over(draw.sample(range(n), size)) for _ in range(number))


CASES["overlapping-counts-40x8"] = lambda: compiling(overlapping(40, 8, 64, 3), 64)
CASES["overlapping-counts-40x20"] = lambda: compiling(overlapping(40, 20, 64, 5), 64)
CASES["overlapping-counts-40x30"] = lambda: compiling(overlapping(40, 30, 128, 8), 128)
CASES["overlapping-counts-400x20"] = lambda: compiling(overlapping(400, 20, 400, 5), 400)
CASES["overlapping-or"] = lambda: compiling(
    reduce(lambda a, b: a | b, overlapping(40, 20, 64, 5).parts),  # type: ignore[attr-defined]
    64,
)


def costs(number: int, n: int, largest: int) -> cr.Constraint:
    """Budgets of big random costs."""
    draw = random.Random(8)
    rows = [[draw.randrange(1, largest) for _ in range(n)] for _ in range(number)]
    return all_of(cr.Cost(row, at_most=sum(row) // 3) for row in rows)


CASES["cost-of-large-numbers"] = lambda: compiling(costs(1, 64, 10**12), 64)
CASES["cost-of-medium-numbers"] = lambda: compiling(costs(1, 64, 3000), 64)
CASES["five-costs"] = lambda: compiling(costs(5, 40, 10**6), 40)
CASES["three-costs-small"] = lambda: compiling(costs(3, 40, 20), 40)
CASES["crossing-active-groups"] = lambda: compiling(
    all_of(
        cr.ActiveGroups(cr.Groups([list(range(i, 64, step)) for i in range(step)]), at_most=step // 2)
        for step in (4, 6, 8, 12, 16)
    ),
    64,
)
CASES["not-count-in"] = lambda: compiling(~cr.CountIn(range(0, 20_000, 2)), 20_000)
CASES["count-in-halves"] = lambda: compiling(
    cr.CountIn(range(0, 2000, 3)).over(range(2000)) & cr.CountIn(range(0, 2000, 7)).over(range(1000, 3000)), 3000
)
CASES["exactly-of-10^5"] = lambda: compiling(cr.Exactly(50_000), 100_000)
CASES["exactly-8-of-10^6"] = lambda: compiling(cr.Exactly(8), 1_000_000)
CASES["between-of-10^6"] = lambda: compiling(cr.Between(250_000, 750_000), 1_000_000)
CASES["count-in-of-10^6"] = lambda: compiling(cr.CountIn(random.Random(9).sample(range(10**6), 10**5)), 10**6)
CASES["groups-of-10^5"] = lambda: compiling(cr.EachGroup(cr.Groups(12_500), cr.Exactly(1)) & cr.AtMost(20_000), 100_000)
CASES["exactly-8-count"] = lambda: lambda: cr.compile(cr.Exactly(200), 16_384).model_count()
CASES["exactly-8-check"] = lambda: lambda: cr.compile(cr.Exactly(100), 4_096).check()


# ---------------------------------------------------------------------------------------------- files


def written(name: str, content: str) -> Path:
    """A file of that content."""
    path = Path(mkdtemp()) / name
    path.write_text(content)
    return path


def reading(content: str) -> Action:
    """What reads an NNF."""
    path = written("circuit.nnf", content)
    return lambda: cr.read_nnf(path)


class _Lines:
    """Nodes of an NNF in c2d's format."""

    def __init__(self, variables: int) -> None:
        self.variables = variables
        self.lines: list[str] = []
        self.edges = 0

    def add(self, line: str) -> int:
        self.lines.append(line)
        return len(self.lines) - 1

    def all(self, children: list[int]) -> int:
        self.edges += len(children)
        return self.add(f"A {len(children)} {' '.join(map(str, children))}")

    def any(self, children: list[int], decided: int = 0) -> int:
        self.edges += len(children)
        return self.add(f"O {decided} {len(children)} {' '.join(map(str, children))}")

    def text(self) -> str:
        return "\n".join([f"nnf {len(self.lines)} {self.edges} {self.variables}", *self.lines, ""])


def diamonds(depth: int) -> str:
    """Both branches of every decision lead to the same node: 2 ** depth paths, all subsets."""
    nnf = _Lines(depth)
    below: int | None = None
    for v in range(1, depth + 1):
        branches = [nnf.add(f"L {sign * v}") for sign in (-1, 1)]
        below = nnf.any(branches if below is None else [nnf.all([branch, below]) for branch in branches], v)
    return nnf.text()


def wide_or(children: int, variables: int, seed: int, ordered: bool = False) -> str:
    """One or-node of random terms, which exclude one another by no one variable."""
    draw = random.Random(seed)
    nnf = _Lines(variables)
    literal = {v: nnf.add(f"L {v}") for w in range(1, variables + 1) for v in (w, -w)}
    found: dict[tuple[int, ...], None] = {}
    while len(found) < children:
        found[tuple(draw.choice((-1, 1)) * v for v in range(1, variables + 1))] = None
    terms = []
    for term in found:
        names = list(term) if ordered else draw.sample(term, variables)
        terms.append(nnf.all([literal[v] for v in names]))
    nnf.any(terms)
    return nnf.text()


def unordered_pairs(pairs: int) -> str:
    """A product of or-nodes that no variable decides, each over 16 variables of its own: truth tables all the way."""
    draw = random.Random(11)
    nnf = _Lines(16 * pairs)
    tops = []
    for p in range(pairs):
        names = list(range(16 * p + 1, 16 * p + 17))
        halves = []
        for parity in (0, 1):
            below = {0: None, 1: None}
            order = draw.sample(names, 16)
            for v in order:
                yes, no = nnf.add(f"L {v}"), nnf.add(f"L -{v}")
                after = {}
                for want in (0, 1):
                    branches = []
                    for lit, bit in ((no, 0), (yes, 1)):
                        rest = below[want ^ bit]
                        if v == order[0]:
                            if want == bit:
                                branches.append(lit)
                        elif rest is not None:
                            branches.append(nnf.all([lit, rest]))
                    after[want] = nnf.any(branches, v) if branches else None
                below = after
            halves.append(below[parity])
        tops.append(nnf.any(halves))  # type: ignore[arg-type]
    nnf.all(tops)
    return nnf.text()


def chain(depth: int) -> str:
    """Decisions nested ``depth`` deep over as many variables."""
    nnf = _Lines(depth)
    below: int | None = None
    for v in range(1, depth + 1):
        yes, no = nnf.add(f"L {v}"), nnf.add(f"L -{v}")
        below = yes if below is None else nnf.any([yes, nnf.all([no, below])], v)
    return nnf.text()


def nested_and(depth: int) -> str:
    """And-nodes of one child, nested."""
    nnf = _Lines(2)
    here = nnf.add("L 1")
    for _ in range(depth):
        here = nnf.all([here])
    return nnf.text()


CASES["nnf-diamonds-60"] = lambda: reading(diamonds(60))
CASES["nnf-diamonds-5000"] = lambda: reading(diamonds(5000))
CASES["nnf-diamonds-counted"] = lambda: (lambda path: lambda: cr.read_nnf(path).model_count())(
    written("d.nnf", diamonds(5000))
)
CASES["nnf-wide-or-4000x24"] = lambda: reading(wide_or(4000, 24, 1))
CASES["nnf-wide-or-3000x64"] = lambda: reading(wide_or(3000, 64, 2))
CASES["nnf-wide-or-20000x64-ordered"] = lambda: reading(wide_or(20_000, 64, 3, ordered=True))
CASES["nnf-wide-or-2000x16"] = lambda: reading(wide_or(2000, 16, 4))
CASES["nnf-truth-tables"] = lambda: reading(unordered_pairs(60))
CASES["nnf-chain-2000"] = lambda: reading(chain(2000))
CASES["nnf-chain-20000"] = lambda: reading(chain(20_000))
CASES["nnf-nested-100000"] = lambda: reading(nested_and(100_000))


def sdd_files(primes: int, variables: int) -> Action:
    """An SDD of one decision with many primes, minterms of the left variables, each of a right-linear vtree."""
    left = variables
    lines = []
    vtree = []
    leaf = {}
    for v in range(1, left + 2):
        leaf[v] = len(vtree)
        vtree.append(f"L {leaf[v]} {v}")
    spine = {left: leaf[left]}
    for v in range(left - 1, 0, -1):
        spine[v] = len(vtree)
        vtree.append(f"I {spine[v]} {leaf[v]} {spine[v + 1]}")
    root = len(vtree)
    vtree.append(f"I {root} {spine[1]} {leaf[left + 1]}")
    literal = {}
    for v in range(1, left + 2):
        for s in (v, -v):
            literal[s] = len(lines)
            lines.append(f"L {literal[s]} {leaf[v]} {s}")
    draw = random.Random(12)
    terms: dict[tuple[int, ...], None] = {}
    while len(terms) < primes:
        terms[tuple(draw.choice((-1, 1)) * v for v in range(1, left + 1))] = None
    false = len(lines)
    lines.append(f"F {false}")
    pairs = []
    for i, term in enumerate(terms):
        here = literal[term[-1]]
        for v in range(left - 1, 0, -1):
            node = len(lines)
            lines.append(f"D {node} {spine[v]} 1 {literal[term[v - 1]]} {here}")
            here = node
        pairs.append(f"{here} {literal[(left + 1) * (1 if i % 2 else -1)]}")
    lines.append(f"D {len(lines)} {root} {len(pairs)} {' '.join(pairs)}")
    a = written("c.sdd", "\n".join([f"sdd {len(lines)}", *lines, ""]))
    b = written("c.vtree", "\n".join([f"vtree {len(vtree)}", *vtree, ""]))
    return lambda: cr.read_sdd(a, b)


CASES["sdd-primes-4000x30"] = lambda: sdd_files(4000, 30)
CASES["sdd-primes-3000x60"] = lambda: sdd_files(3000, 60)


def sdd_deep(depth: int) -> Action:
    """The negation of one literal at the end of a vtree of so many leaves in a row, lifted to its root."""
    vtree = [f"L {v} {v + 1}" for v in range(depth)]
    spine = depth - 1
    for v in range(depth - 2, -1, -1):
        vtree.append(f"I {len(vtree)} {v} {spine}")
        spine = len(vtree) - 1
    a = written("c.sdd", f"sdd 1\nL 0 {depth - 1} -{depth}\n")
    b = written("c.vtree", "\n".join([f"vtree {len(vtree)}", *vtree, ""]))
    return lambda: cr.read_sdd(a, b)


CASES["sdd-deep-10000"] = lambda: sdd_deep(10_000)
CASES["sdd-deep-60000"] = lambda: sdd_deep(60_000)


@case
def load_wide() -> Action:
    """A saved circuit of a hard 3-CNF as terms: loading checks it."""
    path = written("c.nnf", wide_or(1500, 24, 5))
    circuit = cr.read_nnf(path)
    target = path.with_suffix(".circuit")
    circuit.save(target)
    return lambda: cr.load(target)


@case
def load_count() -> Action:
    """A saved count: loading counts its models, numbers of thousands of digits."""
    target = Path(mkdtemp()) / "c.circuit"
    cr.compile(cr.Exactly(100), 8_192).save(target)
    return lambda: cr.load(target)
