"""Logic: sympy Booleans and their text as constraints, against all 2^n worlds; diagrams; every error."""

import copy
import pickle
import random

import numpy as np
import pytest
import sympy
import torch
from circuitroute_compilers.bdd import ONE, ZERO, Bdd, TooManyNodesError
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.constraints.formula import combined
from tests.truth import enumerate_worlds, world_truth

MAX_N = 10
x = cr.variables(12)


def says(expr, worlds):
    """[W] bool: the meaning of a sympy Boolean on worlds [W, n], by sympy's classes and nothing of the library."""
    if isinstance(expr, sympy.Symbol):
        return worlds[:, int(expr.name[1:])]
    parts = [says(part, worlds) for part in expr.args]
    if expr in (sympy.true, sympy.false):
        return np.full(len(worlds), bool(expr))
    match expr:
        case sympy.Not():
            return ~parts[0]
        case sympy.And():
            return np.all(parts, axis=0)
        case sympy.Or():
            return np.any(parts, axis=0)
        case sympy.Xor():
            return np.sum(parts, axis=0) % 2 == 1
        case sympy.Implies():
            return ~parts[0] | parts[1]
        case sympy.Equivalent():
            return np.all(parts, axis=0) | ~np.any(parts, axis=0)
        case sympy.ITE():
            return np.where(parts[0], parts[1], parts[2])
    raise AssertionError(expr)


def formulas(n):
    """Random sympy Booleans over the first n variables."""
    leaves = st.sampled_from([*x[:n], *(~v for v in x[:n]), sympy.true, sympy.false])

    def grown(inner):
        some = st.lists(inner, min_size=1, max_size=4)
        several = st.sampled_from([sympy.And, sympy.Or, sympy.Xor, sympy.Nand, sympy.Nor, sympy.Equivalent])
        return st.one_of(
            st.builds(lambda kind, parts: kind(*parts), several, some),
            st.builds(sympy.Not, inner),
            st.builds(sympy.Implies, inner, inner),
            st.builds(sympy.ITE, inner, inner, inner),
        )

    return st.recursive(leaves, grown, max_leaves=14)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_formulas_against_all_worlds(data):
    n = data.draw(st.integers(1, MAX_N))
    expr = data.draw(formulas(n))
    worlds = enumerate_worlds(n)
    accept = says(expr, worlds)
    if not accept.any():
        with pytest.raises(cr.InfeasibleError):
            cr.compile(cr.Logic(expr), n)
        return
    circuit = cr.compile(cr.Logic(expr), n)
    circuit.check()
    assert circuit.model_count() == accept.sum()
    assert torch.equal(circuit.satisfies(torch.from_numpy(worlds)), torch.from_numpy(accept))
    logits = torch.randn(2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 3
    dist, truth = circuit(logits), world_truth(logits.numpy(), accept)
    np.testing.assert_allclose(dist.log_partition, truth.log_partition, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dist.marginals, truth.marginals, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_way_to_say_a_formula_is_read_back(data):
    n = data.draw(st.integers(1, MAX_N))
    expr = data.draw(formulas(n))
    constraint = cr.Logic(expr)
    again = eval(repr(constraint), vars(cr))
    assert again == constraint
    assert hash(again) == hash(constraint)
    worlds = enumerate_worlds(n)
    assert np.array_equal(says(constraint.expr, worlds), says(expr, worlds))
    holds = [constraint.formula.holds(world.__getitem__) for world in worlds[:64]]
    assert np.array_equal(holds, says(expr, worlds)[:64])
    whole = combined("and", constraint.formula.conjuncts())
    assert [whole.holds(world.__getitem__) for world in worlds[:64]] == holds


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scopes_rename(data):
    n = data.draw(st.integers(2, 6))
    scope = data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, n))]
    expr = data.draw(formulas(len(scope)))
    accept = says(expr, enumerate_worlds(n)[:, scope])
    constraint = cr.Logic(expr).over(scope)
    assert eval(repr(constraint), vars(cr)) == constraint
    if accept.any():
        assert cr.compile(constraint, n).model_count() == accept.sum()


