"""Circuits saved and loaded: the same circuit comes back, and nothing else is ever accepted."""

import base64
import hashlib
import json
import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.constraints import And, Or
from circuitroute.inference.circuit import Circuit
from circuitroute.interop import storage
from circuitroute.interop.imported import Imported, Opaque
from circuitroute.interop.reprs import parse_constraint

X = cr.variables(8)
CONSTRAINTS = [
    (cr.Exactly(2), 4),
    (cr.AtMost(3), 5),
    (cr.AtLeast(2), 6),
    (cr.Between(1, 3), 7),
    (cr.CountIn({0, 2, 5}), 6),
    (cr.Exactly(2).over([0, 3, 4]), 6),
    (cr.Cost([1, 2, 0, 3], at_most=4), 4),
    (cr.Cost([1, 2, 0, 3], at_least=2), 4),
    (cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3), 8),
    (cr.ActiveGroups(cr.Groups([[0, 1], [2, 3, 4]]), at_most=2, at_least=1), 5),
    (cr.EachGroup(cr.Groups(2), cr.Exactly(1) | cr.Exactly(3)), 6),
    (cr.LayerBudget(2, 3, cr.Between(1, 2), cr.AtMost(3)), 6),
    (~cr.Exactly(1).over([0, 1]) & (cr.AtMost(2) | ~cr.Exactly(5)), 6),
    (cr.Logic(X[3] >> (X[5] & ~X[0])), 6),
    (cr.Exactly(1), 1),
    (cr.AtMost(1), 1),
]


@dataclass(frozen=True)
class Even(cr.Constraint):
    """A user's constraint."""

    def leaf(self, var):
        return 0, 1

    def merge(self, left, right):
        return (left + right) % 2

    def accepts(self, state):
        return state == 0


class SubclassOfExactly(cr.Exactly):
    """Inherits a built-in repr that does not say what it is."""

    def allows(self, count):
        return count == self.k + 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.circuit"


def resealed(body):
    """Lines before the checksum, with a right checksum."""
    return body + b"sha256 " + hashlib.sha256(body).hexdigest().encode() + b"\n"


def changed(data, header=None, **arrays):
    """A saved file with parts replaced, and a right checksum."""
    lines = data.split(b"\n")[:-2]
    if header is not None:
        lines[1] = json.dumps({**json.loads(lines[1]), **header}).encode()
    for i, (name, dtype) in enumerate(storage._ARRAYS.items()):
        if name in arrays:
            numbers = np.array(arrays[name], dtype=dtype)
            lines[2 + i] = name.encode() + b" " + base64.b64encode(numbers.tobytes())
    return resealed(b"\n".join(lines) + b"\n")


def assert_same(loaded, circuit):
    assert loaded is not circuit
    assert (loaded.n, loaded.counts, loaded.op) == (circuit.n, circuit.counts, circuit.op)
    assert loaded.engine_for("cpu") == circuit.engine_for("cpu")
    for name, dtype in storage._ARRAYS.items():
        mine, its = getattr(loaded.graph, name), getattr(circuit.graph, name)
        assert np.array_equal(mine, its)
        assert mine.dtype == np.dtype(dtype).newbyteorder("=")
        assert not mine.flags.writeable
    logits = torch.linspace(-1, 1, 3 * circuit.n).reshape(3, circuit.n)
    mine, its = loaded(logits), circuit(logits)
    assert torch.equal(mine.log_partition, its.log_partition)
    assert torch.equal(mine.marginals, its.marginals)
    assert torch.equal(mine.sample((4,), key=7), its.sample((4,), key=7))
    assert torch.equal(mine.mode, its.mode)
    assert loaded.model_count() == circuit.model_count()


# ---------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(("constraint", "n"), CONSTRAINTS, ids=lambda c: repr(c)[:40])
def test_what_is_loaded_is_what_was_saved(path, constraint, n):
    circuit = cr.compile(constraint, n)
    circuit.save(str(path))
    loaded = cr.load(path)
    assert loaded.constraint == constraint
    assert_same(loaded, circuit)
    assert_same(cr.load(str(path)), circuit)


