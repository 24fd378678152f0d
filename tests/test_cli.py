"""The command line's surface: exit codes and messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import circuitroute as cr
from circuitroute.cli.main import main

ROOT = Path(__file__).parents[1]


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"circuitroute {cr.__version__}\n"


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in (
        "--steps",
        "--seed",
        "--experts",
        "--out",
        "--device",
        "--text",
        "--resume",
        "--routers",
        "--k",
    ):
        assert option in shown


@pytest.mark.parametrize(
    ("arguments", "option", "says"),
    [
        (["--steps", "many"], "--steps", "'many'"),
        (["--steps", "0"], "--steps", "at least 1, got 0"),
        (["--seed", "-1"], "--seed", "at least 0, got -1"),
        (["--seed", str(2**31)], "--seed", "below 2**31"),
        (["--experts", "1"], "--experts", "at least 2"),
        (["--k", "9", "--experts", "8"], "--k", "at most the number of experts, 8, got 9"),
        (["--hidden", "40"], "--hidden", "multiple of 32"),
        (["--seq-len", "1"], "--seq-len", "at least 8, got 1"),
        (["--batch-size", "0"], "--batch-size", "at least 1, got 0"),
        (["--layers", "0"], "--layers", "at least 1, got 0"),
        (["--routers", "top-k", "best-k"], "--routers", "'best-k'"),
        (["--routers", "top-k", "top-k"], "--routers", "twice"),
        (["--threads", "0"], "--threads", "at least 1, got 0"),
        (["--device", "abacus"], "--device", "'abacus' is not usable here"),
        (["--text", "no-such-file"], "--text", "cannot read 'no-such-file'"),
        (["--text", "."], "--text", "cannot read '.'"),
        (["--resume"], "--resume", "no run in"),
    ],
)
def test_bad_arguments(
    arguments: list[str], option: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *arguments]) == 2
    message = capsys.readouterr().err
    assert f"error: argument {option}" in message
    assert says in message
    assert not out.exists(), "a refused command leaves nothing behind"


@pytest.mark.parametrize("name", ["cuda:7", "banana", "cpu:x", "meta", ""])
@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_device_that_is_not_there(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--out", str(tmp_path / "out"), "--device", name]) == 2
    message = capsys.readouterr().err
    assert f"error: argument --device: {name!r} is not usable here" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["demo", "bench"])
def test_no_cuda(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "error: argument --device: 'cuda' is not usable here" in capsys.readouterr().err


def test_rows_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is timed."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file" / "rows.jsonl"):
        assert main(["bench", "--out", str(out)]) == 2
        shown = capsys.readouterr()
        assert f"error: argument --out: cannot write {str(out)!r}" in shown.err
        assert "timing" not in shown.out
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_an_end_from_outside_is_no_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("circuitroute.cli.explain.command._facts", fail)
    assert main(["explain", "any:thing", "-n", "4"]) == code
    assert capsys.readouterr().err == ("circuitroute: interrupted\n" if code == 130 else "")


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("import circuitroute as cr\nrule = cr.Exactly(2)\n")
    command = (
        f"{sys.executable} -m circuitroute.cli.main explain {tmp_path}/rules.py:rule -n 4 --json; echo code $? >&2"
    )
    done = subprocess.run(
        ["bash", "-c", f"({command}) | true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert done.stderr.splitlines()[-1] == "code 141"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_text_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("brief")
    assert main(["demo", "--out", str(tmp_path / "out"), "--text", str(text)]) == 2
    message = capsys.readouterr().err
    assert "argument --text" in message
    assert "too small" in message
    assert "--seq-len" in message


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "taken"
    out.write_text("mine")
    assert main(["demo", "--out", str(out)]) == 2
    assert "argument --out: cannot make the directory" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # what import does for a module that is not there
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'circuitroute[demo]'" in capsys.readouterr().err
