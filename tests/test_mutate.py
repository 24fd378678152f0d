"""The tool of mutation testing: where it mutates, that the copy is as it was afterwards, and what it says of tests."""

import ast
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import mutate
from tools.mutate import Row, Session, copy_tree, mutated, run_tests
from tools.sites import find

SOURCE = b'''"""1 + 1 of the module."""

from math import inf


def f(x: tuple[int, int], n: int = 3) -> list[int]:
    """2 * 2 of the function."""
    if n < 0 and not x:
        raise ValueError(f"n={n + 1}: at least {0}")
    total = 0.5 * (  # * and +
        n - min(x)
    )
    total += abs(n)
    x[n:].sort(reverse=True)
    return where(x[0] == inf, total, -n) if n != 1 else None
'''
SITES = {
    (6, "constant", "3", "4"),
    (8, "condition", "n < 0 and not x", "not (n < 0 and not x)"),
    (8, "comparison", "<", "<="),
    (8, "constant", "0", "1"),
    (8, "boolean", "and", "or"),
    (8, "boolean", "not x", "(x)"),
    (10, "constant", "0.5", "1.0"),
    (10, "arithmetic", "*", "/"),
    (11, "arithmetic", "-", "+"),
    (11, "minmax", "min", "max"),
    (13, "statement", "total += abs(n)", "pass"),
    (13, "arithmetic", "+=", "-="),
    (13, "no call", "abs(n)", "(n)"),
    (14, "statement", "x[n:].sort(reverse=True)", "pass"),
    (14, "slice", "n", "(n) + 1"),
    (14, "constant", "True", "False"),
    (15, "swapped", "total, -n", "-n, total"),
    (15, "comparison", "==", "!="),
    (15, "constant", "0", "1"),
    (15, "arithmetic", "-n", "(n)"),
    (15, "condition", "n != 1", "not (n != 1)"),
    (15, "comparison", "!=", "=="),
    (15, "constant", "1", "2"),
    (15, "constant", "1", "0"),
}

TOY = """
def clipped(x, most=3):
    return min(x, most)


def counted(n):
    i = 0
    while i < n:
        i += 1
    return i
"""
TOY_TESTS = """
import toy


def test_small():
    assert toy.counted(2) == 2


def test_clipped():
    assert toy.clipped(5) == 3
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with one module and its tests, and the table for it."""
    if shutil.which("git") is None:
        pytest.skip("git says what a checkout is made of")
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    (root / "toy.py").write_text(TOY)
    (root / "test_toy.py").write_text(TOY_TESTS)
    monkeypatch.setattr(mutate, "TESTS", {"toy.py": ["test_toy.py"]})
    return root


def site_of(path, line, new):
    (found,) = [site for site in find(path.read_bytes()) if (site.line, site.new) == (line, new)]
    return found


# ---------------------------------------------------------------------------------------------- sites


def test_every_kind_of_site_is_found_and_nothing_that_is_said_to_people():
    assert {(site.line, site.operator, site.old, site.new) for site in find(SOURCE)} == SITES


def test_a_mutant_differs_in_one_place_alone():
    for site in find(SOURCE):
        mutant = site.applied(SOURCE)
        assert mutant != SOURCE
        assert mutant.startswith(SOURCE[: site.start])
        assert mutant.endswith(SOURCE[site.end :])
        assert ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(SOURCE))


def test_sites_of_letters_of_several_bytes():
    (site,) = [site for site in find("x = 'é' * ü - 1".encode()) if site.operator == "arithmetic" and site.old == "-"]
    assert site.applied("x = 'é' * ü - 1".encode()).decode() == "x = 'é' * ü + 1"


def test_files_of_the_table_are_there_and_their_mutants_are_sources():
    files = mutate.files_of(mutate.ROOT, "")
    assert {"circuitroute/keys/folding.py", "circuitroute/engines/subset/numba/tree.py"} <= set(files)
    for file in files:
        tests = [Path(mutate.ROOT, name) for name in mutate.tests_of(file) if name.startswith("tests/")]
        assert tests, file
        assert all(path.exists() for path in tests), file
        source = Path(mutate.ROOT, file).read_bytes()
        for site in mutate.chosen(file, source, 2, seed=1):
            ast.parse(site.applied(source))
    assert mutate.tests_of("circuitroute/engines/subset/triton/tree.py") != mutate.tests_of(
        "circuitroute/engines/subset/mode.py"
    )
    with pytest.raises(ValueError, match="names no tests for it"):
        mutate.tests_of("circuitroute/plots.py")


def test_operators_take_turns():
    operators = {operator for _, operator, _, _ in SITES}
    first = mutate.chosen("f.py", SOURCE, len(operators), seed=3)
    assert {site.operator for site in first} == operators
    assert mutate.chosen("f.py", SOURCE, len(operators), seed=3) == first
    assert mutate.chosen("f.py", SOURCE, 99, seed=3)[: len(operators)] == first
    assert set(mutate.chosen("f.py", SOURCE, 99, seed=4)) == set(find(SOURCE))


# ---------------------------------------------------------------------------------------------- the copy