def test_saving_is_deterministic_and_replaces_what_is_there(path):
    path.write_text("something else")
    cr.compile(cr.Exactly(2), 5).save(path)
    first = path.read_bytes()
    cr.load(path).save(path)
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    cr.compile(cr.Exactly(2), 5).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cr.compile(cr.Exactly(3), 5).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_missing_places(path):
    with pytest.raises(FileNotFoundError):
        cr.load(path)
    with pytest.raises(FileNotFoundError):
        cr.compile(cr.Exactly(2), 5).save(path / "deeper" / "a.circuit")


def test_imported_circuits_travel(path):
    source = path.with_name("a.nnf")
    source.write_text("nnf 5 4 2\nL 1\nL -1\nL 2\nA 2 1 2\nO 1 2 0 3\n")
    circuit = cr.read_nnf(source)
    circuit.save(path)
    loaded = cr.load(path)
    assert isinstance(loaded.constraint, Imported)
    assert loaded.constraint == circuit.constraint
    assert_same(loaded, circuit)


@pytest.mark.parametrize("constraint", [Even(), Even() & cr.AtMost(2), SubclassOfExactly(1), Even().over([0, 2, 3])])
def test_a_constraint_of_ones_own_becomes_a_placeholder_that_says_so(path, constraint):
    circuit = cr.compile(constraint, 4)
    circuit.save(path)
    loaded = cr.load(path)
    assert loaded.constraint == Opaque(repr(constraint))
    assert hash(loaded.constraint) == hash(Opaque(repr(constraint)))
    assert_same(loaded, circuit)
    loaded.save(path)
    assert cr.load(path).constraint == loaded.constraint
    with pytest.raises(cr.UnsupportedConstraintError, match="no compiler for Opaque"):
        cr.compile(loaded.constraint, 4)


def test_a_forced_engine_is_not_saved(path):
    cr.compile(cr.Exactly(2), 5).with_engine("naive").save(path)
    assert cr.load(path).engine_for("cpu") == cr.compile(cr.Exactly(2), 5).engine_for("cpu")


def test_a_circuit_that_cannot_be_judged_is_loaded_all_the_same(path, monkeypatch):
    """Determinism is verified where it can be decided; whoever compiled the circuit vouches for the rest."""
    from circuitroute.circuit.verify import conflicts
    from tests.interop.files import both_parities

    source = path.with_name("a.nnf")
    source.write_text(both_parities(7)[0])
    circuit = cr.read_nnf(source)
    circuit.save(path)
    monkeypatch.setattr(conflicts, "MAX_ENUMERATED", 3)
    with pytest.raises(cr.CircuitPropertyError, match="cannot verify"):
        circuit.check()
    assert cr.load(path).model_count() == 2**7


def test_the_cache_of_compile_is_left_alone(path):
    circuit = cr.compile(cr.Exactly(2), 9)
    circuit.save(path)
    assert cr.load(path) is not circuit
    assert cr.compile(cr.Exactly(2), 9) is circuit


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("flip", [1, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (0x20, 0xFF))])
@pytest.mark.parametrize("constraint", [cr.Exactly(1), cr.Exactly(1).over([0, 1])])
def test_every_flipped_byte_is_noticed(path, constraint, flip):
    cr.compile(constraint, 3).save(path)
    data = path.read_bytes()
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= flip
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            cr.load(path)


