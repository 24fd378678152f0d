"""The benchmark of executed experts steers what it says, and its rows are whole. Nothing here is timed.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import circuitroute as cr
from benchmarks import rows
from benchmarks.executed import stacks
from benchmarks.executed.__main__ import main
from benchmarks.executed.settings import Layer, Setting, Sizes, UnavailableError, price_for, settings
from benchmarks.executed.table import table
from benchmarks.executed.timing import run_way

TINY = Sizes(tokens=64, experts=12, hidden=16, inner=8, k=4)
ARGUMENTS = [f"--{name}={value}" for name, value in vars(TINY).items()]
MEANS = (4.0, 2.5, 1.0)
HERE = ["moe"]
ROOT = Path(__file__).parents[1]


def _stack(name: str) -> Any:
    try:
        return stacks.stack(name)
    except ImportError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("mean", [1.0, 1.5, 2.0, 3.25, 4.0])
def test_the_price_steers_the_mean_of_the_mode(mean: float) -> None:
    logits = torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    price = price_for(logits, mean, 4)
    circuit = cr.compile(cr.Between(1, 4), 12)
    routing = cr.route(logits, circuit, training=False, price=price)
    assert float(routing.counts.double().mean()) == pytest.approx(mean, abs=1 / 64)
    # A price in the first column of the weight is the same.
    shifted = cr.route(logits - price, circuit, training=False)
    assert torch.equal(shifted.mask, routing.mask)


@pytest.mark.parametrize("mean", [0.5, 4.5])
def test_a_mean_out_of_range_is_refused(mean: float) -> None:
    with pytest.raises(ValueError, match=rf"mean={mean}: tokens get from 1 to 4"):
        price_for(torch.zeros(2, 8), mean, 4)


def test_settings_are_on_the_same_tokens() -> None:
    fixed, *others = settings(TINY, MEANS, (2.5,))
    assert fixed.asked is None
    assert fixed.constraint == cr.Exactly(4)
    assert torch.equal(fixed.priced_router, fixed.router)
    assert [(case.asked, case.padded) for case in others] == [(4.0, False), (2.5, False), (1.0, False), (2.5, True)]
    for case in others:
        assert case.hidden is fixed.hidden
        assert case.router is fixed.router
        assert case.constraint == cr.Between(1, 4)
        counts = (case.hidden @ case.priced_router.t() > 0).sum(-1).clamp(1, 4)
        assert float(counts.double().mean()) == pytest.approx(case.asked, abs=1 / 64)


@pytest.mark.parametrize("name", stacks.names())
def test_every_way_executes_what_was_asked_for_and_padding_changes_no_output(name: str) -> None:
    module = _stack(name)
    for way in (way for way in module.WAYS if "compiled" not in way):
        for setting in settings(TINY, MEANS, ()):
            try:
                layer, padded = (module.build(way, replace(setting, padded=pays)) for pays in (False, True))
            except UnavailableError as reason:
                pytest.skip(str(reason))
            assert layer is not None
            for training in (False, True):
                layer.module.train(training)
                output = layer.run(setting.hidden)
                assert output.shape == setting.hidden.shape
                assert layer.executed() == pytest.approx(setting.asked or TINY.k, abs=1 / 64)
                if padded is not None:
                    padded.module.train(training)
                    torch.testing.assert_close(padded.run(setting.hidden), output, rtol=1e-4, atol=1e-5)
            assert output.requires_grad


@pytest.mark.parametrize("name", HERE)
def test_rows_are_whole(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = _stack(name)
    out = tmp_path / "rows" / "tiny.jsonl"
    options = ["--means=4,2", "--padded=2", "--repeats=2", f"--stacks={name}", f"--out={out}"]
    assert main([*ARGUMENTS, *options]) == 0
    found = rows.read(out)
    assert len(found) == 2 * (4 + 4 + 3), "null experts have no padding"
    fields = {"op", "stack", "way", "T", "n", "k", "hidden", "inner", "asked", "padded", "executed", "pass"}
    fields |= {"median_ms", "p20_ms", "p80_ms", "ratio_to_fixed", "ratio_p20", "ratio_p80"}
    fields |= {"device", "cpu", "python", "torch", "circuitroute", "utc", "threads", "repeats", "clock", "processes"}
    for row in found:
        assert set(row) == fields | set(module.PACKAGES)
        assert row["executed"] == pytest.approx(row["asked"] or TINY.k, abs=1 / 64)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert 0 < row["ratio_p20"] <= row["ratio_to_fixed"] <= row["ratio_p80"]
        assert row["ratio_to_fixed"] == 1.0 or row["asked"] is not None
    printed = capsys.readouterr().out
    assert main(["--table", str(out)]) == 0
    again = capsys.readouterr().out
    assert again.strip() in printed
    assert "| stack | way | pass | fixed top-k, ms | 4 | 2 | 2, padded |" in again
    assert again.count("forward+backward") == len(module.WAYS)


def test_a_way_can_be_chosen(tmp_path: Path) -> None:
    out = tmp_path / "tiny.jsonl"
    options = ["--means=2", "--padded=", "--repeats=1", "--stacks=moe", "--ways=StackedExperts", f"--out={out}"]
    assert main([*ARGUMENTS, *options]) == 0
    assert {row["way"] for row in rows.read(out)} == {"StackedExperts"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--stacks=nothing", "no stack nothing; there are .*moe"),
        ("--means=5", "5 is not from 1 to k=4"),
        ("--padded=0.5", "0.5 is not from 1 to k=4"),
    ],
)
def test_wrong_arguments_are_refused(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, argument])
    assert re.search(message, capsys.readouterr().err)


def test_a_layer_that_executes_another_number_is_refused() -> None:
    def build(way: str, setting: Setting) -> Layer:
        module = torch.nn.Linear(16, 16)
        return Layer(module, module, lambda: 3.0)

    lying = SimpleNamespace(PACKAGES=(), build=build)
    with pytest.raises(RuntimeError, match=r"lying, plain: 3.0 experts per token were executed where 4 were asked for"):
        run_way(lying, "lying", "plain", list(settings(TINY, (), ())), repeats=1)


def test_what_cannot_run_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(way: str, setting: Setting) -> Layer:
        raise UnavailableError("it is too large")

    found = {"moe": SimpleNamespace(PACKAGES=(), WAYS=("plain",), build=unavailable)}

    def stack(name: str) -> Any:
        if name not in found:
            raise ImportError(f"no {name} here")
        return found[name]

    monkeypatch.setattr("benchmarks.executed.__main__.stack", stack)
    out = tmp_path / "rows.jsonl"
    assert main([*ARGUMENTS, "--stacks=moe,transformers", f"--out={out}"]) == 1
    printed = capsys.readouterr().out
    assert "skipped moe, plain: it is too large" in printed
    assert "skipped transformers: no transformers here" in printed
    assert not out.exists()


def test_the_last_row_of_a_setting_counts() -> None:
    base = {"stack": "moe", "way": "plain", "pass": "forward", "padded": False}
    fixed = {**base, "asked": None, "median_ms": 10.0, "ratio_to_fixed": 1.0}
    old, new = ({**base, "asked": 2.0, "median_ms": 1.0, "ratio_to_fixed": ratio} for ratio in (0.5, 0.25))
    assert table([fixed, old, new]).splitlines()[-1] == "| moe | plain | forward | 10.0 | 0.25 |"


@pytest.mark.slow
def test_processes_wait_for_the_slowest(tmp_path: Path) -> None:
    """Two processes over gloo: one row per setting and pass, by the first."""
    out = tmp_path / "two.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "benchmarks.executed", *ARGUMENTS]
    command += ["--means=2", "--padded=", "--repeats=2", "--stacks=moe", "--ways=StackedExperts", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [row["processes"] for row in rows.read(out)] == [2] * 4


@pytest.mark.slow
def test_compiled_layers_are_timed(tmp_path: Path) -> None:
    _stack("transformers")
    out = tmp_path / "tiny.jsonl"
    options = ["--means=2", "--padded=", "--repeats=1", "--stacks=transformers", "--ways=grouped_mm, compiled"]
    assert main([*ARGUMENTS, *options, f"--out={out}"]) == 0
    assert [row["asked"] for row in rows.read(out)] == [None, 2.0] * 2
