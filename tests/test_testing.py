"""The contract suite's own tests: each of its checks fails on something that is broken, and says so."""

from types import SimpleNamespace

import numpy as np
import pytest

import circuitroute as cr
from circuitroute.testing import Case, CompilerContract
from circuitroute.testing.case import worlds
from circuitroute.testing.samples import chi_square
from circuitroute.testing.truth import contradicting_row, rows_of_logits, truth_of
from tests.broken import (
    CHECKS,
    ByIdentity,
    Careless,
    Coarse,
    Constant,
    EqualsAnything,
    Halved,
    HashesByIdentity,
    Inverted,
    Minus,
    Modeless,
    MostOfEquals,
    NeverEmpty,
    NoRepr,
    OnlyCompiledRight,
    OtherRepr,
    Truncated,
    Unconditioned,
    Unhashable,
    Unkeyed,
    at_most_one,
    circuits_of,
    compiled_by,
    contract,
    curt,
    even,
    failures,
    larger,
    literals,
    miscounting,
    moody,
    refusing,
    repeated,
    scoped,
)
from tests.test_compile import Parity
from tests.truth import enumerate_worlds, world_truth

COMPOSED = {"test_and", "test_or", "test_not", "test_contradiction", "test_over"}
SOME = Case(cr.AtMost(1), 2, lambda selected: len(selected) <= 1)