def test_values():
    rule = cr.Logic(x[3] >> x[5])
    assert repr(rule) == "Logic('x3 >> x5')"
    assert rule == cr.Logic("x3 >> x5") == cr.Logic("Implies(x3, x5)") == cr.Logic("x5 << x3")
    assert rule.expr == sympy.Implies(x[3], x[5])
    assert repr(rule.over(range(10, 16))) == "Logic('x3 >> x5').over([10, 11, 12, 13, 14, 15])"
    assert cr.Logic(x[10] & x[2] & x[1]) == cr.Logic("x2 & (x1 & x10) & x2")
    assert cr.Logic("~~x1 ^ Nand(x0, x2)") == cr.Logic("Not(x0 & x2) ^ x1")
    assert cr.Logic(x[0] & x[1]) != cr.Logic(x[0] | x[1])
    for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert twin == rule
        assert hash(twin) == hash(rule)
    with pytest.raises(AttributeError):
        rule.formula = None
    assert cr.variables(2) == sympy.symbols("x0 x1")


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("x0 | x1 & x2", "x0 | (x1 & x2)"),
        ("x0 ^ x1 & x2 | x3", "(x0 ^ (x1 & x2)) | x3"),
        ("x0 & x1 >> x2", "x0 & (x1 >> x2)"),
        ("x0 >> x1 >> x2", "(x0 >> x1) >> x2"),
        ("x0 >> x1 << x2", "x2 >> (x0 >> x1)"),
        ("~x0 >> x1", "(~x0) >> x1"),
        ("Nor(x0, x1)", "~(x0 | x1)"),
        ("Xnor(x0, x1)", "~(x0 ^ x1)"),
        (" And( x0,Or(x1 , x2) ) ", "x0 & (x1 | x2)"),
    ],
)
def test_text_binds_as_python_does(text, same):
    assert cr.Logic(text) == cr.Logic(same)
    if "Xnor" not in text:
        names = {**{f"x{i}": x[i] for i in range(4)}, **{k: getattr(sympy, k) for k in ("And", "Or", "Nor")}}
        worlds = enumerate_worlds(4)
        assert np.array_equal(says(eval(text.strip(), names), worlds), says(cr.Logic(text).expr, worlds))


def test_constants():
    assert cr.compile(cr.Logic(True), 5).model_count() == 32
    assert cr.compile(cr.Logic(sympy.true) & cr.Exactly(1), 5).model_count() == 5
    assert cr.compile(cr.Logic(False) | cr.Exactly(1), 5).model_count() == 5
    assert cr.compile(~cr.Logic(False), 3).model_count() == 8
    assert cr.compile(cr.Logic("x0 | ~x0"), 3).model_count() == 8
    assert cr.Logic(True).expr == sympy.true
    with pytest.raises(cr.InfeasibleError, match=r"Logic\('False'\) is false for every subset of 5"):
        cr.compile(cr.Logic(False), 5)
    with pytest.raises(cr.InfeasibleError, match="Logic\\('x0'\\) and Logic\\('~x0'\\) contradict each other"):
        cr.compile(cr.Logic("x0 & x1 & ~x0"), 5)
    with pytest.raises(cr.InfeasibleError, match=r"Exactly\(1\) and Logic\('x0'\) and Logic\('x1'\) contradict"):
        cr.compile(cr.Exactly(1) & ~cr.Logic("~(x0 & x1)") & cr.Cost([0, 0, 0, 1, 1], at_most=1), 5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: cr.Logic(sympy.Symbol("y") & x[0]), ValueError, r"symbol y: only x0, x1.*cr.variables"),
        (lambda: cr.Logic(sympy.Symbol("x01")), ValueError, "symbol x01"),
        (lambda: cr.Logic(sympy.Dummy("x0")), TypeError, "got Dummy"),
        (lambda: cr.Logic(x[0] + 1), TypeError, r"expr=x0 \+ 1: expected a sympy Boolean.*cr.AtMost"),
        (lambda: cr.Logic(x[0] & (x[1] < 2)), TypeError, r"expr=x1 < 2, in expr=x0 & \(x1 < 2\).*StrictLessThan"),
        (lambda: cr.Logic(sympy.Eq(x[0], x[1])), TypeError, "got Equality"),
        (lambda: cr.Logic(3), TypeError, "expr=3: expected a sympy Boolean"),
        (lambda: cr.Logic(None), TypeError, "expr=None"),
        (lambda: cr.Logic([x[0]]), TypeError, "got list"),
        (lambda: cr.Logic(""), ValueError, "it ends too early"),
        (lambda: cr.Logic("x0 &"), ValueError, "it ends too early, at position 4"),
        (lambda: cr.Logic("x0 x1"), ValueError, "'x1' is one too many, at position 3"),
        (lambda: cr.Logic("x0 + x1"), ValueError, r"'\+' has no meaning in a formula, at position 3"),
        (lambda: cr.Logic("(x0 | x1"), ValueError, r"'\)' is missing"),
        (lambda: cr.Logic("Not x0"), ValueError, r"expected '\(', not 'x0'"),
        (lambda: cr.Logic("Not(x0, x1)"), ValueError, "Not takes 1 operands, not 2"),
        (lambda: cr.Logic("x01"), ValueError, "expected a variable or a formula, not 'x01'"),
        (lambda: cr.Logic("exit()"), ValueError, "not 'exit'"),
        (lambda: cr.Logic("(" * 5000), ValueError, "it ends too early, at position 5000"),
        (lambda: cr.Logic("x0, x1"), ValueError, "',' is one too many, at position 2"),
        (lambda: cr.Logic("(x0, x1)"), ValueError, r"expected '\)', not ','"),
        (lambda: cr.Logic("ITE"), ValueError, r"'\(' is missing, at position 3"),
        (lambda: cr.Logic("x0\u00a0| x1"), ValueError, "has no meaning in a formula, at position 2"),
        (lambda: cr.variables(0), ValueError, "n=0: must be at least 1"),
        (lambda: cr.variables("3"), TypeError, "n='3'"),
        (lambda: cr.Logic(x[3]).over([0, 1]), ValueError, "uses x3, so at least 4 indices"),
        (lambda: cr.compile(cr.Logic(x[8] >> x[2]), 8), ValueError, r"uses x8, but n=8: only x0 to x7.*n=9 or more"),
        (lambda: cr.compile(cr.Logic(x[1]).over([0, 9]), 8), ValueError, "uses variable 9, but n=8"),
        (lambda: cr.compile(cr.Exactly(1) | cr.Logic(x[8]), 8), ValueError, "uses x8, but n=8"),
    ],
)
def test_bad_formulas_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_nothing_is_evaluated(monkeypatch):
    monkeypatch.setattr(sympy, "sympify", None)
    monkeypatch.setattr(sympy.parsing.sympy_parser, "eval", None, raising=False)
    for text in ("__import__('os')", "x0.name", "x0[0]", "lambda: x0", "print", "x0 if x1 else x2"):
        with pytest.raises(ValueError, match="expr="):
            cr.Logic(text)


