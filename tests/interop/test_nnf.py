"""c2d's and d4's files: against independent evaluators, brute force and libsdd."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from tests.foreign import DecisionDnnf, accept_c2d, accept_cnf, accept_d4, random_cnf
from tests.interop.files import (
    ONE_OF_THREE_C2D,
    ONE_OF_THREE_D4,
    hold_to,
    libsdd,
    with_infeasible,
)


@pytest.mark.parametrize(
    ("text", "n", "count"),
    [
        pytest.param(ONE_OF_THREE_C2D, None, 3, id="exactly one"),
        pytest.param("c comment\n\nnnf 1 0 2\nL -2\n", None, 2, id="a literal, and a free variable"),
        pytest.param("nnf 1 0 3\nA 0\n", None, 8, id="true"),
        pytest.param("nnf 1 0 1\nL 1\n", None, 1, id="one variable"),
        pytest.param("nnf 1 0 1\nA 0\n", None, 2, id="one free variable"),
        pytest.param("nnf 2 1 2\nL 1\nA 1 0\n", 4, 8, id="and of one, wider"),
        pytest.param("nnf 4 4 2\nL 1\nO 0 0\nL 2\nO 0 3 1 0 1\n", None, 2, id="or with false branches"),
        pytest.param("nnf 4 4 2\nL 1\nO 0 0\nA 2 0 1\nO 0 2 2 0\n", None, 2, id="or with a branch that is dead below"),
        pytest.param("nnf 4 3 2\nL 1\nA 0\nA 3 0 1 1\nA 1 2\n", None, 2, id="and with true factors"),
        pytest.param("nnf 5 2 3\nL 1\nL 2\nL 3\nA 3 0 1 2\nA 2 0 1\n", None, 2, id="unreachable nodes"),
        pytest.param("nnf 5 4 2\nL 1\nL -1\nL 2\nA 2 1 2\nO 1 2 0 3\n", None, 3, id="elements of different scope"),
        pytest.param(
            "nnf 8 9 5\nL 1\nL 2\nL 3\nL 4\nL 5\nL -1\nA 5 0 1 2 3 4\nO 1 2 6 5\n", None, 17, id="and of five"
        ),
        pytest.param("nnf 3 0 2\r\nL 1\r\nL -1\r\nO 1 2 0 1\r\n", None, 4, id="other line ends, no edges counted"),
    ],
)
def test_c2d_files(nnf, text, n, count):
    circuit = nnf(text, n=n)
    accept = accept_c2d(text, circuit.n)
    assert accept.sum() == count
    hold_to(circuit, accept, circuit.n)


@pytest.mark.parametrize(
    ("text", "n", "count"),
    [
        pytest.param(ONE_OF_THREE_D4, None, 3, id="exactly one"),
        pytest.param("o 1 1 0\nt 2 0\n1 2 -2 1 0\n", None, 1, id="d4's own root"),
        pytest.param("o 1 0\nt 2 0\n1 2 0\n", 3, 8, id="true"),
        pytest.param("t 1 0\n", 1, 2, id="only true"),
        pytest.param("o 1 0\no 2 0\nf 4 0\nt 5 0\n2 4 -3 0\n2 5 3 0\n1 2 1 0\n", None, 2, id="false branches"),
        pytest.param("a 1 0\n1 2 0\n1 3 4 0\no 2 0\no 3 0\nt 9 0\n2 9 1 0\n2 9 -1 2 0\n3 9 3 0\n", None, 3, id="late"),
        pytest.param("t 2 0\no 1 0\n1 2 1 0\n1 2 -1 0\n", None, 2, id="the root is not the first"),
    ],
)
def test_d4_files(nnf, text, n, count):
    circuit = nnf(text, n=n)
    accept = accept_d4(text, circuit.n) if text[0] != "t" else np.ones(2**circuit.n, dtype=bool)
    assert accept.sum() == count
    hold_to(circuit, accept, circuit.n)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_decision_dnnfs_of_random_cnfs(tmp_path_factory, seed):
    rng = random.Random(seed)
    n = rng.randint(1, 8)
    cnf = random_cnf(seed, n, rng.randint(0, 2 * n))
    accept = accept_cnf(cnf, n)
    compiled = DecisionDnnf(cnf)
    path = tmp_path_factory.mktemp("nnf") / "circuit.nnf"
    for text, evaluate in ((compiled.c2d(n), accept_c2d), (compiled.d4(), accept_d4)):
        assert np.array_equal(evaluate(text, n), accept)
        path.write_text(text)
        circuit = with_infeasible(lambda: cr.read_nnf(str(path), n=n), accept)
        if circuit is not None:
            hold_to(circuit, accept, n)


def test_a_larger_decision_dnnf_counts_like_libsdd(nnf):
    pysdd = pytest.importorskip("pysdd.sdd")
    n = 30
    cnf = random_cnf(5, n, 36, shortest=2)
    manager, formula = libsdd(pysdd, cnf, n, "balanced", 0)
    count = manager.global_model_count(formula)
    assert count > 1000
    for text in (DecisionDnnf(cnf).c2d(n), DecisionDnnf(cnf).d4()):
        assert nnf(text, n=n).model_count() == count


def test_more_variables_are_left_free(nnf):
    for text in (ONE_OF_THREE_C2D, ONE_OF_THREE_D4):
        assert nnf(text, n=5).model_count() == 12
        with pytest.raises(ValueError, match=r"n=2: .*circuit.nnf has 3 variables; leave out n"):
            nnf(text, n=2)
    with pytest.raises(ValueError, match="n=0: must be at least 1"):
        nnf(ONE_OF_THREE_D4, n=0)
    for text in ("t 1 0\n", "nnf 1 0 0\nA 0\n"):
        with pytest.raises(ValueError, match=r"n=None: .* mentions no variables"):
            nnf(text)


def test_smoothing_shares_what_is_left_free(nnf):
    """A chain of decisions that each leave all the rest free: quadratic if every gap were filled on its own."""
    n = 64
    lines = [f"L {v}" for v in range(1, n + 1)] + [f"L {-v}" for v in range(1, n + 1)]
    lines.append(f"O {n} 2 {n - 1} {2 * n - 1}")
    for v in range(n - 1, 0, -1):
        lines += [f"A 2 {n + v - 1} {len(lines) - 1}", f"O {v} 2 {v - 1} {len(lines)}"]
    circuit = nnf("\n".join([f"nnf {len(lines)} 0 {n}", *lines]) + "\n")
    assert circuit.model_count() == 2**n
    assert circuit.num_nodes < 14 * n


def test_deep_circuits_need_no_recursion(nnf):
    depth = 20_000
    chain = "".join(f"A 1 {i}\n" for i in range(depth))
    assert nnf(f"nnf {depth + 1} {depth} 2\nL 1\n{chain}").model_count() == 2
    edges = "".join(f"{i} {i + 1} 0\n" for i in range(1, depth))
    circuit = nnf("".join(f"a {i} 0\n" for i in range(1, depth)) + f"t {depth} 0\n" + edges, n=1)
    assert circuit.model_count() == 2
    decisions = "".join(f"o {v} 0\n{v} {v + 1} {v} 0\n{v} {v + 1} {-v} 0\n" for v in range(1, 500))
    assert nnf(decisions + "t 500 0\n").model_count() == 2**499
