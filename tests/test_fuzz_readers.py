"""Readers of files from anywhere: whatever is done to a file, a sound circuit comes out or an error that says so.

Never another exception, never a hang: every example has a deadline far above what it takes.
"""

import re
from datetime import timedelta

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.routing.records.frames import Head
from tests.foreign import DecisionDnnf, random_cnf
from tests.interop.files import BALANCED, ONE_OF_THREE_C2D, ONE_OF_THREE_D4, TWO_PAIRS_SDD
from tests.truth import enumerate_worlds

NUMBERS = [0, 1, -1, 2, 3, 4, 5, 7, 12, 13, 255, 65_536, 2**31, 2**63, 10**18, 10**30]
FUZZ = settings(
    max_examples=250,
    deadline=timedelta(seconds=10),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

CNF = random_cnf(11, 6, 9, shortest=2)
# The beginning of a stream of records, up to which there are no tokens yet.
STREAM = Head((4, 300), log_probs=True).frame()
C2D = [ONE_OF_THREE_C2D, DecisionDnnf(CNF).c2d(6), "nnf 4 4 2\nL 1\nO 0 0\nL 2\nO 0 3 1 0 1\n"]
D4 = [ONE_OF_THREE_D4, DecisionDnnf(CNF).d4()]


@st.composite
def mutations(draw, texts):
    """A valid file with a few things done to it: numbers, words, lines and bytes changed, moved, doubled, cut off."""
    data = draw(st.sampled_from(texts)).encode()
    for _ in range(draw(st.integers(0, 4))):
        data = draw(st.sampled_from([_number, _line, _swap, _byte, _cut, _words]))(draw, data)
    return data


def _number(draw, data):
    found = list(re.finditer(rb"-?\d+", data))
    if not found:
        return data
    spot = draw(st.sampled_from(found))
    other = draw(st.sampled_from([*map(str, NUMBERS), *(match.group().decode() for match in found)]))
    return data[: spot.start()] + other.encode() + data[spot.end() :]


def _line(draw, data):
    lines = data.split(b"\n")
    at = draw(st.integers(0, len(lines) - 1))
    return b"\n".join(lines[:at] + lines[at : at + 1] * draw(st.sampled_from([0, 2])) + lines[at + 1 :])


def _swap(draw, data):
    lines = data.split(b"\n")
    a, b = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _byte(draw, data):
    if not data:
        return data
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 2)) :]


def _cut(draw, data):
    return data[: draw(st.integers(0, len(data)))]


def _words(draw, data):
    words = re.split(rb"( )", data)
    at = draw(st.integers(0, len(words) - 1))
    words[at] = draw(st.sampled_from([b"", b"L", b"A", b"O", b"o", b"a", b"t", b"D", b"T", b"I", words[at] * 2]))
    return b"".join(words)


def read_or_refuse(read):
    """The circuit, sound, or None where an error of the right kind says why there is none."""
    try:
        circuit = read()
    except (cr.CircuitRouteError, ValueError):
        return None
    circuit.check()
    if circuit.n <= 8:  # what is counted is what is there
        worlds = torch.from_numpy(enumerate_worlds(circuit.n))
        assert circuit.model_count() == int(circuit.satisfies(worlds).sum())
    return circuit


@FUZZ
@given(data=mutations(C2D), n=st.sampled_from([None, None, 3, 8]))
def test_c2d_files_that_were_tampered_with(tmp_path, data, n):
    (tmp_path / "a.nnf").write_bytes(data)
    read_or_refuse(lambda: cr.read_nnf(tmp_path / "a.nnf", n=n, max_nodes=2_000))


@FUZZ
@given(data=mutations(D4), n=st.sampled_from([None, None, 3, 8]))
def test_d4_files_that_were_tampered_with(tmp_path, data, n):
    (tmp_path / "a.nnf").write_bytes(data)
    read_or_refuse(lambda: cr.read_nnf(tmp_path / "a.nnf", n=n, max_nodes=2_000))


