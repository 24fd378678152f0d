"""SDDs: against independent evaluators, brute force and libsdd."""

import random

import pytest

import circuitroute as cr
from tests.foreign import accept_cnf, accept_sdd, random_cnf
from tests.interop.files import (
    BALANCED,
    TWO_PAIRS_SDD,
    conjoined,
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


# ---------------------------------------------------------------------------------------------- numbers of vtree nodes


def renumbered_vtree(rng, n):
    """A vtree of random shape whose ids are not in order; and its nodes' ids by their positions from left to right."""
    leaves, free = list(range(1, n + 1)), list(range(2 * n - 1))  # libsdd reads no larger ids
    rng.shuffle(leaves)
    rng.shuffle(free)
    lines, order = [], {}

    def build(low, high):
        node = free.pop()
        if high - low == 1:
            order[2 * low] = node
            lines.append(f"L {node} {leaves[low]}")
        else:
            middle = rng.randint(low + 1, high - 1)
            halves = build(low, middle), build(middle, high)
            order[2 * middle - 1] = node
            lines.append(f"I {node} {halves[0]} {halves[1]}")
        return node

    build(0, n)
    return "\n".join([f"vtree {len(lines)}", *lines, ""]), order


def with_ids(text, order):
    """An SDD of libsdd, as a tool writes it that keeps the ids of the vtree's file."""
    rows = [line.split() for line in text.splitlines() if not line.startswith("c")]
    for row in rows:
        if row[0] in "LD":
            row[2] = str(order[int(row[2])])
    return "\n".join(" ".join(row) for row in rows) + "\n"


@pytest.mark.parametrize("seed", range(20))
def test_vtree_nodes_by_their_positions_or_by_their_ids(tmp_path, sdd, seed):
    """libsdd numbers the nodes of a vtree from left to right, whatever ids its file uses; others keep the ids."""
    pysdd = pytest.importorskip("pysdd.sdd")
    rng = random.Random(seed)
    n = rng.randint(1, 7)
    vtree, order = renumbered_vtree(rng, n)
    (tmp_path / "given.vtree").write_text(vtree)
    manager = pysdd.SddManager.from_vtree(pysdd.Vtree.from_file(str(tmp_path / "given.vtree")))
    cnf = random_cnf(seed, n, rng.randint(0, n))
    accept, formula = accept_cnf(cnf, n), conjoined(manager, cnf)
    formula.save(bytes(tmp_path / "given.sdd"))
    text = (tmp_path / "given.sdd").read_text()
    for given in (text, with_ids(text, order)):
        circuit = with_infeasible(lambda given=given: sdd(given, vtree), accept)
        if circuit is not None:
            hold_to(circuit, accept, n)


CHILDREN_FIRST = "vtree 5\nL 0 1\nL 1 2\nI 2 0 1\nL 3 3\nI 4 2 3\n"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("sdd 3\nL 1 0 1\nL 2 2 -2\nD 0 1 1 1 2\n", id="positions"),
        pytest.param("sdd 3\nL 1 0 1\nL 2 1 -2\nD 0 2 1 1 2\n", id="ids"),
        pytest.param("sdd 1\nT 0\n", id="neither matters"),
    ],
)
def test_both_numberings_without_libsdd(sdd, text):
    circuit = sdd(text, CHILDREN_FIRST)
    hold_to(circuit, accept_sdd(text, 3), 3)


def test_a_single_leaf_is_found_by_its_id_too(sdd):
    for place in (0, 3):
        assert sdd(f"sdd 1\nL 0 {place} -1\n", "vtree 1\nL 3 1\n").model_count() == 1


def test_what_fits_neither_numbering_names_both(sdd):
    wrong = "sdd 3\nL 1 0 1\nL 2 3 -2\nD 0 1 1 1 2\n"
    with pytest.raises(cr.CircuitFileError) as caught:
        sdd(wrong, CHILDREN_FIRST)
    message = str(caught.value)
    assert "does not fit" in message
    assert "from left to right, as libsdd writes them" in message
    assert "nor with the ids of that file" in message
    assert message.count("line 3") == 2
    # What is wrong in any numbering is said once.
    with pytest.raises(cr.CircuitFileError, match=r"circuit.sdd, line 2: found 'X 1 0 1', expected") as caught:
        sdd("sdd 1\nX 1 0 1\n", CHILDREN_FIRST)
    assert "numbered" not in str(caught.value)
