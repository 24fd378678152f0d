"""`circuitroute bench`: the benchmarks of a checkout, with their own options, and a clear word where there are none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import rows
from circuitroute.cli import checkout
from circuitroute.cli.main import main

ROOT = Path(__file__).parents[1]


def test_it_runs_the_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "rows.jsonl", list(sys.path)
    options = ["--tokens", "8", "--sizes", "4:2", "--repeats", "1", "--providers", "topk"]
    assert main(["bench", *options, "--out", str(out)]) == 0
    assert [row["provider"] for row in rows.read(out)] == ["topk", "topk"]
    assert f"rows appended to {out}" in capsys.readouterr().out
    assert sys.path == before


def test_help_is_that_of_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: circuitroute bench")
    assert "--providers" in shown


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--sizes", "8"]) == 2
    assert "circuitroute bench: error: --sizes '8'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_outside_a_checkout_it_says_where_to_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkout, "PACKAGE", tmp_path / "site-packages" / "circuitroute")
    monkeypatch.chdir(tmp_path)
    assert main([command, "--help"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "run this in a checkout" in line


def test_the_current_directory_is_looked_at_where_the_package_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout.find_checkout() == ROOT
    monkeypatch.setattr(checkout, "PACKAGE", tmp_path / "circuitroute")
    monkeypatch.chdir(ROOT)
    assert checkout.find_checkout() == ROOT
