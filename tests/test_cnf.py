"""Clauses: the constraint, its files, its weights, and the compilers that take it."""

import copy
import itertools
import math
import pickle
import random
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from circuitroute_compilers import clauses as clause_compiler
from circuitroute_compilers import sdd as sdd_compiler
from circuitroute_compilers import sdd_process
from circuitroute_compilers.primal import best_order, candidates, primal_graph
from circuitroute_compilers.trees import balanced, leaf, met

import circuitroute as cr
from circuitroute import compilation, deadline
from circuitroute.interop.reprs import parse_constraint

pysdd = pytest.importorskip("pysdd.sdd")
COMPILERS = [None, "sdd"]


def random_clauses(n, ratio, seed, size=3):
    draw = random.Random(f"{n} {ratio} {seed}")
    return [[v * draw.choice((1, -1)) for v in draw.sample(range(1, n + 1), size)] for _ in range(round(n * ratio))]


def models(cnf, n=None):
    """All assignments that satisfy the clauses, by trying them."""
    for world in itertools.product((False, True), repeat=cnf.n if n is None else n):
        if all(any(world[abs(literal) - 1] == (literal > 0) for literal in clause) for clause in cnf.clauses):
            yield world


def weight_of(cnf, world):
    found = Fraction(1)
    for v, present in enumerate(world, start=1):
        found *= cnf.weights.get(v if present else -v, Fraction(1))
    return found


def random_weights(n, seed):
    draw = random.Random(seed)
    return {
        sign * v: f"{draw.randint(0, 9)}/{draw.randint(1, 9)}"
        for v in draw.sample(range(1, n + 1), n // 2)
        for sign in (1, -1)
    }


# ---------------------------------------------------------------------------------------------- the constraint


def test_clauses_are_kept_once_and_in_order():
    cnf = cr.CNF([[2, -1, 2], [-1, 2], [3, -3], [3]], n=4)
    assert cnf.clauses == ((-1, 2), (3,))
    assert cnf == cr.CNF([[2, -1], [3]], 4)
    assert hash(cnf) == hash(cr.CNF([[2, -1], [3]], 4))
    assert cnf != cr.CNF([[2, -1], [3]], 5)
    assert cr.CNF([[1], [-5]]).n == 5
    assert cr.CNF([]).n == 0


@pytest.mark.parametrize(
    "cnf",
    [
        cr.CNF([[1, -2], [3]], n=4),
        cr.CNF([[]], n=1),
        cr.CNF([], n=3, show=[]),
        cr.CNF([[1]], n=2, weights={1: "0.3", -1: Fraction(7, 10), 2: 1e-3, -2: -4}, show=[2]),
    ],
)
def test_the_repr_evaluates_back(cnf):
    again = eval(repr(cnf), vars(cr).copy())
    assert again == cnf
    assert repr(again) == repr(cnf)
    for copied in (pickle.loads(pickle.dumps(cnf)), copy.deepcopy(cnf)):
        assert copied == cnf
        assert hash(copied) == hash(cnf)
    with pytest.raises(AttributeError):
        cnf.n = 7


def test_circuits_of_clauses_are_saved_with_them(tmp_path):
    cnf = cr.CNF([[1, -2], [3]], n=4, weights={1: "1/3", -1: "2/3"}, show=[1, 3])
    cr.compile(cnf).save(tmp_path / "a")
    loaded = cr.load(tmp_path / "a")
    assert loaded.constraint == cnf
    assert loaded.weighted_count() == cr.compile(cnf).weighted_count()


def test_what_looks_like_a_repr_is_not_evaluated():
    assert parse_constraint("CNF([[1, -2]], n=2, weights={1: '1/2', -1: '1'})") is not None
    for text in ("CNF([[1]], n=1, weights={**{}})", "CNF([[-True]], n=1)", "CNF([[1]], n=1, weights={1: 0.5, -1: 1})"):
        assert parse_constraint(text) is None


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (([[1, 0]],), ValueError, r"clauses\[0\]: there is no literal 0"),
        (([[1], [-4]], 3), ValueError, r"clauses\[1\]: there is no literal -4: they are 1 to n=3"),
        (([[1.5]],), TypeError, r"clauses\[0\]\[0\]=1.5"),
        (([[True]],), TypeError, "got a bool"),
        (([1],), TypeError, r"clauses\[0\]=1: expected a sequence of literals"),
        (("1 2 0",), TypeError, "clauses='1 2 0': expected a sequence of clauses"),
        (([], -1), ValueError, "n=-1: must be at least 0"),
        (([[1]], None, {1: 1}), ValueError, "literal 1 has a weight and -1 has none; give both"),
        (([[1]], None, {2: 1}), ValueError, "weights: there is no literal 2"),
        (([[1]], None, {1: "one", -1: 1}), ValueError, r"weights\[1\]='one': expected a number such as"),
        (([[1]], None, {1: "1e99999", -1: 1}), ValueError, r"weights\[1\]='1e99999'"),
        (([[1]], None, {1: "1/0", -1: 1}), ValueError, r"weights\[1\]='1/0'"),
        (([[1]], None, {1: math.inf, -1: 1}), ValueError, r"weights\[1\]=inf: weights must be finite"),
        (([[1]], None, {1: Decimal("nan"), -1: 1}), ValueError, "weights must be finite"),
        (([[1]], None, {1: True, -1: 1}), TypeError, r"weights\[1\]=True: expected a number, got a bool"),
        (([[1]], None, {1: None, -1: 1}), TypeError, r"weights\[1\]=None: expected a number"),
        (([[1]], None, [1, 2]), TypeError, r"weights=\[1, 2\]: expected a mapping"),
        (([[1]], None, None, [2]), ValueError, "show: there is no variable 2"),
        (([[1]], None, None, [1, 1]), ValueError, r"show=\[1, 1\]: a variable is given twice"),
        (([[1]], None, None, 1), TypeError, "show=1: expected a sequence of variables"),
    ],
)
def test_what_is_no_cnf(arguments, error, says):
    with pytest.raises(error, match=says):
        cr.CNF(*arguments)