def test_formulas_of_many_parts_and_of_shared_parts():
    several = cr.variables(300)
    assert cr.compile(cr.Logic(sympy.Xor(*several)), 300).model_count() == 2**299
    assert cr.compile(cr.Logic(sympy.Or(*several)), 300).model_count() == 2**300 - 1
    chain = x[0]
    for i in range(40):  # as a tree this has 2^40 leaves
        chain = sympy.ITE(x[i % 12], chain, sympy.Not(chain, evaluate=False))
    assert len(cr.Logic(chain).formula.steps) < 200
    assert cr.compile(cr.Logic(chain), 12).model_count() > 0


def test_text_is_read_at_any_depth_and_length():
    deep = cr.Logic("x0 >> (x1 >> (" * 3000 + "x2" + "))" * 3000)
    assert eval(repr(deep), vars(cr)) == deep
    assert len(deep.formula.steps) == 6003
    nested = "ITE(x0, x1, " * 3000 + "x2" + ")" * 3000
    assert len(cr.Logic(nested).formula.steps) == 3003
    assert cr.Logic("~" * 3001 + "x0") == cr.Logic("~x0")
    several = " >> ".join(f"x{i}" for i in range(4000))
    assert len(cr.Logic(several).formula.steps) == 7999


def test_a_formula_that_is_too_large_is_refused_and_named():
    draw = random.Random(0)
    cubes = [" & ".join(f"x{v}" for v in draw.sample(range(60), 5)) for _ in range(80)]
    constraint = cr.Logic(" | ".join(cubes))
    with pytest.raises(cr.CircuitTooLargeError, match=r"Logic.*decision diagram needs more than 50000 nodes"):
        cr.compile(constraint, 60, max_nodes=10_000)


# ------------------------------------------------------------------------------------------------- diagrams


@settings(max_examples=60, deadline=None)
@given(formulas(5), st.permutations(range(5)))
def test_diagrams_are_canonical(expr, order):
    bdd = Bdd()
    bdd.allow(10_000)
    formula = cr.Logic(expr).formula
    root = bdd.of(formula, order.index)
    accept = says(expr, enumerate_worlds(5))
    assert (root == ONE) == accept.all()
    assert (root == ZERO) == (not accept.any())
    assert bdd.negation(bdd.negation(root)) == root
    assert bdd.of(cr.Logic(sympy.simplify_logic(expr)).formula, order.index) == root
    for world, allowed in zip(enumerate_worlds(5), accept, strict=True):
        node = root
        while node > ONE:
            node = bdd.high[node] if world[order[bdd.level[node]]] else bdd.low[node]
        assert node == allowed
    below = bdd.below(root)
    assert below[0] == root
    assert all(bdd.level[bdd.low[i]] > bdd.level[i] and bdd.low[i] != bdd.high[i] for i in below if i > ONE)


def test_diagrams_stop_at_their_limit():
    bdd = Bdd()
    bdd.allow(3)
    with pytest.raises(TooManyNodesError):
        bdd.of(cr.Logic("x0 ^ x1 ^ x2").formula, int)
