"""Circuits from other compilers' files: every refusal, and what comes out."""

import bz2
import gzip
import lzma
import math

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.interop import building
from circuitroute.interop.imported import Imported
from tests.interop.files import (
    BALANCED,
    ONE_OF_THREE_C2D,
    ONE_OF_THREE_D4,
    TWO_PAIRS_SDD,
    both_parities,
    hold_to,
)

# ---------------------------------------------------------------------------------------------- what is refused


def test_a_false_circuit_is_infeasible(nnf, sdd):
    for text in ("nnf 1 0 2\nO 0 0\n", "nnf 3 2 2\nL 1\nO 0 0\nA 2 0 1\n", "f 1 0\n", "o 1 0\nf 2 0\n1 2 1 0\n"):
        with pytest.raises(cr.InfeasibleError, match=r"circuit\.nnf: the circuit is false"):
            nnf(text, n=2)
    with pytest.raises(cr.InfeasibleError, match=r"circuit\.sdd: the circuit is false"):
        sdd("sdd 1\nF 0\n")


# If the first variable then the second, and if the first then the third: two decisions of one variable.
TWO_DECISIONS = "nnf 11 12 3\nL 1\nL -1\nL 2\nL 3\nA 2 0 2\nA 1 1\nA 2 0 3\nA 1 1\nO 1 2 4 5\nO 1 2 6 7\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nnf 3 2 2\nL 1\nL -1\nA 2 0 1\n", r"not decomposable: node 2 of .*\(line 4\) .* variables \[1\]"),
        ("nnf 2 2 2\nL 2\nA 2 0 0\n", r"not decomposable: node 1 .* variables \[2\]"),
        ("o 7 0\nt 9 0\n7 9 2 -3 3 0\n", r"not decomposable: node 7 of .*\(line 1\) .* variables \[3\]"),
        (f"{TWO_DECISIONS}A 2 8 9\n", r"not decomposable: node 10 of .*\(line 12\) .* variables \[1\]"),
        (f"{TWO_DECISIONS}A 2 8 8\n", r"not decomposable: node 10 .* variables \[1, 2\]"),
        (
            "a 7 0\no 8 0\nt 9 0\n7 8 2 0\n7 8 0\n8 9 1 0\n8 9 -1 3 0\n",
            r"not decomposable: node 7 of .*\(line 1\) .* variables \[1, 3\]",
        ),
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


def test_what_literals_cannot_tell_is_enumerated_if_it_is_small(nnf):
    text, _ = both_parities(7)
    hold_to(nnf(text), np.ones(2**7, dtype=bool), 7)
    wide = nnf(both_parities(16)[0], n=40)
    assert wide.model_count() == 2**40
    wide.check()
    text, root = both_parities(7, second_odd=False)
    with pytest.raises(cr.CircuitPropertyError, match=f"not deterministic: two elements of node {root} of"):
        nnf(text)


def test_what_cannot_be_verified_is_refused_and_says_so(nnf):
    text, root = both_parities(17)
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


# ---------------------------------------------------------------------------------------------- texts of other systems


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", " \t\n", "\n\nc a comment\n \n"], ids=repr)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_line_ends_and_byte_order_marks(nnf, sdd, start, end):
    for text in (ONE_OF_THREE_C2D, ONE_OF_THREE_D4):
        assert nnf(start + text.replace("\n", end).encode()).model_count() == 3
    given = (start + text.replace("\n", end).encode() for text in (TWO_PAIRS_SDD, BALANCED))
    assert sdd(*given).model_count() == 7


def test_lines_keep_their_numbers_whatever_ends_them(nnf):
    for end in ("\n", "\r\n", "\r"):
        with pytest.raises(cr.CircuitFileError, match="line 3: found 'X 1'"):
            nnf(end.join(["nnf 2 0 1", "L 1", "X 1", ""]))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(ONE_OF_THREE_C2D.encode()), r"a file that gzip compressed \(unpack it first\)"),
        (bz2.compress(ONE_OF_THREE_C2D.encode()), r"a file that bzip2 compressed \(unpack it first\)"),
        (lzma.compress(ONE_OF_THREE_C2D.encode()), r"a file that xz compressed \(unpack it first\)"),
        (ONE_OF_THREE_C2D.encode("utf-16"), "text in UTF-16"),
        (b"\xef\xbb\xbf", "an empty file"),
        ("nnf 1 0 1\nL 1\n" * 2, "line 3: found 'nnf 1 0 1', expected L literal"),
    ],
    ids=["gzip", "bzip2", "xz", "utf-16", "empty", "two files"],
)
def test_what_has_to_be_unpacked_first_is_named(nnf, data, kind):
    with pytest.raises(cr.CircuitFileError, match=kind):
        nnf(data)


def test_the_word_that_is_wrong_is_named_beside_numbers_of_the_longest_kind(nnf):
    with pytest.raises(cr.CircuitFileError, match="line 2: found 'x', expected L literal"):
        nnf(f"nnf 1 0 1\nL {'9' * 18} x\n")
    with pytest.raises(cr.CircuitFileError, match=f"line 2: found '{'9' * 19}', expected L literal"):
        nnf(f"nnf 1 0 1\nL {'9' * 19}\n")
