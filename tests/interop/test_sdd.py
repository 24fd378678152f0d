"""SDDs: against independent evaluators, brute force and libsdd."""

import pytest

import circuitroute as cr
from tests.foreign import accept_cnf, accept_sdd, random_cnf
from tests.interop.files import (
    BALANCED,
    TWO_PAIRS_SDD,
    hold_to,
    libsdd,
    with_infeasible,
)


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


@pytest.mark.parametrize("kind", ["left", "right", "balanced", "vertical", "random"])
@pytest.mark.parametrize("seed", range(8))
def test_sdds_of_random_cnfs_agree_with_libsdd(tmp_path, kind, seed):
    pysdd = pytest.importorskip("pysdd.sdd")
    n = 3 + seed % 7
    cnf = random_cnf(seed, n, 2 * n)
    accept = accept_cnf(cnf, n)
    manager, formula = libsdd(pysdd, cnf, n, kind, seed)
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
    manager, formula = libsdd(pysdd, random_cnf(3, n, 34, shortest=2), n, kind, 1)
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
