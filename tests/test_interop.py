"""Circuits from other compilers' files: against independent evaluators, brute force, libsdd, and every refusal."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.interop import building
from circuitroute.interop.imported import Imported
from tests.foreign import DecisionDnnf, accept_c2d, accept_cnf, accept_d4, accept_sdd, random_cnf
from tests.truth import enumerate_worlds, world_truth

# Exactly one of three variables, three times.
ONE_OF_THREE_C2D = """\
nnf 12 14 3
L 1
L -1
L 2
L -2
L 3
L -3
A 2 2 5
A 2 3 4
O 2 2 6 7
A 2 1 8
A 3 0 3 5
O 1 2 9 10
"""
ONE_OF_THREE_D4 = """\
o 1 0
o 2 0
t 3 0
2 3 1 -2 -3 0
o 4 0
4 3 2 -3 0
4 3 -2 3 0
2 4 -1 0
1 2 0
"""
# What PySDD saves for (a and b) or (c and d), on a balanced vtree.
TWO_PAIRS_SDD = """\
c ids of sdd nodes start at 0
sdd 13
L 2 0 1
L 3 2 -2
L 4 0 -1
T 5
D 1 1 2 2 3 4 5
L 7 4 3
L 8 6 4
L 9 4 -3
F 10
D 6 5 2 7 8 9 10
L 12 2 2
D 11 1 2 2 12 4 10
D 0 3 2 1 6 11 5
"""
BALANCED = "vtree 7\nL 0 1\nL 2 2\nI 1 0 2\nL 4 3\nL 6 4\nI 5 4 6\nI 3 1 5\n"


@pytest.fixture
def nnf(tmp_path):
    """Reads a text (or bytes) as an NNF file."""

    def read(text, **options):
        path = tmp_path / "circuit.nnf"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return cr.read_nnf(path, **options)

    return read


@pytest.fixture
def sdd(tmp_path):
    """Reads two texts (or bytes) as an SDD and its vtree."""

    def read(text, vtree=BALANCED, **options):
        paths = tmp_path / "circuit.sdd", tmp_path / "circuit.vtree"
        for path, content in zip(paths, (text, vtree), strict=True):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return cr.read_sdd(*paths, **options)

    return read


def hold_to(circuit, accept, n):
    """Everything a circuit says against the worlds that should be allowed."""
    worlds = torch.from_numpy(enumerate_worlds(n))
    assert circuit.n == n
    assert circuit.op == "layered"
    assert circuit.model_count() == int(accept.sum())
    assert torch.equal(circuit.satisfies(worlds), torch.from_numpy(accept))
    circuit.check()
    logits = torch.linspace(-1.5, 1.0, n, dtype=torch.float64)
    truth = world_truth(logits[None], accept)
    dist = circuit(logits)
    np.testing.assert_allclose(dist.log_partition, truth.log_partition[0], atol=1e-10)
    np.testing.assert_allclose(dist.marginals, truth.marginals[0], atol=1e-10)


def with_infeasible(read, accept):
    """What ``read`` returns, or None where it rightly says that nothing is allowed."""
    if accept.any():
        return read()
    with pytest.raises(cr.InfeasibleError, match="the circuit is false"):
        read()
    return None


# ---------------------------------------------------------------------------------------------- c2d and d4


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
    manager, formula = _libsdd(pysdd, cnf, n, "balanced", 0)
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


# ---------------------------------------------------------------------------------------------- SDDs


@pytest.mark.parametrize(
    ("text", "vtree", "count"),
    [
        pytest.param(TWO_PAIRS_SDD, BALANCED, 7, id="two pairs"),
        pytest.param("sdd 1\nT 0\n", BALANCED, 16, id="true"),
        pytest.param("sdd 1\nL 0 2 -2\n", BALANCED, 8, id="a literal"),
        pytest.param("sdd 1\nL 0 0 1\n", "vtree 1\nL 0 1\n", 1, id="one variable"),
        pytest.param("sdd 1\nT 7\n", "vtree 1\nL 3 1\n", 2, id="one free variable"),
        pytest.param("sdd 5\nL 1 0 1\nL 2 2 -2\nL 3 0 -1\nF 4\nD 0 1 2 1 2 3 4\n", BALANCED, 4, id="below the root"),
        pytest.param("sdd 3\nT 1\nL 2 4 3\nD 0 3 1 1 2\n", BALANCED, 8, id="a prime that is true"),
    ],
)
def test_sdd_files(sdd, text, vtree, count):
    circuit = sdd(text, vtree)
    accept = accept_sdd(text, circuit.n)
    assert accept.sum() == count
    hold_to(circuit, accept, circuit.n)


def _libsdd(pysdd, cnf, n, kind, seed):
    order = random.Random(seed).sample(range(1, n + 1), n)
    manager = pysdd.SddManager.from_vtree(pysdd.Vtree(var_count=n, var_order=order, vtree_type=kind))
    formula = manager.true()
    for clause in cnf:
        union = manager.false()
        for literal in clause:
            union = union | manager.literal(literal)
        formula = formula & union
    return manager, formula


@pytest.mark.parametrize("kind", ["left", "right", "balanced", "vertical", "random"])
@pytest.mark.parametrize("seed", range(8))
def test_sdds_of_random_cnfs_agree_with_libsdd(tmp_path, kind, seed):
    pysdd = pytest.importorskip("pysdd.sdd")
    n = 3 + seed % 7
    cnf = random_cnf(seed, n, 2 * n)
    accept = accept_cnf(cnf, n)
    manager, formula = _libsdd(pysdd, cnf, n, kind, seed)
    paths = tmp_path / "a.sdd", tmp_path / "a.vtree"
    formula.save(bytes(paths[0]))
    manager.vtree().save(bytes(paths[1]))
    circuit = with_infeasible(lambda: cr.read_sdd(*paths), accept)
    assert int(accept.sum()) == manager.global_model_count(formula)
    if circuit is not None:
        hold_to(circuit, accept, n)


@pytest.mark.parametrize("kind", ["right", "balanced"])
def test_a_larger_sdd_counts_like_libsdd(tmp_path, kind):
    pysdd = pytest.importorskip("pysdd.sdd")
    n = 28
    manager, formula = _libsdd(pysdd, random_cnf(3, n, 34, shortest=2), n, kind, 1)
    formula.save(bytes(tmp_path / "a.sdd"))
    manager.vtree().save(bytes(tmp_path / "a.vtree"))
    circuit = cr.read_sdd(str(tmp_path / "a.sdd"), str(tmp_path / "a.vtree"))
    assert circuit.model_count() == manager.global_model_count(formula) > 1000
    circuit.check()


def test_deep_vtrees_need_no_recursion(sdd):
    n = 1500
    leaves = "".join(f"L {v} {v}\n" for v in range(1, n + 1))
    inner = "".join(f"I {n + i} {n - i} {n + i - 1 if i > 1 else n}\n" for i in range(1, n))
    circuit = sdd("sdd 1\nL 0 7 7\n", f"vtree {2 * n - 1}\n{leaves}{inner}")
    assert circuit.model_count() == 2 ** (n - 1)


# ---------------------------------------------------------------------------------------------- what is refused


def test_a_false_circuit_is_infeasible(nnf, sdd):
    for text in ("nnf 1 0 2\nO 0 0\n", "nnf 3 2 2\nL 1\nO 0 0\nA 2 0 1\n", "f 1 0\n", "o 1 0\nf 2 0\n1 2 1 0\n"):
        with pytest.raises(cr.InfeasibleError, match=r"circuit\.nnf: the circuit is false"):
            nnf(text, n=2)
    with pytest.raises(cr.InfeasibleError, match=r"circuit\.sdd: the circuit is false"):
        sdd("sdd 1\nF 0\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nnf 3 2 2\nL 1\nL -1\nA 2 0 1\n", r"not decomposable: node 2 of .*\(line 4\) .* variables \[1\]"),
        ("nnf 2 2 2\nL 2\nA 2 0 0\n", r"not decomposable: node 1 .* variables \[2\]"),
        ("o 7 0\nt 9 0\n7 9 2 -3 3 0\n", r"not decomposable: node 7 of .*\(line 1\) .* variables \[3\]"),
        ("nnf 3 2 2\nL 1\nL 2\nO 0 2 0 1\n", r"not deterministic: two elements of node 2 of .*\(line 4\) can both"),
        ("nnf 2 2 2\nL 1\nO 1 2 0 0\n", "not deterministic: two elements of node 1 of"),
        ("nnf 3 2 1\nL 1\nA 0\nO 1 2 0 1\n", "not deterministic: two elements of node 2 of"),
        ("nnf 2 2 1\nA 0\nO 0 2 0 0\n", "not deterministic: two elements of node 1 of"),
        ("o 4 0\nt 9 0\n4 9 1 2 0\n4 9 2 3 0\n", r"not deterministic: two elements of node 4 of .*\(line 1\)"),
    ],
)
def test_violations_are_refused_by_the_files_number(nnf, text, message):
    with pytest.raises(cr.CircuitPropertyError, match=message):
        nnf(text)


def test_overlapping_primes_are_refused_by_the_files_number(sdd):
    text = TWO_PAIRS_SDD.replace("D 1 1 2 2 3 4 5", "D 1 1 2 2 3 5 5")
    with pytest.raises(
        cr.CircuitPropertyError, match=r"not deterministic: two elements of node (0|1) of .*circuit\.sdd"
    ):
        sdd(text)


def _parity_chain(order, nodes, odd):
    """Appends "an odd (or even) number of the variables" as a decision chain in an order; returns the node."""
    states = None
    for v in order:
        nodes += [f"L {v}", f"L {-v}"]
        present, absent = len(nodes) - 2, len(nodes) - 1
        if states is None:
            states = absent, present
            continue
        made = []
        for same, other in (states, states[::-1]):
            nodes += [f"A 2 {absent} {same}", f"A 2 {present} {other}", f"O {v} 2 {len(nodes)} {len(nodes) + 1}"]
            made.append(len(nodes) - 1)
        states = tuple(made)
    return states[odd]


def _both_parities(n, second_odd=True):
    """An even number of variables along one order, or an odd one along another: true, and not structured."""
    nodes = []
    even = _parity_chain(range(1, n + 1), nodes, 0)
    odd = _parity_chain([*range(2, n + 1), 1], nodes, int(second_odd))
    nodes.append(f"O 0 2 {even} {odd}")
    return "\n".join([f"nnf {len(nodes)} 0 {n}", *nodes]) + "\n", len(nodes) - 1


def test_what_literals_cannot_tell_is_enumerated_if_it_is_small(nnf):
    text, _ = _both_parities(7)
    hold_to(nnf(text), np.ones(2**7, dtype=bool), 7)
    wide = nnf(_both_parities(16)[0], n=40)
    assert wide.model_count() == 2**40
    wide.check()
    text, root = _both_parities(7, second_odd=False)
    with pytest.raises(cr.CircuitPropertyError, match=f"not deterministic: two elements of node {root} of"):
        nnf(text)


def test_what_cannot_be_verified_is_refused_and_says_so(nnf):
    text, root = _both_parities(17)
    with pytest.raises(cr.CircuitPropertyError, match=rf"cannot verify that node {root} of .* depend on 17 variables"):
        nnf(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a circuit in the format of c2d .* an empty file"),
        ("c only a comment\n", "is not a circuit"),
        ("p cnf 3 1\n1 2 3 0\n", "a CNF"),
        (TWO_PAIRS_SDD, r"an SDD \(read it with cr.read_sdd\)"),
        ("circuitroute circuit 1\n", r"a saved circuit \(read it with cr.load\)"),
        (b"\x80\x04\x95", "a Python pickle"),
        (b"PK\x03\x04abc", "a zip archive"),
        (b"\x00\xff\x00", "binary data"),
        ("hello\n", "text that begins with 'hello'"),
        ("nnf\n", r"circuit.nnf, line 1: found 'nnf', expected the header: nnf nodes edges variables"),
        ("nnf 1 0\nL 1\n", "line 1: .*expected the header"),
        ("nnf 1 0 -1\nL 1\n", "line 1: .*expected the header"),
        ("nnf 1 0 x\nL 1\n", "line 1: found 'x'"),
        ("nnf 0 0 1\n", "line 1: found '0 nodes', expected at least one node"),
        (f"nnf {10**12} {10**12} 1\nL 1\n", r"line 1: found '1000000000000 nodes', .* 1 \(is the file complete\?\)"),
        ("nnf 1 0 1\nL 1\nL -1\n", "line 1: found '1 nodes', expected as many nodes as there are, 2"),
        ("nnf 1 0 1\nL 0\n", "line 2: found 'literal 0', expected 1 to 1"),
        ("nnf 1 0 1\nL -2\n", "line 2: found 'literal -2', expected 1 to 1"),
        ("nnf 1 0 1\nL 1 2\n", "line 2: found 'L 1 2', expected L literal"),
        ("nnf 1 0 1\nX 1\n", "line 2: found 'X 1'"),
        ("nnf 2 1 1\nL 1\nA 2 0\n", "line 3: found 'A 2 0'"),
        ("nnf 2 1 1\nL 1\nO 1 1\n", "line 3: found 'O 1 1'"),
        ("nnf 2 1 1\nA 1 1\nL 1\n", "line 2: found 'child 1 of node 0', expected a node before it"),
        ("nnf 2 1 1\nL 1\nA 1 -1\n", "line 3: found 'child -1 of node 1'"),
        ("nnf 2 1 1\nL 1\nA 1 1_0\n", "line 3: found '1_0'"),
        ("nnf 2 1 1\nL 1\nA 1 --1\n", "line 3: found '1 --1'"),
        (f"nnf 1 0 1\nL {'9' * 100_000}\n", "line 2: found '9{40}...'"),
        (b"nnf 1 0 1\nL \xb2\n", r"line 2: found '\\\\xb2'"),
        ("o 1\n", "line 1: found 'o 1'"),
        ("o 1 0\nt 2 0\n1 2 1\n", "line 3: found '1 2 1', expected"),
        ("o 1 0\nt 2 0\n1 2 0 1 0\n", "line 3: found '1 2 0 1 0', expected"),
        ("o 1 0\nt 2 0\n1 2 x 0\n", "line 3: found 'x'"),
        ("o 1 0\nt 1 0\n1 1 0\n", "line 2: found 'node 1 a second time'"),
        ("o 1 0\n1 3 0\n", "line 2: found 'node 3', expected a node that is declared"),
        ("o 1 2 0\nt 2 0\n1 2 0\n", "line 1: found 'o 1 2 0'"),
        ("o -1 0\nt 2 0\n-1 2 0\n", "line 1: found 'o -1 0'"),
        (
            "o 1 0\nt 2 0\n",
            r"line 1: found 'node 1 with 0 edges from it', expected at least one \(is the file comp",
        ),
        ("o 1 0\nt 2 0\n1 2 1 0\n2 1 0\n", "line 2: found 'node 2 with 1 edges from it', expected none"),
        ("o 1 0\no 2 0\n1 2 1 0\n2 1 0\n", "line 1: found '0 nodes that no edge leads to', expected one, the root"),
        ("a 3 0\no 1 0\no 2 0\no 4 0\n1 2 1 0\n2 1 2 0\n3 1 0\n4 3 0\n", "line 2: found 'a cycle through node 1'"),
        ("t 3 0\no 1 0\no 2 0\n1 3 0\n2 3 0\n", "found '2 nodes that no edge leads to'"),
    ],
)
def test_malformed_nnf_files(nnf, text, message):
    with pytest.raises(cr.CircuitFileError, match=message):
        nnf(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "circuit.sdd is not an SDD: it looks like an empty file"),
        (ONE_OF_THREE_C2D, "is not an SDD: .* c2d's format"),
        (ONE_OF_THREE_D4, "is not an SDD: .* d4's format"),
        (BALANCED, "is not an SDD: .* a vtree"),
        ("sdd 0\n", r"line 1: found 'sdd 0', expected sdd 1"),
        ("sdd 2\nT 0\n", r"line 1: found 'sdd 2', expected sdd 1, the number of nodes \(is the file complete\?\)"),
        ("sdd x\nT 0\n", "line 1: found 'x'"),
        ("sdd 1\nT\n", "line 2: found 'T'"),
        ("sdd 1\nQ 1\n", "line 2: found 'Q 1'"),
        ("sdd 2\nT 0\nT 0\n", "line 3: found 'node 0 a second time'"),
        ("sdd 1\nL 0 2 3\n", r"line 2: found 'literal 3', expected a literal of vtree node 2, 2 or -2"),
        ("sdd 1\nL 0 1 1\n", r"line 2: found 'literal 1', expected .* a leaf of"),
        ("sdd 1\nL 0 0 0\n", "line 2: found 'literal 0'"),
        ("sdd 1\nD 0 3 0\n", "line 2: found 'D 0 3 0'"),
        ("sdd 2\nT 1\nD 0 3 2 1 1\n", "line 3: found 'D 0 3 2 1 1'"),
        (
            "sdd 2\nT 1\nD 0 2 1 1 1\n",
            r"line 3: found 'vtree node 2', expected an inner node of .*this SDD's vtree",
        ),
        ("sdd 2\nT 1\nD 0 3 1 1 2\n", "line 3: found 'node 2', expected a node before it"),
        ("sdd 3\nT 1\nL 2 4 3\nD 0 3 1 2 1\n", r"line 4: found 'node 2, at vtree node 4', expected .* vtree node 1 of"),
    ],
)
def test_malformed_sdd_files(sdd, text, message):
    with pytest.raises(cr.CircuitFileError, match=message):
        sdd(text)


@pytest.mark.parametrize(
    ("vtree", "message"),
    [
        (TWO_PAIRS_SDD, "circuit.vtree is not a vtree: it looks like an SDD"),
        ("vtree 2\nL 0 1\n", "line 1: found 'vtree 2', expected vtree 1"),
        ("vtree 1\nL 0 0\n", "line 2: found 'L 0 0'"),
        ("vtree 1\nL 0 2\n", "line 2: found 'L 0 2'"),
        ("vtree 2\nL 0 1\nL 0 2\n", "line 3: found 'L 0 2'"),
        ("vtree 3\nL 0 1\nL 2 1\nI 1 0 2\n", "line 1: found '1 roots and the variables .1, 1.', expected one root"),
        ("vtree 2\nL 0 1\nL 2 2\n", "line 1: found '2 roots"),
        ("vtree 2\nL 0 1\nI 1 0 5\n", "line 3: found 'half 5'"),
        ("vtree 2\nL 0 1\nI 1 0 0\n", "line 3: found 'I 1 0 0'"),
        ("vtree 5\nL 0 1\nL 2 2\nI 1 0 2\nL 4 3\nI 3 0 4\n", "line 6: found 'half 0', expected .* not half of another"),
        ("vtree 1\nX 0 1\n", "line 2: found 'X 0 1'"),
    ],
)
def test_malformed_vtrees(sdd, vtree, message):
    with pytest.raises(cr.CircuitFileError, match=message):
        sdd("sdd 1\nT 0\n", vtree)


def test_sizes_are_bounded(nnf, sdd, monkeypatch):
    with pytest.raises(
        cr.CircuitTooLargeError, match=r"circuit.nnf needs more than max_nodes=8 nodes .*raise max_nodes"
    ):
        nnf(ONE_OF_THREE_C2D, max_nodes=8)
    assert nnf(ONE_OF_THREE_C2D, max_nodes=20).num_nodes <= 20
    with pytest.raises(cr.CircuitTooLargeError, match=r"circuit.sdd needs more than max_nodes=8"):
        sdd(TWO_PAIRS_SDD, max_nodes=8)
    for read in (lambda **k: nnf(ONE_OF_THREE_C2D, **k), lambda **k: sdd(TWO_PAIRS_SDD, **k)):
        with pytest.raises(ValueError, match="max_nodes=0"):
            read(max_nodes=0)
    for text, n in (
        ("nnf 1 0 999999999999\nL 1\n", None),
        ("o 1 0\nt 2 0\n1 2 999999999999 0\n", None),
        ("t 1 0", 10**9),
    ):
        with pytest.raises(cr.CircuitTooLargeError, match="variables, more than the 65536 that can be read"):
            nnf(text, n=n)
    monkeypatch.setattr(building, "EDGES_PER_NODE", 0)
    with pytest.raises(cr.CircuitTooLargeError, match="max_nodes"):
        nnf(ONE_OF_THREE_C2D)


def test_missing_files_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        cr.read_nnf(tmp_path / "none.nnf")
    with pytest.raises(FileNotFoundError):
        cr.read_sdd(tmp_path / "none.sdd", str(tmp_path / "none.vtree"))


# ---------------------------------------------------------------------------------------------- what comes out


def test_the_constraint_says_where_the_circuit_came_from(nnf, sdd):
    first, again, other = nnf(ONE_OF_THREE_C2D), nnf(ONE_OF_THREE_C2D), nnf(ONE_OF_THREE_D4)
    assert first.constraint == again.constraint
    assert hash(first.constraint) == hash(again.constraint)
    assert first.constraint != other.constraint
    assert [c.constraint.format for c in (first, other, sdd(TWO_PAIRS_SDD))] == ["c2d", "d4", "sdd"]
    assert eval(repr(first.constraint), {"Imported": Imported}) == first.constraint
    with pytest.raises(AttributeError):
        first.constraint.format = "sdd"
    assert "Imported(format='c2d'" in first.summary()
    for constraint in (first.constraint, first.constraint & cr.Exactly(1)):
        with pytest.raises(cr.UnsupportedConstraintError, match="no compiler for Imported"):
            cr.compile(constraint, 3)


def test_an_imported_circuit_does_what_circuits_do(nnf):
    circuit = nnf(ONE_OF_THREE_C2D)
    same = cr.compile(cr.Exactly(1), 3)
    logits = torch.tensor([[0.3, -1.0, 2.0], [math.inf, 0.0, 1.0]], requires_grad=True)
    mine, its = circuit(logits), same(logits)
    torch.testing.assert_close(mine.marginals, its.marginals)
    torch.testing.assert_close(mine.entropy(), its.entropy())
    assert torch.equal(mine.mode, its.mode)
    assert torch.equal(mine.sample((50,)).sum(-1), torch.ones(50, 2))
    routing = cr.route(logits, circuit, key=3)
    assert routing.counts.tolist() == [1, 1]
