"""c2d's and d4's files: against independent evaluators, brute force and libsdd."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from tests.foreign import DecisionDnnf, accept_c2d, accept_cnf, accept_d4, literal_mask, random_cnf
from tests.interop.files import (
    ONE_OF_THREE_C2D,
    ONE_OF_THREE_D4,
    hold_to,
    libsdd,
    with_infeasible,
)
from tests.truth import enumerate_worlds


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


# ---------------------------------------------------------------------------------------------- repeated literals


@pytest.mark.parametrize(
    ("text", "count"),
    [
        pytest.param("nnf 4 4 2\nL 1\nL 2\nA 2 0 1\nA 2 0 2\n", 1, id="and again below"),
        pytest.param("nnf 5 5 3\nL 1\nL 2\nA 2 0 1\nL 3\nA 3 2 0 3\n", 1, id="the deeper one first"),
        pytest.param("nnf 5 6 3\nL 1\nL 2\nL 3\nA 2 0 1\nA 3 0 2 3\n", 1, id="among others"),
        pytest.param("nnf 6 6 3\nL 1\nL 2\nL 3\nA 2 0 1\nA 2 0 2\nA 2 3 4\n", 1, id="in two parts, alone in neither"),
        pytest.param(
            "nnf 8 9 3\nL 1\nL -1\nL 2\nL 3\nA 2 0 2\nA 2 1 3\nO 1 2 4 5\nA 2 0 6\n",
            2,
            id="that a decision below takes",
        ),
        pytest.param(
            "nnf 8 9 3\nL 1\nL 3\nL -3\nA 2 0 1\nA 2 0 2\nO 3 2 3 4\nL 2\nA 3 0 5 6\n", 2, id="in both branches"
        ),
        pytest.param(
            "nnf 9 9 3\nL 1\nL -1\nL 2\nL -2\nA 2 0 2\nA 2 1 3\nO 1 2 4 5\nL 3\nA 3 2 6 7\n",
            1,
            id="which decides another",
        ),
        pytest.param("o 1 0\na 2 0\no 3 0\nt 4 0\n1 2 1 0\n2 3 1 2 0\n3 4 1 3 0\n3 4 -3 2 0\n", 2, id="d4"),
        pytest.param("o 7 0\nt 9 0\n7 9 2 3 3 2 0\n", 2, id="d4, on one edge"),
        pytest.param("o 1 0\no 2 0\nt 3 0\n1 2 1 0\n2 3 -1 0\n2 3 1 2 0\n", 1, id="d4, a branch that is dead"),
    ],
)
def test_a_literal_that_is_repeated_below_counts_once(nnf, text, count):
    circuit = nnf(text)
    accept = (accept_c2d if text.startswith("nnf") else accept_d4)(text, circuit.n)
    assert accept.sum() == count
    hold_to(circuit, accept, circuit.n)


@pytest.mark.parametrize(
    "text",
    [
        "nnf 5 4 2\nL 1\nL -1\nL 2\nA 2 1 2\nA 2 0 3\n",
        "nnf 6 6 3\nL 1\nL -1\nL 2\nA 2 0 2\nA 2 1 2\nA 2 3 4\n",
        "a 1 0\no 2 0\nt 3 0\n1 2 1 0\n2 3 -1 2 0\n",
    ],
)
def test_literals_that_contradict_each_other_are_false(nnf, text):
    with pytest.raises(cr.InfeasibleError, match="the circuit is false"):
        nnf(text)


def repeated(text, rng):
    """A circuit in c2d's format, with literals that and-nodes imply added to them, or decided again above them."""
    header, *lines = text.splitlines()
    n = int(header.split()[3])
    nodes = []
    place = []  # of the old nodes

    def add(line):
        nodes.append(line)
        return len(nodes) - 1

    for line in lines:
        kind, *numbers = line.split()
        if kind == "L":
            place.append(add(line))
            continue
        children = [str(place[int(child)]) for child in numbers[1 if kind == "A" else 2 :]]
        if kind == "O":
            place.append(add(" ".join([kind, numbers[0], str(len(children)), *children])))
            continue
        at = add(f"A {len(children)} {' '.join(children)}")
        accept = accept_c2d("\n".join([f"nnf {len(nodes)} 0 {n}", *nodes]) + "\n", n)
        implied = [v for v in range(1, n + 1) if accept.any() and literal_mask(v, enumerate_worlds(n))[accept].all()]
        implied += [-v for v in range(1, n + 1) if accept.any() and literal_mask(-v, enumerate_worlds(n))[accept].all()]
        for literal in implied:
            if rng.random() < 0.5:
                at = add(f"A 2 {add(f'L {literal}')} {at}")
            if rng.random() < 0.3:  # decided again, with anything in the branch that is dead
                yes, no = add(f"L {literal}"), add(f"L {-literal}")
                other = rng.choice([v for v in range(-n, n + 1) if v and abs(v) != abs(literal)] or [-literal])
                pair = add(f"A 2 {yes} {at}"), add(f"A 2 {no} {add(f'L {other}')}")
                at = add(f"A 2 {yes} {add(f'O {abs(literal)} 2 {pair[0]} {pair[1]}')}")
        place.append(at)
    if place[-1] != len(nodes) - 1:
        add(f"A 1 {place[-1]}")
    return "\n".join([f"nnf {len(nodes)} 0 {n}", *nodes]) + "\n"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_what_is_implied_may_be_repeated(tmp_path_factory, seed):
    """Every circuit stays readable, and means the same."""
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    cnf = random_cnf(seed, n, rng.randint(1, 2 * n))
    accept = accept_cnf(cnf, n)
    text = repeated(DecisionDnnf(cnf).c2d(n), rng)
    assert np.array_equal(accept_c2d(text, n), accept)
    path = tmp_path_factory.mktemp("nnf") / "circuit.nnf"
    path.write_text(text)
    circuit = with_infeasible(lambda: cr.read_nnf(path), accept)
    if circuit is not None:
        hold_to(circuit, accept, n)