def test_every_truncation_and_every_addition_is_noticed(path):
    cr.compile(cr.Exactly(1), 3).save(path)
    data = path.read_bytes()
    for broken in [*(data[:at] for at in range(len(data))), data + b"\n", data + data, b"\n" + data, data + b"x"]:
        path.write_bytes(broken)
        with pytest.raises(cr.CircuitFileError, match=re.escape(str(path))):
            cr.load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a saved circuit: it looks like an empty file"),
        (b"nnf 1 0 1\nL 1\n", r"it looks like an NNF circuit in c2d's format \(read it with cr.read_nnf\)"),
        (b"o 1 0\nt 2 0\n1 2 0\n", "it looks like an NNF circuit in d4's format"),
        (b"c a comment\nsdd 1\nT 0\n", "it looks like an SDD"),
        (b"vtree 1\nL 0 1\n", "it looks like a vtree"),
        (b"\x80\x04\x95\x00", "it looks like a Python pickle"),
        (b"PK\x03\x04....", "it looks like a zip archive, such as torch.save writes"),
        (b"\x10\0\0\0\0\0\0\0{}", "it looks like binary data"),
        (b"circuitroute circuit 2\n{}\n", "of version 2, and this circuitroute reads version 1: update circuitroute"),
        (b"circuitroute circuit one\n", "is damaged: its first line gives no version"),
        (b"circuitroute circuit 01\n", "is damaged: its first line gives no version"),
        (b"circuitroute circuit 1\n{}\n", "is damaged: its checksum is wrong or missing"),
        (resealed(b"circuitroute circuit 1\n{}\n"), "has 2 lines before its checksum, expected 7"),
    ],
)
def test_what_is_no_saved_circuit(path, data, message):
    path.write_bytes(data)
    with pytest.raises(cr.CircuitFileError, match=message):
        cr.load(path)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        cr.load(tmp_path)


# A circuit by hand, for "exactly one of two": nodes 0 to 3 are literals, 4 is the sum.
KIND, VARIABLE, FIRST, LEFT, RIGHT = [1, 2, 1, 2, 3], [0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 2], [0, 1], [3, 2]
BASE = {"kind": KIND, "variable": VARIABLE, "first": FIRST, "left": LEFT, "right": RIGHT}
HEADER = {"n": 2, "nodes": 5, "elements": 2, "counts": [1], "constraint": "Exactly(1)", "builtin": True}


@pytest.fixture
def data(path):
    cr.compile(cr.Exactly(1), 2).save(path)
    return path.read_bytes()


def test_the_circuit_by_hand_is_one(path, data):
    path.write_bytes(changed(data, HEADER, **BASE))
    assert cr.load(path).model_count() == 2


@pytest.mark.parametrize(
    ("header", "arrays", "message"),
    [
        ({"extra": 1}, {}, "line 2: expected an object with n, nodes, elements, counts, constraint, builtin"),
        ({"n": 0}, {}, "line 2: expected whole numbers"),
        ({"n": 2.0}, {}, "line 2: expected whole numbers"),
        ({"n": True}, {}, "line 2: expected whole numbers"),
        ({"nodes": -1}, {}, "line 2: expected whole numbers"),
        ({"nodes": 10**12}, {}, "line 2: expected whole numbers"),
        ({"counts": []}, {}, "line 2: expected whole numbers"),
        ({"counts": [1, 1]}, {}, "line 2: expected whole numbers"),
        ({"counts": ["1"]}, {}, "line 2: expected whole numbers"),
        ({"counts": 1}, {}, "line 2: expected whole numbers"),
        ({"constraint": 3}, {}, "line 2: expected whole numbers"),
        ({"builtin": 1}, {}, "line 2: expected whole numbers"),
        ({"nodes": 6}, {}, "the array kind has 5 bytes, expected 6 numbers of type u1"),
        ({"elements": 3}, {}, "the array left has 8 bytes, expected 3 numbers of type i4"),
        ({"nodes": 0, "elements": 0}, {"kind": [], "variable": [], "first": [0], "left": [], "right": []}, "no nodes"),
        ({"n": 5}, {}, "there are more variables than literals"),
        ({}, {"kind": [1, 2, 1, 2, 4]}, "a node is of an unknown kind"),
        ({}, {"variable": [0, 0, 1, 2, -1]}, "a literal has no variable in 0..n-1"),
        ({}, {"variable": [0, 0, 1, -1, -1]}, "a literal has no variable in 0..n-1"),
        ({}, {"variable": [0, 0, 1, 1, 0]}, "a literal has no variable in 0..n-1, or another node has one"),
        ({}, {"first": [0, 0, 0, 0, 0, 3]}, "the elements do not belong to the nodes in order"),
        ({}, {"first": [0, 0, 3, 0, 0, 2]}, "the elements do not belong to the nodes in order"),
        ({}, {"first": [1, 0, 0, 0, 0, 2]}, "the elements do not belong to the nodes in order"),
        ({}, {"first": [0, 0, 0, 0, 1, 2]}, "a sum has no elements, or another node has some"),
        ({}, {"kind": [1, 2, 1, 3, 3], "variable": [0, 0, 1, -1, -1]}, "a sum has no elements"),
        ({}, {"left": [0, 4]}, "a node comes before its child"),
        ({}, {"right": [3, -1]}, "a node comes before its child"),
        ({}, {"right": [3, 0]}, "not decomposable|not smooth"),
        ({"counts": [1, 3]}, {}, "the count 3 is larger than n=2"),
        ({"counts": [0]}, {}, "the allowed counts are not those of the circuit"),
        ({"counts": [0, 1]}, {}, "the allowed counts are not those of the circuit"),
        ({}, {"left": [0, 1], "right": [2, 3]}, "the allowed counts are not those of the circuit"),
        ({}, {"left": [0, 0], "right": [2, 2]}, "not deterministic: two elements of node 4"),
    ],
)
def test_a_file_with_a_right_checksum_must_be_a_circuit(path, data, header, arrays, message):
    path.write_bytes(changed(data, {**HEADER, **header}, **{**BASE, **arrays}))
    with pytest.raises(cr.CircuitFileError, match=message) as caught:
        cr.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, b"[1]", "line 2: expected an object"),
        (1, b"{", "line 2: expected an object in JSON"),
        (1, b"[" * 100_000, "line 2: expected an object in JSON"),
        (1, b"\xff", "line 2: expected an object in JSON"),
        (2, b"knd AAAA", "expected the array kind"),
        (2, b"kind A?AA", "the array kind is not base64"),
        (3, b"variable AAAA", "the array variable has 3 bytes, expected 5 numbers of type i4"),
    ],
)
def test_lines_that_are_not_what_they_should_be(path, data, line, text, message):
    lines = data.split(b"\n")[:-2]
    lines[line] = text
    path.write_bytes(resealed(b"\n".join(lines) + b"\n"))
    with pytest.raises(cr.CircuitFileError, match=message):
        cr.load(path)