def test_the_file_is_as_it_was_even_after_an_interrupt(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    os.utime(path, ns=(10**18, 10**18 + 7))
    site = site_of(path, 3, "max")
    with mutated(path, site):
        assert path.read_text() == TOY.replace("min", "max")
    with pytest.raises(KeyboardInterrupt), mutated(path, site):  # noqa: PT012
        assert path.read_text() != TOY
        raise KeyboardInterrupt
    assert path.read_text() == TOY
    assert path.stat().st_mtime_ns == 10**18 + 7


def test_a_run_that_is_told_to_end_puts_the_file_right(root, tmp_path):
    """While tests of a mutant run, which wait for it."""
    tree, started = tmp_path / "tree", tmp_path / "started"
    waits = f"import time, toy\n\ndef test_waits():\n    if toy.clipped(5) != 3:\n        open({str(started)!r}, 'w')"
    (root / "test_toy.py").write_text(waits + "\n        time.sleep(600)\n")
    (root / "toy.py").write_text("def clipped(x):\n    return min(x, max(x) if x < 0 else 3)\n")
    program = f"""
from tools import mutate
mutate.TESTS = {{"toy.py": ["test_toy.py"]}}
mutate.main([{str(tree)!r}, "--root", {str(root)!r}, "--rows", {str(tmp_path / "rows")!r}, "--count", "99"])
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=mutate.ROOT, stdout=subprocess.DEVNULL)
    try:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert (tree / "toy.py").read_bytes() != (root / "toy.py").read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert (tree / "toy.py").read_bytes() == (root / "toy.py").read_bytes()


def test_a_copy_is_brought_to_the_state_of_the_checkout(root, tmp_path):
    tree = tmp_path / "tree"
    copy_tree(root, tree)
    (tree / "toy.py").write_text("left behind")
    (tree / "kept").write_text("such as compiled kernels")
    times = (tree / "test_toy.py").stat()
    copy_tree(root, tree)
    assert (tree / "toy.py").read_text() == TOY
    assert (tree / "kept").exists()
    assert (tree / "test_toy.py").stat() == times
    for wrong in (root, root.parent):
        with pytest.raises(ValueError, match="give a folder of their own"):
            copy_tree(root, wrong)


# ---------------------------------------------------------------------------------------------- verdicts


def test_killed_survived_and_endless(root, tmp_path):
    tree = tmp_path / "tree"
    copy_tree(root, tree)
    assert run_tests(tree, ["test_toy.py"], 60).verdict == "survived"
    with mutated(tree / "toy.py", site_of(tree / "toy.py", 3, "max")):
        found = run_tests(tree, ["test_toy.py"], 60)
    assert (found.verdict, found.by) == ("killed", "test_toy.py::test_clipped")
    with mutated(tree / "toy.py", site_of(tree / "toy.py", 8, "<=")):
        found = run_tests(tree, ["test_toy.py"], 60)
    assert (found.verdict, found.by) == ("killed", "test_toy.py::test_small")
    with mutated(tree / "toy.py", site_of(tree / "toy.py", 9, "pass")):
        assert run_tests(tree, ["test_toy.py"], 3.0).verdict == "timeout"
    with pytest.raises(RuntimeError, match="pytest ran none of them"):
        run_tests(tree, ["test_nowhere.py"], 60)


def test_rows_are_kept_and_those_that_survived_tried_again(root, tmp_path, capsys):
    """A test of the default alone is missing at first."""
    rows, tree = tmp_path / "rows.jsonl", tmp_path / "tree"
    (root / "toy.py").write_text("def clipped(x, most=3):\n    return min(x, most)\n")
    (root / "test_toy.py").write_text("import toy\n\ndef test():\n    assert toy.clipped(5, 4) == 4\n")
    Session(root, tree, rows).sample("", 9, seed=0)
    found = {row.new: row for row in mutate.load(rows)}
    assert {new: row.verdict for new, row in found.items()} == {"4": "survived", "max": "killed"}
    assert found["max"] == Row(
        "toy.py", 2, 12, "return min(x, most)", "minmax", "min", "max", "killed", "test_toy.py::test"
    )
    assert all(None not in json.loads(line).values() for line in rows.read_text().splitlines())
    kept = rows.read_text()
    Session(root, tree, rows).sample("", 9, seed=0)
    assert rows.read_text() == kept

    (root / "test_toy.py").write_text("import toy\n\ndef test():\n    assert toy.clipped(5) == 3\n")
    (root / "toy.py").write_text("# A line before it.\n" + (root / "toy.py").read_text())
    Session(root, tree, rows).again("", "survived")
    again = {row.new: row for row in mutate.load(rows)}
    assert again["max"] == found["max"]
    assert again["4"] == dataclasses.replace(
        found["4"], line=2, verdict="killed", by="test_toy.py::test", first="survived"
    )
    assert all((tree / path.name).read_bytes() == path.read_bytes() for path in root.glob("*.py"))
    mutate.main(["--rows", str(rows)])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "2", "1", "2", "0"]


def test_tests_must_pass_without_a_mutant(root, tmp_path):
    (root / "test_toy.py").write_text("def test():\n    assert False\n")
    session = Session(root, tmp_path / "tree", tmp_path / "rows")
    with pytest.raises(RuntimeError, match=r"test_toy\.py::test without any mutation"):
        session.sample("", 1, seed=0)