def random_nnf(rng, n):
    """Any nodes over any earlier ones: mostly neither decomposable nor deterministic."""
    lines = [f"L {v if rng.random() < 0.5 else -v}" for v in rng.choices(range(1, n + 1), k=rng.randint(1, 2 * n))]
    for _ in range(rng.randint(1, 10)):
        children = [str(rng.randrange(len(lines))) for _ in range(rng.choice([0, 1, 2, 2, 2, 3]))]
        lines.append(" ".join([rng.choice(["A", "A", "O 0"]), str(len(children)), *children]))
    return "\n".join([f"nnf {len(lines)} 0 {n}", *lines]) + "\n"


def test_no_circuit_is_read_as_another_one(tmp_path):
    """Of any circuits, those that are read mean what they say, counts included; most are refused."""
    path = tmp_path / "circuit.nnf"
    found = {"read": 0, "false": 0, "refused": 0}
    for seed in range(1500):
        rng = random.Random(seed)
        n = rng.randint(1, 4)
        text = random_nnf(rng, n)
        path.write_text(text)
        accept = accept_c2d(text, n)
        try:
            circuit = cr.read_nnf(path)
        except cr.InfeasibleError:
            assert not accept.any(), text
            found["false"] += 1
        except cr.CircuitPropertyError:
            found["refused"] += 1
        else:
            assert circuit.model_count() == accept.sum(), text
            assert np.array_equal(circuit.satisfies(torch.from_numpy(enumerate_worlds(n))).numpy(), accept), text
            found["read"] += 1
    assert min(found.values()) > 100, found


def test_repeated_literals_all_along_a_chain(nnf):
    """d4's habit, and no more nodes than without it; deeper than Python calls functions."""
    n = 2000
    lines = [f"L {v}" for v in range(1, n + 1)]
    lines.append(f"A 1 {n - 1}")
    for v in range(n - 1, 0, -1):
        lines.append(f"A 3 {v - 1} {v} {len(lines) - 1}")
    circuit = nnf("\n".join([f"nnf {len(lines)} 0 {n}", *lines]) + "\n", max_nodes=40 * n)
    assert circuit.model_count() == 1
    assert circuit.num_nodes < 3 * n