# ---------------------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize("constraint", [constraint for constraint, _ in CONSTRAINTS], ids=lambda c: repr(c)[:40])
def test_reprs_are_read_back(constraint):
    assert parse_constraint(repr(constraint)) == constraint


def test_long_chains_are_read_back():
    parts = [cr.Exactly(1).over([i]) for i in range(150)]
    for whole in (And(parts), Or(parts)):
        assert parse_constraint(repr(whole)) == whole


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "None",
        "Groups(2)",
        "Exactly",
        "Exactly(2",
        "Exactly(2) ",
        "Exactly(k=2)",
        "Exactly(-1)",
        "Exactly('2')",
        "Exactly(2.0)",
        "Exactly(True)",
        "Exactly(1 + 1)",
        "Exactly(*[2])",
        "Exactly(**{'k': 2})",
        "Exactly(2).over([0]).allows(1)",
        "Exactly(2).over(range(4))",
        "Exactly(2).over([0], [1])",
        "Exactly(2) & 3",
        "Exactly(2) ^ Exactly(3)",
        "~3",
        "Nothing(2)",
        "Constraint()",
        "__import__('os').system('true')",
        "(lambda: Exactly(2))()",
        "[Exactly(2) for _ in [0]][0]",
        "Exactly(2) if True else Exactly(3)",
        "Exactly((k := 2))",
        "Logic('x3 +')",
        "~" * 100_000 + "Exactly(2)",
        "(" * 5_000 + "Exactly(2)" + ")" * 5_000,
        "Exactly(" + "9" * 10_000 + ")",
        "Exactly(2)\x00",
        "Opaque('" + "x" * (1 << 22) + "')",
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_repr_of_a_built_in_constraint_is_not_read(text):
    assert parse_constraint(text) is None


def test_a_loaded_text_is_never_run(path, data, tmp_path):
    target = tmp_path / "made"
    text = f"__import__('pathlib').Path({str(target)!r}).touch()"
    path.write_bytes(changed(data, {"constraint": text}))
    assert cr.load(path).constraint == Opaque(text)
    assert not target.exists()