def test_weights_are_exact():
    cnf = cr.CNF([], 3, {1: "0.1", -1: "1e-3", 2: Decimal("0.7"), -2: np.float64(0.5), 3: "-.5", -3: 2})
    assert cnf.weights == {
        1: Fraction(1, 10),
        -1: Fraction(1, 1000),
        2: Fraction(7, 10),
        -2: Fraction(1, 2),
        3: Fraction(-1, 2),
        -3: Fraction(2),
    }
    integers = cr.CNF([], 1, {1: np.int64(2**62), -1: torch.tensor(3)})
    assert cr.compile(integers, 1).weighted_count() == 2**62 + 3
    assert {type(part) for weight in integers.weights.values() for part in (weight.numerator,)} == {int}


# ---------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("compiler", COMPILERS)
def test_many_clauses_over_many_variables_contradict_each_other(compiler):
    with pytest.raises(cr.InfeasibleError, match="no subset of 24 variables satisfies CNF"):
        cr.compile(cr.CNF(random_clauses(24, 8, 0, 3), 24), compiler=compiler)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(("n", "ratio"), [(1, 0), (3, 1.5), (7, 1), (10, 1.5), (10, 3), (12, 2), (12, 4.5)])
def test_models_are_those_found_by_trying(n, ratio, compiler):
    cnf = cr.CNF(random_clauses(n, ratio, 3, min(3, n)), n, random_weights(n, 5))
    worlds = list(models(cnf))
    if not worlds:
        with pytest.raises(cr.InfeasibleError, match=f"no subset of {n} variables satisfies CNF"):
            cr.compile(cnf, compiler=compiler)
        return
    circuit = cr.compile(cnf, compiler=compiler)
    circuit.check()
    assert circuit.model_count() == len(worlds)
    assert circuit.weighted_count() == sum(weight_of(cnf, world) for world in worlds)
    assert circuit.satisfies(torch.tensor(worlds)).all()