# What is broken, and by what words which check finds it: checks that are not named may pass or fail.
BROKEN = {
    "another meaning": (
        lambda: contract(Case(cr.Exactly(2), 4, lambda selected: len(selected) == 3)),
        {
            "test_machine_along_any_tree": r"Exactly\(2\) over 4 .*selecting \[0, 1\], merged from "
            "the left: expected refused, got accepted",
            "test_model_count": "expected model_count\\(\\) == 4, got 6",
            "test_satisfies": r"wrong on 10 of 16 worlds, such as the selection \[0, 1\]"
            ": expected False, got True",
            "test_count_range": "expected counts from 3 to 3, got \\(2, 2\\)",
            "test_log_partition": "got ValueError: no subset that satisfies",
            "test_not": r"~Exactly\(2\)",
            "test_and": r"AtMost\(2\)\) allows nothing: expected InfeasibleError, got Circuit",
        },
    ),
    "yet another meaning": (
        lambda: contract(Case(cr.Exactly(3), 4, lambda selected: len(selected) == 2)),
        {"test_and": r"expected a circuit for \(Exactly\(3\) & AtMost\(2\)\), got InfeasibleError"},
    ),
    "feasible where nothing is allowed": (
        lambda: contract(SOME, Case(cr.AtMost(1), 3, lambda selected: False)),
        {"test_feasibility": "AtMost.1. over 3 .* expected InfeasibleError, got Circuit"},
    ),
    "another error where nothing is allowed": (
        lambda: contract(SOME, Case(cr.EachGroup(cr.Groups(2), cr.Exactly(1)), 3, lambda selected: False)),
        {"test_feasibility": "expected InfeasibleError, got ValueError"},
    ),
    "merging that depends on the tree": (
        lambda: contract(Case(Minus(), 4, lambda selected: len(selected) == 1)),
        {
            "test_machine_along_any_tree": "merged from the left: expected",
            "test_feasibility": "expected a circuit, but compiling raised ValueError: .* not assoc",
        },
    ),
    "no hash": (
        lambda: contract(Case(Unhashable(), 3, even)),
        {
            "test_equal_constraints_hash_alike": "make it a frozen dataclass",
            "test_memoised": "Unhashable is not hashable",
        },
    ),
    "equality by identity": (
        lambda: contract(Case(ByIdentity(), 3, even)),
        {
            "test_equal_constraints_hash_alike": "expected a copy to be equal",
            "test_memoised": "expected an equal constraint to get the same circuit",
            "test_repr_evaluates_back": "expected repr to evaluate to an equal one",
        },
    ),
    "hash by identity": (
        lambda: contract(Case(HashesByIdentity(), 3, even)),
        {"test_equal_constraints_hash_alike": "expected equal constraints to have equal hashes"},
    ),
    "equal to anything": (
        lambda: contract(Case(EqualsAnything(), 3, even)),
        {"test_equal_constraints_hash_alike": "expected to differ from any other object"},
    ),
    "equality that misses a field": (
        lambda: contract(Case(Coarse(), 3, even), Case(Coarse(odd=True), 3, lambda s: not even(s))),
        {
            "test_different_constraints_are_not_equal": "allow different subsets, but compare equal",
            "test_satisfies": "wrong on 8 of 8",
        },
    ),
    "a repr that is no expression": (
        lambda: contract(Case(NoRepr(), 3, even)),
        {"test_repr_evaluates_back": "got SyntaxError: .*add what it needs to `namespace`"},
    ),
    "a repr of something else": (
        lambda: contract(Case(OtherRepr(), 3, even)),
        {"test_repr_evaluates_back": r"expected repr to evaluate to an equal one, got AtMost\(1\)"},
    ),
    "elements that overlap": (
        lambda: compiled_by(repeated),
        {
            "test_smooth_decomposable_deterministic": "got: not deterministic: two elements of node 3",
            "test_model_count": "== 8, got 12",
            "test_log_partition": r"log_partition, row 0 of the logits: expected 2\.07.*got 2\.48",
            "test_marginals": "marginals, row 0 of the logits: expected tensor.* got tensor",
            "test_gradient_of_marginals": "gradient of the marginals, row 0",
            "test_single_precision": "marginals in float32, row 0",
            "test_entropy": "entropy, row 0",
            "test_log_prob": "log_prob of the allowed worlds, row 0",
            "test_count_probs": "count_probs, row 0",
            "test_samples_follow_the_distribution": "expected 4000 samples that follow the distribution",
        },
    ),
    "a circuit over other variables": (
        lambda: compiled_by(larger),
        {"test_circuit_is_of_this_constraint": "expected circuit.n == 3, got 4"},
    ),
    "a circuit of another constraint": (
        lambda: compiled_by(lambda c, n, max_nodes: cr.compile(cr.AtLeast(0), n, max_nodes)),
        {"test_circuit_is_of_this_constraint": r"what was compiled, got AtLeast\(0\)"},
    ),
    "no circuit at all": (
        lambda: compiled_by(lambda c, n, max_nodes: SimpleNamespace(num_nodes=1)),
        {"test_circuit_is_of_this_constraint": "expected a circuitroute.Circuit, got namespace"},
    ),
    "part of the models": (
        lambda: compiled_by(scoped),
        {
            "test_satisfies": r"satisfies is wrong on 4 of 8 worlds, .*\[\]: expected True",
            "test_count_range": "from 0 to 3, got",
        },
    ),
    "counts that the graph does not have": (
        lambda: compiled_by(miscounting),
        {"test_count_range": r"from 0 to 3, got \(0, 2\)"},
    ),
    "counts with a gap": (
        lambda: compiled_by(lambda c, n, max_nodes: cr.Circuit(literals(n), c, counts=(0, n))),
        {"test_count_range": r"expected counts \(0, 1, 2, 3\), got \(0, 3\)"},
    ),
    "an error of its own for max_nodes": (
        lambda: compiled_by(refusing),
        {"test_max_nodes_is_respected": "with max_nodes=1: expected CircuitTooLargeError, got ValueError: no room"},
    ),
    "an error that does not name max_nodes": (
        lambda: compiled_by(curt),
        {"test_max_nodes_is_respected": "expected the error to name max_nodes, got: no room"},
    ),
    "another circuit each time": (
        lambda: compiled_by(moody),
        {"test_compiles_the_same_again": "expected the same circuit when compiled again, but kind differs"},
    ),
    "samples without keys": (
        lambda: circuits_of(Unkeyed),
        {"test_samples_are_functions_of_row_and_key": "the same samples drawn again with the same keys, rows"},
    ),
    "samples that are not allowed": (
        lambda: at_most_one(Inverted),
        {"test_samples_are_allowed": "expected allowed samples, got"},
    ),
    "samples that are no masks": (
        lambda: circuits_of(Halved),
        {"test_samples_are_allowed": r"expected samples of 0 and 1, got .*0\.5"},
    ),
    "samples that ignore evidence": (
        lambda: circuits_of(Unconditioned),
        {"test_samples_are_allowed": "expected samples that follow infinite logits"},
    ),
    "evidence and masks that go unchecked": (
        lambda: at_most_one(Careless),
        {
            "test_contradicting_evidence": r"evidence \[.*\] leaves nothing: expected ValueError",
            "test_log_prob": "not allowed: expected ValueError",
        },
    ),
    "no NaN where evidence leaves nothing": (
        lambda: at_most_one(NeverEmpty),
        {"test_contradicting_evidence": "expected NaN just in the first row"},
    ),
    "counts cut short": (
        lambda: circuits_of(Truncated),
        {"test_count_probs": r"count_probs has shape \(9, 3\), not \(9, 4\)"},
    ),
    "samples that are always the mode": (
        lambda: circuits_of(Constant),
        {"test_samples_follow_the_distribution": "probability 0.0e"},
    ),
    "a mode that is another of equals": (
        lambda: circuits_of(MostOfEquals),
        {"test_mode": "fewest first and then the lowest"},
    ),
    "a mode that is not": (lambda: circuits_of(Modeless), {"test_mode": "true log-probability of the mode, row"}),
    "a machine that cannot be composed": (
        lambda: contract(Case(OnlyCompiledRight(), 3, even)),
        dict.fromkeys(COMPOSED, "expected a circuit for .*OnlyCompiledRight.*, got TypeError: .*hashable"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found_in_words(name):
    make, expected = BROKEN[name]
    found = failures(make())
    for check, words in expected.items():
        assert check in found
        assert_matches(words, found[check])


def assert_matches(words, message):
    with pytest.raises(AssertionError, match=f"(?s){words}"):
        raise AssertionError(message)


def test_every_check_can_fail():
    named = {check for _, expected in BROKEN.values() for check in expected}
    assert named == set(CHECKS)


def test_only_compiled_constraints_must_say_what_composing_needs(monkeypatch):
    suite = compiled_by(lambda c, n, max_nodes: cr.Circuit(literals(n), c))
    case = suite.gathered()[0]
    suite.test_and(case)  # refused, in words
    compile_anything = cr.compile

    def curt_compile(constraint, n, max_nodes=1_000_000):
        try:
            return compile_anything(constraint, n, max_nodes)
        except cr.UnsupportedConstraintError:
            raise cr.UnsupportedConstraintError("no") from None

    monkeypatch.setattr(cr, "compile", curt_compile)
    with pytest.raises(AssertionError, match=r"says to define leaf\(var\).* got: no"):
        suite.test_and(case)


def test_a_right_compiler_passes():
    assert failures(compiled_by(lambda c, n, max_nodes: cr.Circuit(literals(n), c))) == {}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Case(3, 2, even), TypeError, "constraint=3: expected a circuitroute Constraint"),
        (lambda: Case(Parity(), 0, even), ValueError, "n=0: must be at least 1"),
        (lambda: Case(Parity(), 2.0, even), TypeError, "n=2.0"),
        (lambda: Case(Parity(), 13, even), ValueError, "n=13: must be at most 12"),
        (lambda: Case(Parity(), 3, {0}), TypeError, r"allows=\{0\}: expected a function"),
        (lambda: contract().gathered(), ValueError, "cases.. of Contract gave no case that allows any subset"),
        (lambda: contract(Case(cr.Exactly(3), 2, lambda s: False)).gathered(), ValueError, "give at least one"),
        (lambda: contract((Parity(), 3, even)).gathered(), TypeError, "expected circuitroute.testing.Case"),
        (lambda: CompilerContract().gathered(), NotImplementedError, "does not define cases"),
    ],
)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_pytest_is_handed_the_cases_by_name():
    handed = {}
    fake = SimpleNamespace(fixturenames=["case"], parametrize=lambda name, cases, ids: handed.update({name: ids}))
    suite = contract(SOME, Case(cr.Exactly(3), 2, lambda selected: False))
    suite.pytest_generate_tests(fake)
    assert handed == {"case": ["AtMost(1) over 2 variables"]}
    suite.pytest_generate_tests(SimpleNamespace(**{**vars(fake), "fixturenames": ["any_case"]}))
    assert len(handed["any_case"]) == 2
    suite.pytest_generate_tests(SimpleNamespace(**{**vars(fake), "fixturenames": ["tmp_path"]}))
    assert set(handed) == {"case", "any_case"}