@FUZZ
@given(data=mutations([TWO_PAIRS_SDD]), vtree=st.one_of(st.just(BALANCED.encode()), mutations([BALANCED])))
def test_sdd_files_that_were_tampered_with(tmp_path, data, vtree):
    (tmp_path / "a.sdd").write_bytes(data)
    (tmp_path / "a.vtree").write_bytes(vtree)
    read_or_refuse(lambda: cr.read_sdd(tmp_path / "a.sdd", tmp_path / "a.vtree", max_nodes=2_000))


CLAUSES = [
    "p cnf 3 2\n1 -2 0\n2 3 0\n",
    "c t pwmc\nc p weight 1 0.3 0\np cnf 4 3\nc p weight -1 7e-1 0\nc p show 1 2 0\n1 -2\n0 3 4 0 -1 -4 0\n%\n0\n",
    "p wpcnf 5 2\nvp 1 3 0\nw 1 1/3\nw -1 2/3 0\nw 2 -1\n1 2 0\n-5 0\n",
]


@FUZZ
@given(data=st.one_of(mutations(CLAUSES), st.binary(max_size=200)))
def test_clauses_that_were_tampered_with(tmp_path, data):
    (tmp_path / "a.cnf").write_bytes(data)
    try:
        cnf = cr.read_cnf(tmp_path / "a.cnf")
    except cr.CircuitFileError:
        return
    assert eval(repr(cnf), vars(cr).copy()) == cnf
    if 1 <= cnf.n <= 8:
        read_or_refuse(lambda: cr.compile(cnf, max_nodes=2_000))


@FUZZ
@given(data=st.binary(max_size=200))
def test_binary_junk(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    for read in (cr.read_nnf, lambda path: cr.read_sdd(path, path), cr.load):
        assert read_or_refuse(lambda read=read: read(tmp_path / "a")) is None


@FUZZ
@given(data=st.binary(max_size=200), begin=st.sampled_from([b"", b"PK", b"circuitroute routing stream\n", STREAM]))
def test_binary_junk_is_no_record(tmp_path, data, begin):
    (tmp_path / "a").write_bytes(begin + data)
    for read in (cr.RoutingRecord.load, cr.replay.RecordFile):
        with pytest.raises(cr.CircuitFileError, match=re.escape(str(tmp_path / "a"))):
            read(tmp_path / "a")
    if begin == STREAM and len(data) < 8:  # which may be the beginning of a chunk
        assert len(cr.replay.RecordFile(tmp_path / "a", partial=True)) == 0


@FUZZ
@given(data=st.data())
def test_saved_files_that_were_tampered_with(tmp_path, data):
    """The checksum refuses everything but the file itself."""
    cr.compile(cr.Exactly(1).over([0, 2]), 3).save(tmp_path / "a")
    saved = (tmp_path / "a").read_bytes()
    tampered = data.draw(mutations([saved.decode("ascii")]))
    (tmp_path / "a").write_bytes(tampered)
    assert (read_or_refuse(lambda: cr.load(tmp_path / "a")) is not None) == (tampered == saved)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("nnf 3 2 3\nL 1\n" + "A 1 0 " * 200_000 + "\n", id="a very long line"),
        pytest.param("nnf 3 2 3\nL 1\nA 200000 " + "0 " * 200_000 + "\n", id="a huge arity that lies about the count"),
        pytest.param("nnf 2 200000 3\nL 1\nA 200000 " + "0 " * 200_000 + "\n", id="a huge and"),
        pytest.param("nnf 2 200000 3\nL 1\nO 0 200000 " + "0 " * 200_000 + "\n", id="a huge or"),
        pytest.param("o 1 0\n" + "".join(f"o {i} 0\n" for i in range(2, 50_000)), id="many nodes and no edges"),
        pytest.param(
            "".join(f"o {i} 0\n{i} {i + 1} 0\n" for i in range(1, 50_000)) + "o 50000 0\n50000 2 0\n", id="a long cycle"
        ),
        pytest.param("nnf 1 0 65536\nL 65536\n", id="many free variables"),
    ],
)
def test_hostile_sizes(tmp_path, text):
    (tmp_path / "a.nnf").write_text(text)
    assert read_or_refuse(lambda: cr.read_nnf(tmp_path / "a.nnf", max_nodes=10_000)) is None