@pytest.mark.parametrize(("n", "ratio"), [(24, 1.5), (24, 3.5), (28, 2.5)])
def test_compilers_agree_where_trying_takes_too_long(n, ratio):
    """The clause compiler, SDDs with our vtrees, and PySDD by itself, weighted too."""
    cnf = cr.CNF(random_clauses(n, ratio, 0), n, random_weights(n, 1))
    assert clause_compiler.wide_clauses(cnf, n), "not narrow: by deciding variables"
    ours, sdd = cr.compile(cnf), cr.compile(cnf, compiler="sdd")
    manager, root = _pysdd(cnf)
    assert ours.model_count() == sdd.model_count() == root.global_model_count()
    exact = ours.weighted_count()
    assert exact == sdd.weighted_count()
    wmc = root.wmc(log_mode=False)
    for literal, weight in cnf.weighted:
        wmc.set_literal_weight(manager.literal(literal), float(weight))
    assert wmc.propagate() == pytest.approx(float(exact), rel=1e-12)
    for circuit in (ours, sdd):
        circuit.check()
        assert circuit.n == n


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [1.5, 2.5, 3.5, 4.5])
@pytest.mark.parametrize("n", [10, 20, 30, 40])
def test_compilers_agree_on_many_random_formulas(n, ratio, seed):
    cnf = cr.CNF(random_clauses(n, ratio, seed), n, random_weights(n, seed))
    manager, root = _pysdd(cnf)
    count = root.global_model_count()
    for compiler in COMPILERS:
        if not count:
            with pytest.raises(cr.InfeasibleError):
                cr.compile(cnf, compiler=compiler, max_seconds=120)
            continue
        circuit = cr.compile(cnf, compiler=compiler, max_seconds=120)
        circuit.check()
        assert circuit.model_count() == count
        wmc = root.wmc(log_mode=False)
        for literal, weight in cnf.weighted:
            wmc.set_literal_weight(manager.literal(literal), float(weight))
        assert wmc.propagate() == pytest.approx(float(circuit.weighted_count()), rel=1e-12)


def _pysdd(cnf):
    """PySDD's own diagram, over a right-linear vtree of an elimination order, a clause after the other."""
    order = best_order(primal_graph(clause_compiler._scopes(cnf.clauses))).variables[::-1]
    order += sorted(set(range(cnf.n)) - set(order))
    tree = pysdd.Vtree(var_count=cnf.n, var_order=[v + 1 for v in order], vtree_type="right")
    manager = pysdd.SddManager.from_vtree(tree)
    root = manager.true()
    for clause in sorted(cnf.clauses, key=lambda clause: -min(order.index(abs(v) - 1) for v in clause)):
        some = manager.false()
        for literal in clause:
            some |= manager.literal(literal)
        root &= some
    return manager, root


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_number_of_variables(compiler):
    cnf = cr.CNF([[1, 2]], n=3)
    assert cr.compile(cnf, compiler=compiler).model_count() == 6
    assert cr.compile(cnf, 5, compiler=compiler).model_count() == 24, "more variables are free"
    assert cr.compile(cnf & cr.Exactly(2), compiler=compiler).n == 3
    assert cr.compile(~cnf | cr.CNF([[4]]), compiler=compiler).n == 4
    with pytest.raises(ValueError, match="n=2: the CNF has 3 variables"):
        cr.compile(cnf, 2, compiler=compiler)
    with pytest.raises(ValueError, match=r"n=0: CNF\(\[\], n=0\) is over no variables"):
        cr.compile(cr.CNF([]), compiler=compiler)
    with pytest.raises(TypeError, match=r"n=None: Exactly\(2\) does not say how many variables there are; give n"):
        cr.compile(cr.Exactly(2), compiler=compiler)
    with pytest.raises(TypeError, match="give n"):
        cr.compile(cnf.over([4, 2, 1]), compiler=compiler)
    with pytest.raises(cr.CircuitTooLargeError):
        cr.compile(cr.CNF([[1]], n=10**12), compiler=compiler)


