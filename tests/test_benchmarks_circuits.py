"""The op circuits: every provider gives the truth on the same file, rows name files only. Nothing here is timed.

Shapes: T rows, N variables.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import circuitroute as cr
from benchmarks import plots, registry, rows
from benchmarks.__main__ import main
from benchmarks.circuits import klay, random_cnf, table, workload
from benchmarks.circuits.workload import CircuitCase
from benchmarks.registry import BOTH, UnavailableError
from tests.foreign import accept_c2d

# x1 implies x2, and x3 is free: neither or-node is smooth.
IMPLIES = "nnf 5 4 3\nL -1\nL 1\nL 2\nA 2 1 2\nO 1 2 0 3\n"
IMPLIES_D4 = "o 1 0\nt 2 0\n1 2 -1 0\n1 2 1 2 0\n"
OURS = ["circuitroute:torch", "circuitroute:naive"]
KLAY = ["klay", "klay:real", "klay:vmap"]


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """As in test_benchmarks: the runner collects garbage before it measures."""
    gc.freeze()
    yield
    gc.unfreeze()


def _sdds(folder: Path, sizes: str = "8") -> Path:
    """Two random formulas of each size as SDDs with their vtrees."""
    pytest.importorskip("pysdd")
    assert random_cnf.main([str(folder), "--sizes", sizes, "--seeds", "2"]) == 0
    return folder


def _run(tmp_path: Path, folder: Path, *arguments: str) -> list[rows.Row]:
    out = tmp_path / "rows.jsonl"
    asked = ["--op", "circuits", "--collection", f"some={folder}", "--repeats", "1", "--out", str(out)]
    assert main([*asked, *arguments]) == 0
    return rows.read(out)


def test_every_provider_agrees_on_an_sdd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("klay")
    names = [*OURS, *KLAY, "pysdd"]
    found = _run(tmp_path, _sdds(tmp_path / "sdd"), "--batches", "1,3", "--providers", ",".join(names))
    assert [(row["constraint"], row["T"], row["provider"]) for row in found[::2]] == [
        (f"cnf-8-{seed}", batch, name) for seed in (0, 1) for batch in (1, 3) for name in names
    ]
    for row in found:
        assert row["max_abs_error"] < 2e-6
        assert (row["collection"], row["format"], row["n"]) == ("some", "sdd", 8)
        assert str(tmp_path) not in str(row)
        assert row.get(row["engine"]) is not None or row["engine"] in ("torch", "naive")
    assert {row["nodes"] for row in found if row["engine"] == "klay"} != {row["nodes"] for row in found[:2]}
    assert "cnf-8-1" in capsys.readouterr().out


@pytest.mark.parametrize("text", [IMPLIES, IMPLIES_D4], ids=["c2d", "d4"])
def test_every_provider_agrees_on_a_ddnnf(tmp_path: Path, text: str) -> None:
    pytest.importorskip("klay")
    folder = tmp_path / "nnf"
    folder.mkdir()
    (folder / "implies.nnf").write_text(text)
    found = _run(tmp_path, folder, "--batches", "5", "--providers", ",".join([*OURS, *KLAY]))
    assert [row["provider"] for row in found[::2]] == [*OURS, *KLAY]
    assert all(row["max_abs_error"] < 2e-6 for row in found)


def test_what_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("klay")
    path = _sdds(tmp_path) / "cnf-8-0.sdd"
    found = {each.name: each for each in registry.providers("circuits", [*KLAY, "pysdd", "klay:compiled"])}
    with pytest.raises(UnavailableError, match="more than 256 rows"):
        found["klay:vmap"].build(CircuitCase("some", path, 257))
    with pytest.raises(UnavailableError, match="no batch"):
        found["pysdd"].build(CircuitCase("some", path, 17))
    (tmp_path / "implies.nnf").write_text(IMPLIES)
    with pytest.raises(UnavailableError, match="SDDs only"):
        found["pysdd"].build(CircuitCase("some", tmp_path / "implies.nnf", 1))
    low = CircuitCase("some", tmp_path / "implies.nnf", 2)
    low.logits[0, :2] = -200.0 * low.logits.new_tensor([-1.0, 1.0])  # x1 without x2: e^-200
    with pytest.raises(UnavailableError, match=r"implies: its float32 underflows in 1 of 2 rows"):
        found["klay:real"].build(low)
    assert not found["klay:compiled"].by_default
    monkeypatch.setitem(sys.modules, "klay", None)
    with pytest.raises(UnavailableError, match="pip install klaycircuits"):
        klay._circuit(path)


def test_cirkit_is_asked_for_what_it_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _sdds(tmp_path) / "cnf-8-0.sdd"
    (found,) = (each for each in registry.providers("circuits", ["cirkit"]) if each.name == "cirkit")
    assert not found.by_default
    with pytest.raises(UnavailableError, match="a batch of one row"):
        found.build(CircuitCase("some", path, 1))
    (tmp_path / "implies.nnf").write_text(IMPLIES)
    with pytest.raises(UnavailableError, match="SDDs only"):
        found.build(CircuitCase("some", tmp_path / "implies.nnf", 2))
    monkeypatch.setitem(sys.modules, "cirkit", None)
    with pytest.raises(UnavailableError, match="pip install cirkit"):
        found.build(CircuitCase("some", path, 3))


def test_cirkit_agrees(tmp_path: Path) -> None:
    pytest.importorskip("cirkit")
    found = _run(tmp_path, _sdds(tmp_path / "sdd"), "--batches", "3", "--providers", "cirkit")
    assert [row["provider"] for row in found[2::4]] == ["cirkit"] * 2
    assert all(row["max_abs_error"] < 2e-6 and row["nodes"] > 8 for row in found)


def test_circuits_that_are_refused_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "implies.nnf").write_text(IMPLIES)
    (tmp_path / "both.nnf").write_text("nnf 3 2 2\nL 1\nL 2\nO 0 2 0 1\n")  # x1 or x2: not deterministic
    found = _run(tmp_path, tmp_path, "--batches", "2", "--providers", "circuitroute:torch")
    assert {row["constraint"] for row in found} == {"implies"}
    assert "left out both.nnf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--collection NAME=FOLDER"),
        (["--collection", "spl"], "expected a name and a folder"),
        (["--collection", "spl=nowhere"], "there is no folder 'nowhere'"),
        (["--collection", "spl={folder}/empty"], "no .sdd or .nnf file"),
        (["--collection", "spl={folder}", "--only", "implied"], "no circuit implied; there are implies"),
        (["--collection", "spl={folder}", "--batches", "4,0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_impossible_requests_end_with_a_message(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "implies.nnf").write_text(IMPLIES)
    with pytest.raises(SystemExit):
        main(["--op", "circuits", *(text.format(folder=tmp_path) for text in arguments)])
    assert message in " ".join(capsys.readouterr().err.split())


def test_random_formulas_are_those_of_the_protocol(tmp_path: Path) -> None:
    """The same for the same seed, and the SDD has their models: counted one world after the other."""
    clauses = random_cnf.random_clauses(8, 4, 1)
    assert clauses == random_cnf.random_clauses(8, 4, 1) != random_cnf.random_clauses(8, 4, 2)
    assert [len(clause) for clause in clauses] == [3] * 4
    assert random_cnf.dimacs(2, [[1, -2, 1]]) == "p cnf 2 1\n1 -2 1 0\n"
    worlds = itertools.product((False, True), repeat=8)
    models = sum(all(any(world[abs(x) - 1] == (x > 0) for x in clause) for clause in clauses) for world in worlds)
    _sdds(tmp_path)
    assert workload.read_circuit(tmp_path / "cnf-8-1.sdd").model_count() == models


@pytest.mark.parametrize(("name", "options"), [("d4", "-dDNNF {cnf} -out={nnf}"), ("dsharp", "-Fnnf {nnf} {cnf}")])
def test_compilers_of_ddnnf_are_called_as_they_want_it(tmp_path: Path, name: str, options: str) -> None:
    compiler, out = tmp_path / name, tmp_path / "out"
    compiler.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    compiler.chmod(0o755)
    assert random_cnf.main([str(out), "--sizes", "6", "--seeds", "1", "--ddnnf", str(compiler)]) == 0
    expected = options.format(cnf=out / "cnf-6-0.cnf", nnf=out / "cnf-6-0.nnf")
    assert (tmp_path / "asked").read_text().strip() == expected
    assert (out / "cnf-6-0.cnf").read_text() == random_cnf.dimacs(6, random_cnf.random_clauses(6, 12, 0))


def test_the_files_of_these_tests_mean_what_they_say() -> None:
    assert accept_c2d(IMPLIES, 3).sum() == 6
    assert cr.compile(cr.Logic("x0 >> x1"), 3).model_count() == 6


def _row(provider: str, ms: float, batch: int = 256, collection: str = "spl", name: str = "grid") -> rows.Row:
    row = {"op": "circuits", "provider": provider, "pass": BOTH, "T": batch, "n": 8, "constraint": name}
    row |= {"collection": collection, "nodes": 1234, "edges": 2000, "median_ms": ms, "peak_mib": 3.2}
    return row | {"device": "cpu", "threads": 1, "ratio_to_topk": 1.0}


PROVIDERS = {"circuitroute:numba": 0.5, "circuitroute:torch": 4.0, "klay": 20.0, "klay:real": 12.0, "klay:vmap": 300.0}


def test_tables_compare_with_the_fastest_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = [_row(name, ms) for name, ms in PROVIDERS.items()]
    seeds = [_row(p, ms * (1 + i), 1, "cnf", f"cnf-{i}") for i in (0, 1) for p, ms in PROVIDERS.items()]
    seeds[2]["median_ms"], seeds[3]["median_ms"] = 5.0, 90.0  # here log space is the faster one
    old = _row("klay:real", 1.0)  # replaced by a newer row
    rows.append(tmp_path / "rows.jsonl", [old, *some, *seeds])
    assert table.main([str(tmp_path / "rows.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "spl, batch 256:" in out
    assert "| grid | 8 | 1,234, 1,234 | 0.50 | 4.00 | 12.0 (real) | 24.0 | 300 | 600 |  | 3, 3 |" in out
    assert "| cnf | 8 | 1 | 2 | 2,000 | 0.75 | 6.00 | 14.5 | 17.0 (10.0 to 24.0) | 600 (600 to 600) |  |" in out


def test_one_picture_holds_the_public_circuits(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    some = [_row(p, ms, name=name) for name in ("cells_x", "grid-all-pairs-sd") for p, ms in PROVIDERS.items()]
    for row in some[: len(PROVIDERS)]:
        row["edges"] = 100  # the larger circuit comes first
    some += [_row("circuitroute:numba", 1.0, 1), _row("circuitroute:numba", 1.0, collection="cnf")]
    ((name, family),) = plots.families(some).items()
    assert name == "circuit-benchmarks"
    (axes,) = plots.DRAW["circuits"](family).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["grid", "cells"]
    assert [len(marks.get_offsets()) for marks in axes.collections] == [2, 2, 2]
    assert [marks.get_offsets()[0][0] for marks in axes.collections] == [0.5, 12.0, 300.0]
    rows.append(tmp_path / "rows.jsonl", some)
    assert plots.main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "circuit-benchmarks.svg").exists()