def test_the_facade_and_the_method_are_the_same_thing(tmp_path):
    circuit = cr.compile(cr.Exactly(2), 4)
    storage.save(circuit, tmp_path / "a")
    circuit.save(Path(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert isinstance(cr.load(tmp_path / "a"), Circuit)


# ---------------------------------------------------------------------------------------------- where a file is written


class Named:
    """A path of another kind."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return os.fspath(self.path)


def _record(path, marker):
    cr.RoutingRecord.of(torch.ones(marker, 3, dtype=torch.bool)).save(path)


def _drawn(path, marker):
    pytest.importorskip("matplotlib")
    cr.compile(cr.Exactly(1), marker).draw(path)


def _exported(path, marker):
    from circuitroute.integrations import serving

    serving.export(serving.routing_function(cr.Exactly(1), marker), path, topk=1, renormalize=False)


# What writes files: (path, a number that makes a difference).
WRITERS = {
    "circuit.svg": _drawn,
    "a.circuit": lambda path, marker: cr.compile(cr.Exactly(1), marker).save(path),
    "a.npz": _record,
    "a.pt2": _exported,
}
EACH = pytest.mark.parametrize("name", WRITERS)


def _entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


@EACH
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_a_link_stays_and_its_target_is_written(tmp_path, name, relative):
    (tmp_path / "links").mkdir()
    (tmp_path / "files").mkdir()
    target, link = tmp_path / "files" / name, tmp_path / "links" / name
    link.symlink_to(Path("..", "files", name) if relative else target)
    for marker in (2, 3):  # dangling at first
        WRITERS[name](link, marker)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert target.read_bytes() == link.read_bytes()
    # A link to a link, and the folder a link too.
    (tmp_path / "folder").symlink_to(tmp_path / "links")
    (tmp_path / f"b{name}").symlink_to(Path("folder", name))
    before = target.read_bytes()
    WRITERS[name](tmp_path / f"b{name}", 4)
    assert target.read_bytes() != before
    assert (tmp_path / f"b{name}").is_symlink()
    assert _entries(tmp_path / "files") == _entries(tmp_path / "links") == [name]
    assert _entries(tmp_path) == sorted(["files", "links", "folder", f"b{name}"])


@EACH
def test_links_that_lead_nowhere_are_refused_by_name(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(OSError, match=r"symbolic links|Too many levels") as caught:
        WRITERS[name](tmp_path / name, 2)
    assert caught.value.filename == str(tmp_path / name)
    (tmp_path / f"b{name}").symlink_to(tmp_path / "missing" / name)
    with pytest.raises(FileNotFoundError) as caught:
        WRITERS[name](tmp_path / f"b{name}", 2)
    assert caught.value.filename == str(tmp_path / f"b{name}")
    assert _entries(tmp_path) == sorted([name, f"b{name}"])


@EACH
def test_permissions_are_kept_and_new_files_have_the_usual_ones(tmp_path, name):
    path, usual = tmp_path / name, tmp_path / "usual"
    usual.touch()
    WRITERS[name](path, 2)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    for mode in (0o600, 0o664, 0o777, 0o640):
        path.chmod(mode)
        WRITERS[name](path, 3)
        assert stat.S_IMODE(path.stat().st_mode) == mode


@EACH
def test_directories_are_refused_by_name(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        WRITERS[name](tmp_path / name, 2)
    assert caught.value.filename == str(tmp_path / name)
    (tmp_path / f"b{name}").symlink_to(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        WRITERS[name](tmp_path / f"b{name}", 2)
    assert _entries(tmp_path) == sorted([name, f"b{name}"])
    assert _entries(tmp_path / name) == []


@EACH
def test_files_that_may_not_be_written_are_left_alone(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"mine")
    path.chmod(0o444)
    access = os.access
    # What the superuser may do says nothing about others.
    monkeypatch.setattr(os, "access", lambda at, how: bool(os.stat(at).st_mode & 0o222) and access(at, how))
    with pytest.raises(PermissionError) as caught:
        WRITERS[name](path, 2)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"mine"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert _entries(tmp_path) == [name]


@EACH
def test_a_file_below_a_file_is_refused_by_name(tmp_path, name):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(NotADirectoryError) as caught:
        WRITERS[name](tmp_path / "file" / name, 2)
    assert caught.value.filename == str(tmp_path / "file" / name)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert _entries(tmp_path) == ["file"]


@EACH
@pytest.mark.parametrize("kind", [str, os.fsencode, Named, lambda path: Named(os.fsencode(path))])
def test_paths_of_any_kind(tmp_path, name, kind):
    WRITERS[name](kind(tmp_path / name), 2)
    assert _entries(tmp_path) == [name]


@EACH
def test_what_is_no_path_is_refused(tmp_path, name):
    with (tmp_path / "open").open("wb") as file:
        for wrong, message in ((file, "give its name, not the open file"), (3, "got int"), (None, "got NoneType")):
            if wrong is None and name == "a.pt2":
                continue  # where it means that no file is written
            with pytest.raises(
                TypeError, match=rf"path=.*: expected a path \(str, bytes or os.PathLike\), .*{message}"
            ):
                WRITERS[name](wrong, 2)
    for wrong in ("", b"", "a\0b"):
        with pytest.raises(ValueError, match=r"path=.*: expected the path of a file"):
            WRITERS[name](wrong, 2)
    assert (tmp_path / "open").read_bytes() == b""
    with pytest.raises(TypeError, match=r"path=.*: expected a path"):
        cr.load(3)
    with pytest.raises(TypeError, match=r"path=.*: expected a path"):
        cr.RoutingRecord.load(None)
    with pytest.raises(TypeError, match=r"path=.*: expected a path"):
        cr.read_nnf(3)
    (tmp_path / "a.sdd").write_text("sdd 1\nT 0\n")
    with pytest.raises(TypeError, match=r"vtree=.*: expected a path"):
        cr.read_sdd(os.fsencode(tmp_path / "a.sdd"), 3)


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    name = "a" * os.pathconf(tmp_path, "PC_NAME_MAX")
    cr.compile(cr.Exactly(1), 3).save(tmp_path / name)
    assert cr.load(tmp_path / name).n == 3


def test_other_hard_links_keep_what_the_file_held_before(tmp_path):
    """The price of replacing a file in one step; said in the documentation."""
    cr.compile(cr.Exactly(1), 3).save(tmp_path / "a")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    cr.compile(cr.Exactly(1), 4).save(tmp_path / "a")
    assert (cr.load(tmp_path / "a").n, cr.load(tmp_path / "b").n) == (4, 3)


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    cr.compile(cr.Exactly(1), 3).save(tmp_path / "pipe")
    reader.join()
    (tmp_path / "copy").write_bytes(found[0])
    assert cr.load(tmp_path / "copy").n == 3
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_of_many_writers_one_wins_whole(tmp_path):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to("target")
    circuits = [cr.compile(cr.Exactly(1), n) for n in range(3, 9)]

    def write(circuit):
        for _ in range(10):
            circuit.save(link)
            assert cr.load(link).n in range(3, 9)

    threads = [threading.Thread(target=write, args=(circuit,)) for circuit in circuits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cr.load(target).n in range(3, 9)
    assert link.is_symlink()
    assert _entries(tmp_path) == ["link", "target"]


def test_counts_must_be_those_of_the_models_even_where_their_number_and_range_agree(path):
    """Of 4 variables: 1, 6 and 1 models of 1, 2 and 3, where the file says 4 and 4 of 1 and 3."""
    x = cr.variables(4)
    rule = cr.Exactly(2) | cr.Logic(x[0] & ~x[1] & ~x[2] & ~x[3]) | cr.Logic(~x[0] & x[1] & x[2] & x[3])
    circuit = cr.compile(rule, 4)
    assert circuit.model_count() == cr.compile(cr.CountIn({1, 3}), 4).model_count() == 8
    circuit.save(path)
    lines = path.read_bytes().split(b"\n")[:-2]
    lines[1] = json.dumps({**json.loads(lines[1]), "counts": [1, 3]}).encode()
    path.write_bytes(resealed(b"\n".join(lines) + b"\n"))
    with pytest.raises(cr.CircuitFileError, match="the allowed counts are not those of the circuit"):
        cr.load(path)