@pytest.mark.parametrize(
    ("constraint", "n"),
    [
        (cr.Cost([1, 2, 3], at_most=3), 3),
        (cr.LayerBudget(2, 3, cr.Exactly(1), cr.AtMost(2)), 6),
        (cr.EachGroup(cr.Groups([[0, 1], [2]]), cr.Exactly(1)), 3),
        (cr.ActiveGroups(cr.Groups([[0, 1], [2, 3]]), at_most=1), 4),
    ],
)
def test_constraints_that_say_how_many_variables_they_have(constraint, n):
    assert cr.compile(constraint).n == n
    assert cr.compile(constraint) is cr.compile(constraint, n)
    circuit = cr.compile(constraint)
    assert cr.compile(circuit) is circuit


@pytest.mark.parametrize("constraint", [cr.ActiveGroups(cr.Groups(2), 1), cr.EachGroup(cr.Groups(2), cr.Exactly(1))])
def test_equal_groups_divide_any_number(constraint):
    with pytest.raises(TypeError, match="give n"):
        cr.compile(constraint)


def test_clauses_over_other_variables():
    cnf = cr.CNF([[1, -2]], n=2)
    moved = cnf.over([4, 1])
    assert cr.compile(moved, 5).model_count() == 24
    assert cr.compile(moved, 5).satisfies(torch.tensor([False, True, False, False, False])).item() is False
    assert cnf.over([3, 1, 0]) == cnf.over([3, 1, 0])
    with pytest.raises(ValueError, match="at least 2 indices are needed"):
        cnf.over([3])


X = cr.variables(8)


@pytest.mark.parametrize(
    ("constraint", "n"),
    [
        (cr.Logic(X[0] ^ X[3] ^ X[5]) | cr.Exactly(2), 6),
        (cr.Logic((X[0] >> X[3]) & (X[1] | ~X[2])), 5),
        (cr.Logic("ITE(x0, x1, Equivalent(x2, x3, x4)) | (x1 & ~x4)"), 6),
        (cr.CNF([[1, 2], [3]]).over([5, 2, 0]) & ~cr.CNF([[2, 4]]), 6),
        (cr.Logic(X[0] >> X[3]) & cr.Exactly(2).over([0, 3, 5]) & ~cr.AtMost(1), 6),
        (cr.ActiveGroups(cr.Groups(3), at_most=2, at_least=1) & cr.AtLeast(2), 6),
        (~cr.ActiveGroups(cr.Groups(3), at_least=1), 6),
        (cr.LayerBudget(2, 3, cr.Exactly(1), cr.AtMost(2)) | cr.AtLeast(5), 6),
        (cr.EachGroup(cr.Groups(2), cr.Exactly(1)), 6),
        ((cr.CNF([[1]]) & cr.Exactly(1)).over([2, 0]) | cr.Exactly(0), 4),
        (cr.Logic(True), 3),
    ],
)
def test_sdds_of_all_that_is_a_formula(constraint, n):
    built_in, sdd = cr.compile(constraint, n), cr.compile(constraint, n, compiler="sdd")
    sdd.check()
    worlds = torch.tensor(list(itertools.product((False, True), repeat=n)))
    assert torch.equal(built_in.satisfies(worlds), sdd.satisfies(worlds))
    assert sdd.constraint == constraint
    logits = torch.linspace(-2, 2, n, dtype=torch.float64)
    torch.testing.assert_close(sdd(logits).marginals, built_in(logits).marginals, rtol=1e-12, atol=1e-12)


def test_what_is_no_formula_is_refused_by_name():
    for constraint in (cr.Cost([1, 2], at_most=2), cr.Exactly(1) | cr.Cost([1, 2], at_most=2)):
        with pytest.raises(cr.UnsupportedConstraintError, match="compiler='sdd' does not compile Cost"):
            cr.compile(constraint, 2, compiler="sdd")
    with pytest.raises(ValueError, match="uses variable 7, but n=3"):
        cr.compile(cr.Exactly(1).over([7]), 3, compiler="sdd")