@pytest.mark.parametrize("n", [1, 3, 6])
def test_its_truth_is_that_of_the_long_doubles(n):
    assert np.array_equal(worlds(n), enumerate_worlds(n))
    for allowed in (np.ones(2**n, bool), np.arange(2**n) % 3 < 2, np.arange(2**n) == 1):
        rows = rows_of_logits(allowed, n)
        got, wanted = truth_of(allowed, rows), world_truth(rows, allowed)
        for name in vars(got):
            np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-11, atol=1e-11)
        row = contradicting_row(allowed, n)
        assert (row is None) == allowed.all()
        assert row is None or np.isnan(world_truth(row[None], allowed).log_partition[0])


def test_chi_square_is_a_probability():
    rng = np.random.default_rng(0)
    p = np.array([0.6, 0.3, 0.09, 0.0099, 0.00005, 0.00005, 0.0])
    chances = [chi_square(rng.multinomial(4000, p / p.sum()).astype(float), 4000 * p / p.sum()) for _ in range(2000)]
    assert abs(np.mean(np.array(chances) < 0.1) - 0.1) < 0.027  # four standard deviations: one seed in 16,000
    assert chi_square(4000 * p[::-1], 4000 * p) == 0.0
    assert chi_square(np.array([4000.0]), np.array([4000.0])) == 1.0
