"""A budget of CPU seconds: what runs long is refused when it is spent, and done when it is raised."""

from __future__ import annotations

import math
import pickle
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import circuitroute as cr
from circuitroute import compilation, deadline
from circuitroute.circuit.graph import enumerate_models
from circuitroute.circuit.verify.properties import check
from circuitroute.cli.main import main
from circuitroute.constraints import shown
from circuitroute.interop import graphs


@dataclass(frozen=True)
class Remainder(cr.Constraint):
    """The sum of the selected variables' squares leaves a remainder; thousands of merges."""

    modulus: int = 61

    def leaf(self, var):
        return 0, var * var % self.modulus

    def merge(self, left, right):
        return (left + right) % self.modulus

    def accepts(self, state):
        return state == 0


class Clock:
    """A clock that goes on by a step whenever it is looked at."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    compilation.clear_cache()
    yield
    assert deadline._here.budget is None, "every budget is left again"
    assert not compilation._busy, "and every lock given back"


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every look at the clock finds it a second later."""
    clock = Clock(1.0)
    monkeypatch.setattr(deadline, "clock", clock)
    return clock


def spent(text: str = "") -> pytest.RaisesExc[cr.CircuitTooLargeError]:
    return pytest.raises(cr.CircuitTooLargeError, match=rf"(?s){text}.*max_seconds=")


# ---------------------------------------------------------------------------------------------- the budget itself


def _forever(what: str) -> None:
    deadline.note(lambda: what)
    while True:
        deadline.tick()


def test_ticks_cost_nothing_without_a_budget(hours: Clock) -> None:
    for _ in range(1000):
        deadline.tick(1000)
    assert hours.now == 0


def test_a_spent_budget_says_what_took_how_long_and_what_would_help(hours: Clock) -> None:
    with (
        pytest.raises(cr.CircuitTooLargeError) as caught,
        deadline.within(3.5, lambda: "counting sheep", "count goats"),
    ):
        _forever("the black ones")
    expected = (
        "counting sheep took 4 seconds of CPU time (the black ones), more than max_seconds=3.5 allows: raise "
        "max_seconds (None: no limit), or count goats"
    )
    assert str(caught.value) == expected


@pytest.mark.parametrize("endless", [None, math.inf])
def test_no_limit(hours: Clock, endless: float | None) -> None:
    with deadline.within(endless):
        for _ in range(1000):
            deadline.tick(1000)
        with deadline.within():  # the default inside of no limit is no limit
            for _ in range(100):
                deadline.tick(1000)


def test_steps_that_are_slow_are_looked_at_one_by_one(hours: Clock) -> None:
    with deadline.within(None):
        for _ in range(30):
            deadline.tick()
    assert hours.now >= 10, "not one look in 128 steps"


def test_the_earlier_of_two_ends_counts(hours: Clock) -> None:
    with deadline.within(1000, lambda: "all"):
        with spent("a part took"), deadline.within(5, lambda: "a part"):
            while True:
                deadline.tick()
        deadline.tick()  # the outer one goes on
    with spent("all took"), deadline.within(5, lambda: "all"), deadline.within(1000, lambda: "a part"):
        while True:
            deadline.tick()


def test_a_budget_is_of_its_thread() -> None:
    found = []
    with deadline.within(60):
        thread = threading.Thread(target=lambda: found.append(deadline._here.budget))
        thread.start()
        thread.join()
    assert found == [None]


@pytest.mark.parametrize("wrong", [0, -1, -0.0, math.nan, -math.inf])
def test_seconds_that_are_not_positive(wrong: float, tmp_path: Path) -> None:
    circuit = cr.compile(cr.Exactly(1), 3)
    circuit.save(tmp_path / "a")
    for call in (
        lambda: cr.compile(cr.Exactly(1), 3, max_seconds=wrong),
        lambda: compilation.predict(cr.Exactly(1), 3, max_seconds=wrong),
        lambda: circuit.check(max_seconds=wrong),
        lambda: circuit.model_count(max_seconds=wrong),
        lambda: circuit.summary(max_seconds=wrong),
        lambda: cr.load(tmp_path / "a", max_seconds=wrong),
        lambda: cr.read_nnf(tmp_path / "a", max_seconds=wrong),
        lambda: cr.read_sdd(tmp_path / "a", tmp_path / "a", max_seconds=wrong),
    ):
        with pytest.raises(
            ValueError, match=r"max_seconds=.*must be a positive number of CPU seconds; None or math.inf"
        ):
            call()