def test_a_false_clause_and_a_contradiction():
    for compiler in COMPILERS:
        for cnf in (cr.CNF([[]], n=30), cr.CNF([[1], [-1]], n=2), cr.CNF([*random_clauses(30, 2, 0), []], 30)):
            with pytest.raises(cr.InfeasibleError):
                cr.compile(cnf, compiler=compiler)


def test_clauses_written_as_one_formula_take_the_same_way():
    cnf = cr.CNF(random_clauses(30, 2, 1), 30)
    logic = cr.Logic.of(cnf.formula)
    assert clause_compiler.wide_clauses(logic, 30)
    assert cr.compile(logic, 30).model_count() == cr.compile(cnf).model_count()
    rules = cr.Logic.of(cnf.formula) & cr.Logic(X[0] >> (X[1] | ~X[2])) & cr.Logic(~(X[3] & X[4]))
    found = cr.compile(rules, 30)
    assert clause_compiler.wide_clauses(rules, 30)
    assert found.model_count() == cr.compile(cr.CNF([*cnf.clauses, [-1, 2, -3], [-4, -5]], 30)).model_count()
    predicted = compilation.predict(cnf, 30)
    assert predicted.nodes >= cr.compile(cnf).num_nodes // 4


def test_narrow_clauses_and_other_formulas_keep_their_trees():
    chain = cr.CNF([[-v, v + 1] for v in range(1, 400)])
    assert clause_compiler.wide_clauses(chain, 400) is None
    assert cr.compile(chain).depth < 20
    for constraint in (cr.Logic(X[0] ^ X[1]), cr.Exactly(3), cr.CNF([[1, 2]])):
        assert clause_compiler.wide_clauses(constraint, 8) is None
    mixed = cr.Logic.of(cr.CNF(random_clauses(30, 2, 1), 30).formula) & cr.Logic(X[0] ^ X[1])
    assert clause_compiler.wide_clauses(mixed, 30) is None


def test_parts_that_share_nothing_and_clauses_of_many_literals():
    first, second = random_clauses(22, 3, 0), random_clauses(22, 3, 2)
    both = cr.CNF([*first, *([v + (22 if v > 0 else -22) for v in clause] for clause in second)], 44)
    counts = [cr.compile(cr.CNF(some, 22)).model_count() for some in (first, second)]
    assert cr.compile(both).model_count() == math.prod(counts) == cr.compile(both, compiler="sdd").model_count()
    long = cr.CNF([*first, list(range(1, 23)), [-v for v in range(1, 31)]], 30)
    assert cr.compile(long).model_count() == cr.compile(long, compiler="sdd").model_count()


# ---------------------------------------------------------------------------------------------- compilers by name


def test_named_compilers_are_memoised_by_name():
    cnf = cr.CNF(random_clauses(8, 2, 0), 8)
    built_in, sdd = cr.compile(cnf), cr.compile(cnf, compiler="sdd")
    assert built_in is not sdd
    assert cr.compile(cnf, 8) is built_in
    assert cr.compile(cnf, 8, compiler="sdd") is sdd


def test_a_compiler_of_ones_own_by_name():
    try:

        @cr.register_compiler(cr.CNF, name="mine")
        def compile_mine(constraint, n, max_nodes):
            return cr.compile(cr.Exactly(len(constraint.clauses)), n)

        assert cr.compile(cr.CNF([[1], [2]], 4), compiler="mine").model_count() == 6
        assert cr.compile(cr.CNF([[1], [2]], 4)).model_count() == 4
        with pytest.raises(cr.UnsupportedConstraintError, match="compiler='mine' does not compile Exactly, only CNF"):
            cr.compile(cr.Exactly(1), 4, compiler="mine")
        with pytest.raises(ValueError, match=r"CNF already has a compiler 'mine', .*compile_mine"):
            cr.register_compiler(cr.CNF, name="mine")(compile_mine)
    finally:
        compilation._named.pop("mine", None)
        compilation.clear_cache()


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("dsharp", ValueError, r"compiler='dsharp': there is no compiler of that name; the named ones are 'sdd'"),
        ("", ValueError, "compiler='': give a name, or None"),
        (3, TypeError, "compiler=3: expected the name of a compiler or None, got int"),
    ],
)
def test_names_that_are_none(name, error, says):
    with pytest.raises(error, match=says):
        cr.compile(cr.CNF([[1]]), compiler=name)


def test_without_pysdd_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(sdd_compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'circuitroute\[sdd\]'"):
        cr.compile(cr.CNF([[1, 2, 7]]), compiler="sdd")


# ---------------------------------------------------------------------------------------------- limits

HARD = cr.CNF(random_clauses(150, 2.5, 0), 150)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_time_is_bounded(compiler):
    with pytest.raises(cr.CircuitTooLargeError, match=r"max_seconds=0\.5 allows") as refused:
        cr.compile(HARD, compiler=compiler, max_seconds=0.5)
    assert ('compiler="sdd"' in str(refused.value)) == (compiler is None)
    assert not compilation._busy


def test_time_is_bounded_while_variables_are_decided():
    with pytest.raises(cr.CircuitTooLargeError, match="deciding the variables of 120 clauses; compile with compiler="):
        cr.compile(cr.CNF(random_clauses(60, 2, 0), 60), max_seconds=1)


def test_formulas_are_bounded_before_they_are_complete(monkeypatch):
    monkeypatch.setattr(sdd_process, "DEAD", 0)
    run = sdd_process._Run(pysdd.SddManager(var_count=4), [], 0)
    with pytest.raises(sdd_process.OverLimitError):
        run._formula(cr.Logic(X[0] ^ X[1] ^ X[2] ^ X[3]).formula.steps)


def test_nodes_are_bounded():
    cnf = cr.CNF(random_clauses(26, 2, 0), 26)
    for compiler in COMPILERS:
        with pytest.raises(cr.CircuitTooLargeError, match="max_nodes=50"):
            cr.compile(cnf, compiler=compiler, max_nodes=50)


def test_sets_of_clauses_are_bounded(monkeypatch):
    monkeypatch.setattr(clause_compiler, "LEAST_STATES", 200)
    monkeypatch.setattr(clause_compiler, "STATES_PER_NODE", 0)
    with pytest.raises(cr.CircuitTooLargeError, match=r"meets more than 200 sets of open ones.*compiler=.sdd"):
        cr.compile(cr.CNF(random_clauses(32, 2, 0), 32))


def test_elements_are_bounded(monkeypatch):
    monkeypatch.setattr(sdd_compiler, "LEAST_ELEMENTS", 300)
    with pytest.raises(
        cr.CircuitTooLargeError, match=r"more than 320 elements while it is made, the best after \d+ of"
    ):
        cr.compile(cr.CNF(random_clauses(28, 2, 0), 28), compiler="sdd", max_nodes=20)
    with pytest.raises(cr.CircuitTooLargeError, match="more than 320 elements"):
        cr.compile(
            cr.Logic("&".join(f"(x{i} ^ x{i + 9})" for i in range(9)) + " | x20"), 24, compiler="sdd", max_nodes=20
        )


@pytest.mark.skipif(not hasattr(sdd_process.signal, "setitimer"), reason="the memory of a process is not limited here")
def test_memory_is_bounded_and_an_end_of_the_process_is_no_end_of_ours(monkeypatch):
    monkeypatch.setattr(sdd_compiler, "BASE_BYTES", 32 << 20)
    monkeypatch.setattr(sdd_compiler, "BYTES_PER_ELEMENT", 0)
    with pytest.raises(
        cr.CircuitTooLargeError, match=r"PySDD ended with code .*its memory, 32 MiB here, is not enough"
    ):
        cr.compile(cr.CNF(random_clauses(60, 2, 0), 60), compiler="sdd", max_seconds=60)


def test_where_there_is_no_timer_the_wall_clock_counts(monkeypatch):
    monkeypatch.delattr(sdd_compiler.signal, "setitimer", raising=False)
    with pytest.raises(cr.CircuitTooLargeError, match="max_seconds=1 allows"):
        cr.compile(HARD, compiler="sdd", max_seconds=1)


def test_a_circuit_does_not_depend_on_the_budget():
    cnf = cr.CNF(random_clauses(20, 2, 4), 20)
    for compiler in COMPILERS:
        found = []
        for seconds in (5, None):
            compilation.clear_cache()
            found.append(cr.compile(cnf, compiler=compiler, max_seconds=seconds).graph)
        assert all(
            np.array_equal(getattr(found[0], name), getattr(found[1], name)) for name in ("left", "right", "kind")
        )


def test_time_of_others_is_charged():
    with deadline.within(10):
        with deadline.within(5):
            assert deadline.remaining() < 5.001
            deadline.charge(3)
            assert deadline.remaining() < 2.001
        assert deadline.remaining() < 7.001
        with pytest.raises(cr.CircuitTooLargeError, match="max_seconds=10 allows"):
            deadline.charge(8)
    assert deadline.remaining() == math.inf
    deadline.charge(1)  # nobody counts


# ---------------------------------------------------------------------------------------------- the process, in ours


def test_the_program_of_the_process(tmp_path):
    """What runs elsewhere, run here: xor, equivalence and the rest of the steps."""
    formulas = [
        cr.Logic(text).formula
        for text in (
            "x0 ^ x1 ^ x2",
            "Equivalent(x0, x3)",
            "ITE(x1, x2, ~x3)",
            "x0 >> x2",
            "True | x1",
            "x3 | ~(x1 & False)",
        )
    ]
    tree = balanced([leaf(v) for v in range(4)])
    (tmp_path / "0.in").write_text(sdd_compiler._vtree_text(tree))
    job = {
        "programs": [sdd_compiler._program(tree, formulas[:4])],
        "formulas": [formula.steps for formula in formulas],
        "elements": 1000,
        "depths": [0],
        "nodes": 1000,
    }
    job["programs"][0] += [4, 5]

    def manager(number):
        return pysdd.SddManager.from_vtree(pysdd.Vtree.from_file(str(tmp_path / f"{number}.in").encode()))

    done = sdd_process._compiled(job, manager, str(tmp_path))
    assert done["result"] == "diagram"
    whole = cr.read_sdd(tmp_path / "0.sdd", tmp_path / "0.vtree")
    worlds = torch.tensor(list(itertools.product((False, True), repeat=4)))
    wanted = [all(f.holds(lambda v, w=world: w[v]) for f in formulas) for world in worlds.tolist()]
    assert whole.satisfies(worlds).tolist() == wanted
    assert sdd_process._compiled({**job, "elements": 1}, manager, str(tmp_path))["result"] == "too large"
    false = {**job, "programs": [[sdd_process.PUSH, 0, 1]], "formulas": [[("var", [0])], [("var", [0]), ("not", [0])]]}
    assert sdd_process._compiled(false, manager, str(tmp_path)) == {"result": "false"}


def test_trees_hold_every_variable_once():
    scopes = clause_compiler._scopes(random_clauses(40, 2, 0))
    for tree in candidates(scopes):
        assert sorted(met(tree)) == sorted(primal_graph(scopes))
    assert candidates([]) == []
    wide = candidates([(1 << 300) - 1, *(3 << v for v in range(299))])
    assert [len(met(tree)) for tree in wide] == [300, 300]


# ---------------------------------------------------------------------------------------------- weights


def test_logits_weigh_subsets_as_the_weights_do():
    weights = {1: "0.2", -1: "0.8", 2: "1e-30", -2: 1, 3: "1/3", -3: "1/3", 4: 0, -4: "0.5", 5: 3, -5: 0}
    cnf = cr.CNF([[1, 2, 4], [-3, 5]], 6, weights)
    circuit = cr.compile(cnf)
    assert cnf.logits.dtype == torch.float64
    assert cnf.logits[3] == -math.inf
    assert cnf.logits[4] == math.inf
    exact = sum(weight_of(cnf, world) for world in models(cnf))
    assert circuit.weighted_count() == exact
    log_count = circuit(cnf.logits).log_partition + cnf.log_constant
    assert log_count.item() == pytest.approx(math.log(exact), rel=1e-13)
    best = max(models(cnf), key=lambda world: weight_of(cnf, world))
    assert weight_of(cnf, tuple(circuit(cnf.logits).mode.bool().tolist())) == weight_of(cnf, best)


def test_weights_nearly_equal_keep_their_difference():
    cnf = cr.CNF([], 1, {1: Fraction(10**20 + 1, 10**20), -1: 1})
    assert cnf.logits[0].item() == pytest.approx(1e-20, rel=1e-12)
    huge = cr.CNF([], 1, {1: "1e3000", -1: "1e-3000"})
    assert huge.logits[0].item() == pytest.approx(6000 * math.log(10))


def test_weights_without_logits():
    negative = cr.CNF([[1, 2]], 2, {1: "-0.5", -1: 2})
    for wanted in (lambda: negative.logits, lambda: negative.log_constant):
        with pytest.raises(ValueError, match=r"literal 1 has the weight -1/2.*weighted_count\(\) takes any"):
            wanted()
    assert cr.compile(negative).weighted_count() == Fraction(-1, 2) * 2 + 2
    nothing = cr.CNF([[1, 2]], 2, {2: 0, -2: 0})
    with pytest.raises(ValueError, match="both literals of variable 2 have the weight 0"):
        nothing.logits  # noqa: B018
    assert cr.compile(nothing).weighted_count() == 0


def test_weighted_counts_of_any_circuit():
    circuit = cr.compile(cr.Exactly(2), 3)
    assert circuit.weighted_count({1: "1/2", -1: 3, 3: 0.25, -3: 1}) == Fraction(1, 2) + Fraction(1, 8) + Fraction(3, 4)
    assert circuit.weighted_count({}) == 3
    with pytest.raises(TypeError, match=r"weights=None: Exactly\(2\) has no weights of its own; give weights"):
        circuit.weighted_count()
    with pytest.raises(ValueError, match="there is no literal 4"):
        circuit.weighted_count({4: 1, -4: 1})
    with pytest.raises(ValueError, match="give both"):
        circuit.weighted_count({-2: 1})
    assert cr.compile(cr.CNF([[1, 2]])).weighted_count() == 3


# ---------------------------------------------------------------------------------------------- projection


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [0.7, 1.5, 3, 5])
def test_projections_are_those_found_by_trying(seed, ratio):
    n = 8
    show = random.Random(seed).sample(range(1, n + 1), seed % 4 + 1)
    weights = random_weights(n, seed)
    cnf = cr.CNF(random_clauses(n, ratio, seed), n, weights, show)
    projected = cnf.projected()
    assert projected.n == len(show)
    assert projected.show is None
    wanted = {tuple(world[v - 1] for v in sorted(show)) for world in models(cnf)}
    assert set(models(projected)) == wanted
    assert {v for v in projected.weights if v > 0} == {i for i, v in enumerate(sorted(show), 1) if v in weights}


def test_projections_at_the_edges():
    cnf = cr.CNF([[1, 2], [-2]], 3)
    assert cnf.projected() is cnf
    assert cr.CNF([[1, 2], [-2]], 3, show=[]).projected() == cr.CNF([], 0)
    assert cr.CNF([[1], [-1]], 3, show=[]).projected() == cr.CNF([[]], 0)
    assert cr.CNF([[1], [-1]], 3, show=[3]).projected() == cr.CNF([[]], 1)
    hard = cr.CNF(random_clauses(60, 3, 0), 60, show=range(1, 20))
    with pytest.raises(cr.CircuitTooLargeError, match="max_clauses=500 clauses: show more variables"):
        hard.projected(max_clauses=500)
    with pytest.raises(ValueError, match="max_clauses=0"):
        hard.projected(max_clauses=0)