@pytest.mark.parametrize("wrong", ["15", True, [1]])
def test_seconds_that_are_no_number(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"max_seconds=.*expected a number"):
        cr.compile(cr.Exactly(1), 3, max_seconds=wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- compiling


def random_3_cnf(variables: int, clauses: int, seed: int) -> str:
    draw = random.Random(seed)
    literals = (
        " | ".join(f"{draw.choice(('', '~'))}x{v}" for v in draw.sample(range(variables), 3)) for _ in range(clauses)
    )
    return " & ".join(f"({clause})" for clause in literals)


def overlapping(number: int, size: int, n: int, k: int) -> cr.Constraint:
    draw = random.Random(7)
    parts = [cr.AtMost(k).over(draw.sample(range(n), size)) for _ in range(number)]
    return parts[0] if number == 1 else parts[0] & overlapping_rest(parts[1:])


def overlapping_rest(parts: list[cr.Constraint]) -> cr.Constraint:
    whole = parts[0]
    for part in parts[1:]:
        whole &= part
    return whole


def nested(depth: int, n: int) -> cr.Constraint:
    rule: cr.Constraint = cr.AtMost(1).over([0, 1, 2])
    for i in range(depth):
        rule = ~(cr.AtMost(1).over([i % n, (i + 3) % n, (i + 5) % n]) & ~rule)
    return rule


DOABLE = {
    "a machine": (Remainder(), 24),
    "its negation": (~Remainder(), 24),
    "machines of one another": (Remainder(7) | Remainder(5), 24),
    "a formula": (cr.Logic(random_3_cnf(14, 30, 1)), 14),
    "a formula and a count": (cr.Logic(random_3_cnf(14, 20, 2)) & cr.Exactly(5), 14),
    "counts that overlap": (overlapping(6, 18, 24, 3), 24),
    "costs": (cr.Cost(range(1, 41), at_most=300) & cr.Cost(range(40, 0, -1), at_most=300), 40),
    "groups of groups": (cr.EachGroup(cr.Groups(4), cr.EachGroup(cr.Groups(4), cr.Between(1, 3))) & cr.AtMost(40), 64),
    "groups that cross": (
        cr.ActiveGroups(cr.Groups(6), at_most=3)
        & cr.ActiveGroups(cr.Groups([range(i, 24, 4) for i in range(4)]), at_most=2),
        24,
    ),
    "rules in rules": (nested(12, 16), 16),
}


@pytest.mark.parametrize(("constraint", "n"), DOABLE.values(), ids=DOABLE)
def test_compiling_is_refused_without_time_and_done_with_it(
    constraint: cr.Constraint, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(deadline, "clock", Clock(1.0))
        with spent(rf"compiling .* over {n} variables took "):
            cr.compile(constraint, n, max_seconds=2)
    assert (constraint, n) not in compilation._cache, "nothing half built is kept"
    circuit = cr.compile(constraint, n, max_seconds=600)
    compilation.clear_cache()
    again = cr.compile(constraint, n, max_seconds=None)
    assert pickle.dumps(circuit.graph) == pickle.dumps(again.graph), "the circuit does not depend on the budget"
    assert cr.compile(constraint, n, max_seconds=1e-9) is again, "what is known needs no time"


def test_the_message_names_the_culprit_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    big = cr.Cost([3**i % 10007 for i in range(64)], at_most=200_000)
    with pytest.raises(cr.CircuitTooLargeError) as caught:
        cr.compile(big & cr.AtMost(20), 64, max_nodes=10**7, max_seconds=0.4)
    for words in ("compiling (", "Cost(", "costs most: lower its limit", "max_seconds=0.4 allows", "raise max_seconds"):
        assert words in str(caught.value)


def test_predicting_is_refused_without_time(hours: Clock) -> None:
    with spent("predicting the size of "):
        compilation.predict(Remainder() & cr.Exactly(3), 24, max_seconds=2)


def test_a_real_clock_stops_a_slow_merge() -> None:
    @dataclass(frozen=True)
    class Slow(Remainder):
        def merge(self, left, right):
            sum(range(20_000))
            return super().merge(left, right)

    with spent("compiling .*Slow"):
        cr.compile(Slow(), 32, max_seconds=0.05)


def test_a_compiler_of_anyone_is_under_the_budget(hours: Clock) -> None:
    @dataclass(frozen=True)
    class Told(cr.Constraint):
        pass

    def compile_told(constraint, n, max_nodes):
        for _ in range(1000):
            deadline.tick(1000)
        return cr.compile(cr.Exactly(1), n, max_nodes)

    cr.register_compiler(Told)(compile_told)
    try:
        with spent("compiling .*Told"):
            cr.compile(Told(), 4)
        assert cr.compile(Told(), 4, max_seconds=None).n == 4
    finally:
        del compilation._compilers[Told]


def test_parts_are_under_the_budget_of_the_whole(hours: Clock) -> None:
    @dataclass(frozen=True)
    class Told(cr.Constraint):
        pass

    @cr.register_compiler(Told)
    def compile_told(constraint, n, max_nodes):
        return cr.compile(Remainder(), n, max_nodes)  # its default adds nothing

    try:
        with spent("compiling .*Told"):
            cr.compile(Told(), 24, max_seconds=3)
        assert cr.compile(Told(), 24, max_seconds=None).n == 24
    finally:
        del compilation._compilers[Told]


def test_a_slow_compile_holds_up_no_other() -> None:
    entered, leave = threading.Event(), threading.Event()

    @dataclass(frozen=True)
    class Waits(Remainder):
        def accepts(self, state):
            entered.set()
            assert leave.wait(60)
            return super().accepts(state)

    found: list[cr.Circuit] = []
    threads = [threading.Thread(target=lambda: found.append(cr.compile(Waits(5), 8))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert entered.wait(60)
    assert cr.compile(cr.Exactly(2), 5).model_count() == 10, "while the others are at it"
    leave.set()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert found[0] is found[1], "the second waited for the first"


def test_rules_that_share_their_parts_are_refused() -> None:
    rule: cr.Constraint = cr.AtMost(2).over(range(5))
    for i in range(60):
        rule = (rule & cr.AtMost(2).over([i, i + 1])) | (~rule & cr.AtMost(1).over([i, i + 3]))
    with spent("compiling .*"):
        cr.compile(rule, 70, max_seconds=0.2)
    assert len(repr(rule)) < 1 << 23, "2^60 parts are not written out"
    assert shown(rule, 100).endswith("...")


def test_rules_nested_deeper_than_python_calls() -> None:
    rule: cr.Constraint = cr.AtMost(1).over([0, 1])
    for i in range(5_000):
        rule = ~(rule & cr.AtMost(1).over([i % 3, 3]))
    with pytest.raises(cr.CircuitTooLargeError, match=r"nested.*deeper than Python calls functions: write it flatter"):
        cr.compile(rule, 4)


def test_hashes_are_not_pickled() -> None:
    rule = cr.AtMost(2) & cr.Logic("x0 >> x1")
    assert hash(rule) == hash(cr.AtMost(2) & cr.Logic("x0 >> x1"))
    assert "_hash" in vars(rule)
    assert "_hash" not in vars(pickle.loads(pickle.dumps(rule)))


# ---------------------------------------------------------------------------------------------- formulas


def test_a_formula_of_shared_steps_is_written_up_to_a_length() -> None:
    from circuitroute.constraints.formula import Writer

    writer = Writer()
    top = writer.variable(0)
    for i in range(1, 60):
        top = writer.add("ite", [writer.variable(i), top, writer.add("not", [top])])
    rule = cr.Logic.of(writer.formula(top))
    assert repr(rule).endswith("...')")
    assert cr.compile(rule, 60).model_count() == 1 << 59


def test_formulas_are_read_in_time(hours: Clock) -> None:
    with spent("reading a formula"):
        cr.Logic(" | ".join(f"x{i}" for i in range(10_000)))
    with deadline.within(None):
        assert len(cr.Logic(" | ".join(f"x{i}" for i in range(10_000))).formula.variables) == 10_000


def test_a_chain_nested_to_the_right_is_refused_before_it_fills_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitroute.constraints import formula

    monkeypatch.setattr(formula, "MAX_OPERANDS", 1000)
    with pytest.raises(
        cr.CircuitTooLargeError, match="more than 1000 operands: write long chains of one operator flat"
    ):
        cr.Logic(" | (".join(f"x{i}" for i in range(100)) + ")" * 99)


# ---------------------------------------------------------------------------------------------- circuits and files


@pytest.fixture
def circuit() -> cr.Circuit:
    return cr.compile(cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(4), 32)


def test_checking_counting_and_describing(circuit: cr.Circuit, hours: Clock) -> None:
    with spent("verifying the circuit of .* over 32 variables"):
        circuit.check(max_seconds=1)
    with spent("counting the subsets of .*Exactly"):
        circuit.model_count(max_seconds=1)
    with spent("describing the circuit of "):
        circuit.summary(max_seconds=1)
    circuit.check(max_seconds=None)
    assert circuit.model_count(max_seconds=1e6) == 6 * math.comb(16, 4) - 2 * 4 * math.comb(8, 4)
    assert "10,360" in circuit.summary(max_seconds=1e6)


def test_what_takes_no_argument_takes_a_budget_around_it(circuit: cr.Circuit, hours: Clock) -> None:
    for function in (enumerate_models, check):
        with spent(), deadline.within(1):
            function(circuit.graph)
    with spent(), deadline.within(1):
        circuit.to_networkx()
    with deadline.within(1e6):
        assert len(enumerate_models(circuit.graph)) == 6 * math.comb(16, 4) - 2 * 4 * math.comb(8, 4)


def test_what_does_not_fit_in_memory(circuit: cr.Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitroute.circuit import graph

    monkeypatch.setattr(graph, "MAX_MODEL_BYTES", 10_000)
    with pytest.raises(cr.CircuitTooLargeError, match=r"takes .* GiB, more than .*: draw samples instead"):
        enumerate_models(circuit.graph)
    monkeypatch.setattr(graph, "MAX_EXACT_BITS", 100)
    with pytest.raises(cr.CircuitTooLargeError, match="numbers of more than 100 bits"):
        circuit.model_count()
    monkeypatch.setattr(graphs, "MAX_ITEMS", 100)
    with pytest.raises(cr.CircuitTooLargeError, match="at most 100: take a smaller n"):
        circuit.to_networkx()


@pytest.mark.parametrize("most", [1, 2, 7, 1 << 20])
def test_counting_in_pieces_is_counting(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitroute.circuit import graph

    monkeypatch.setattr(graph, "EXACT_CHUNK", most)
    assert cr.compile(cr.Exactly(7) & cr.AtMost(2).over(range(9)), 23).model_count() == sum(
        math.comb(9, j) * math.comb(14, 7 - j) for j in range(3)
    )


def test_satisfying_in_pieces(circuit: cr.Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from circuitroute.circuit import boolean

    masks = torch.rand(50, 32, generator=torch.Generator().manual_seed(0)) < 0.1
    whole = circuit.satisfies(masks)
    monkeypatch.setattr(boolean, "MAX_VALUES", 1)
    assert torch.equal(circuit.satisfies(masks), whole)
    assert circuit.satisfies(masks[:0]).shape == (0,)


def wide_or(terms: int, variables: int) -> str:
    """One or-node of full terms, in c2d's format."""
    lines = [f"L {sign * v}" for v in range(1, variables + 1) for sign in (-1, 1)]
    for term in range(terms):
        children = (2 * v + (term >> v & 1) for v in range(variables))
        lines.append(f"A {variables} {' '.join(map(str, children))}")
    first = 2 * variables
    lines.append(f"O 0 {terms} {' '.join(map(str, range(first, first + terms)))}")
    return "\n".join([f"nnf {len(lines)} {terms * (variables + 1)} {variables}", *lines, ""])


def test_files_are_refused_without_time_and_read_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.nnf").write_text(wide_or(200, 10))
    (tmp_path / "a.sdd").write_text("sdd 3\nL 0 0 1\nL 1 0 -1\nD 2 2 2 0 3 1 4\n".replace("3 1 4", "0 1 1"))
    (tmp_path / "a.vtree").write_text("vtree 3\nL 0 1\nL 1 2\nI 2 0 1\n")
    (tmp_path / "b.sdd").write_text("sdd 5\nL 0 0 1\nL 1 0 -1\nL 2 1 2\nL 3 1 -2\nD 4 2 2 0 2 1 3\n")
    calls = {
        "a.nnf": lambda seconds: cr.read_nnf(tmp_path / "a.nnf", max_seconds=seconds),
        "b.sdd": lambda seconds: cr.read_sdd(tmp_path / "b.sdd", tmp_path / "a.vtree", max_seconds=seconds),
        "a.circuit": lambda seconds: cr.load(tmp_path / "a.circuit", max_seconds=seconds),
    }
    cr.read_nnf(tmp_path / "a.nnf").save(tmp_path / "a.circuit")
    counts = {"a.nnf": 200, "b.sdd": 2, "a.circuit": 200}
    for name, call in calls.items():
        with monkeypatch.context() as patch:
            patch.setattr(deadline, "clock", Clock(1.0))
            with spent(rf"{name} took"):
                call(0.5)
        assert call(600).model_count() == counts[name]
        assert call(None).model_count() == counts[name]


def test_explaining(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules.py").write_text(
        "import circuitroute as cr\nrule = cr.Exactly(3) & cr.AtMost(2).over(range(9))\n"
    )
    command = ["explain", f"{tmp_path / 'rules.py'}:rule", "-n", "20", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(deadline, "clock", Clock(1.0))
        assert main([*command, "--max-seconds", "2"]) == 2
    assert "rules.py:rule over 20 variables took" in capsys.readouterr().err
    assert main([*command, "--max-seconds", "inf"]) == 0
    assert main([*command, "--max-seconds", "0"]) == 2
    assert "max_seconds=0.0: must be a positive number" in capsys.readouterr().err
