"""The study of balance, on settings that take seconds: what it runs, resumes, averages and draws."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from language_model import trainee, training
from language_model.config import Run
from language_model.evaluation import Evaluation
from language_model.process import Interrupted
from language_model.studies import balance, balance_report
from language_model.studies.balance import ROUTERS, preset
from language_model.studies.balance_report import row_of, summarise, table_of, with_differences
from language_model.texts import load_corpus
from language_model.trainee import Record

import circuitroute as cr
from circuitroute.cli.main import main
from tests.test_demo import TINY, Watcher, assert_same_run, never, png_size, results

STUDY = ["demo", "--study", "balance"]
SIZES = {"steps": 3, "layers": 2, "experts": 4, "hidden": 32, "batch-size": 2, "seq-len": 16, "seeds": 1}
FEW = ("top-k", "top-k-quantile", "mode-exact")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def square_{i}(x):\n    return x * {i}\n\n" for i in range(200)))
    return path


def test_the_presets_are_of_one_budget_and_all_routers() -> None:
    for device, seeds in (("cpu", 3), ("cuda", 3)):
        config = preset(torch.device(device), {})
        runs = config.runs()
        assert len(runs) == seeds * len(ROUTERS)
        assert {run.router for run in runs} == set(ROUTERS)
        assert {run.k for run in runs} == {config.base.k}
    assert preset(torch.device("cpu"), {"k": 3, "routers": FEW}, seeds=1).runs() == [Run(name, 3, 0) for name in FEW]


def test_from_one_end_to_the_other(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(balance.CPU, "validation_batches", 2)
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    command = [*STUDY, *sizes, "--routers", *FEW, "--text", str(text), "--processes", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for word in (*FEW, "max violation", "bits/byte", "1 seed", "violation.png"):
        assert word in shown
    found = results(tmp_path)
    assert (found["study"], found["complete"]) == ("balance", True)
    assert [row["router"] for row in found["rows"]] == list(FEW)
    for row in found["rows"]:
        assert [name for name, value in row.items() if value is None] == []
        assert row["executed"] == 2
        assert 0 <= row["max_violation"] <= 1
    assert min(png_size(tmp_path / "violation.png")) > 200
    monkeypatch.setattr(balance_report, "draw_balance", lambda *_: [])
    assert main([*STUDY, "--resume", "--processes", "1", "--out", str(tmp_path)]) == 0
    assert [row["bits_per_byte"] for row in results(tmp_path)["rows"]] == [
        row["bits_per_byte"] for row in found["rows"]
    ]
    assert main([*STUDY, "--budgets", "2", "--out", str(tmp_path / "other")]) == 2
    assert "argument --budgets: belongs to the study of budgets: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("router", ["top-k-bias", "mode-exact"])
def test_a_bias_is_resumed_like_all_else(router: str, text: Path, tmp_path: Path) -> None:
    """It is no parameter, and must be in the checkpoint; so is what the record says of every step."""
    config = replace(TINY, text=str(text))
    setting = trainee.Setting(config, load_corpus(config), torch.device("cpu"), tmp_path / "checkpoints")
    uninterrupted = trainee.start(replace(setting, checkpoints=tmp_path / "whole"), router, resume=False)
    training.train(uninterrupted, Watcher(), never)
    stopped: list[bool] = []
    first = trainee.start(setting, router, resume=False)
    with pytest.raises(Interrupted):
        training.train(first, Watcher(4, lambda: stopped.append(True)), lambda: bool(stopped))
    second = trainee.start(setting, router, resume=True)
    training.train(second, Watcher(), never)
    assert_same_run(uninterrupted, second)
    assert uninterrupted.record.violations == second.record.violations
    assert len(second.record.violations) == config.steps
    assert torch.equal(uninterrupted.model.plan.bias, second.model.plan.bias)
    assert second.model.plan.bias.any()


def test_a_plan_moves_every_layers_own_bias(text: Path, tmp_path: Path) -> None:
    config = replace(TINY, text=str(text))
    setting = trainee.Setting(config, load_corpus(config), torch.device("cpu"), tmp_path)
    run = trainee.start(setting, "top-k-bias", resume=False)
    tokens = setting.corpus.batch(config, 0)
    _, routings = run.model(tokens[:, :-1])
    training.training_step(run)
    for bias, routing in zip(run.model.plan.bias, routings, strict=True):
        load = routing.mask.sum(0).float()
        torch.testing.assert_close(bias, 3e-3 * (load.mean() - load).sign())
    assert run.record.violations == [fmean(cr.metrics.max_violation(routing) for routing in routings)]


def _record(router: str, violations: list[float], bits: float, violation: float, finished: bool = True) -> Record:
    last = Evaluation(4, bits, 2.0, 0.9, violation, [], [], [], None)
    measured: dict[str, Any] = {"losses": [1.0] * 4, "evaluations": [last], "violations": violations}
    return Record(router, 4, **measured, finished=finished, training_seconds=2.0, seconds=3.0)


def test_rows_differences_and_means_are_those_of_the_records() -> None:
    """By hand: the later half of training, differences to the same seed, spreads of them."""
    rows: list[dict[str, Any]] = []
    for seed, (a, b) in enumerate(((2.0, 1.5), (3.0, 2.8))):
        rows.append(row_of(Run("top-k", 2, seed), _record("top-k", [4.0, 3.0, 2.0, 1.0], a, 0.5)))
        rows.append(row_of(Run("mode", 2, seed), _record("mode", [9.0, 9.0, 0.5, 0.25], b, 0.1 * seed)))
    rows.append(row_of(Run("mode", 2, 2), _record("mode", [], 7.0, 0.0)))
    rows.append(row_of(Run("mode-free", 2, 0), _record("mode-free", [1.0], 7.0, 0.0, finished=False)))
    found = summarise(with_differences(rows))
    assert [line["router"] for line in found] == ["top-k", "mode"]
    assert found[0]["training_violation"] == 1.5
    assert found[1]["seeds"] == 3
    assert found[1]["training_violation"] == 0.375
    assert found[1]["difference"] == pytest.approx(-0.35)
    assert found[1]["difference_spread"] == pytest.approx(stdev([-0.5, -0.2]))
    assert found[1]["violation_difference"] == pytest.approx(-0.45)
    assert found[1]["steps_per_second"] == 2.0
    table = table_of(found, 3)
    assert [column.header for column in table.columns][:3] == ["router", "bits/byte", "minus\ntop-k"]
    assert list(table.columns[0].cells) == ["top-k (2 of 3 seeds)", "mode"]
    assert list(table.columns[2].cells) == ["-", "-0.350 ± 0.212"]
    assert not math.isnan(found[1]["max_violation_spread"])


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert balance_report.draw_balance([], tmp_path) == []
    assert balance_report.draw_balance([_record("mode", [], 7.0, 0.0)], tmp_path) == []
    (drawn,) = balance_report.draw_balance([_record("mode", [2.0, 1.0], 7.0, 0.0)], tmp_path, ".svg")
    assert drawn.suffix == ".svg"


def test_the_example_counts_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On sizes that take a second: every controller has its line, and what balances is ahead of what does not."""
    script, rows = Path(__file__).parent.parent / "examples" / "balance.py", tmp_path / "rows.jsonl"
    sizes = ["--seeds", "1", "--tokens", "256", "--steps", "6", "--slow-steps", "6"]
    monkeypatch.setattr("sys.argv", [str(script), *sizes, "--rows", str(rows)])
    made = runpy.run_path(str(script), run_name="__main__")
    found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    assert [row["controller"] for row in found] == list(made["controllers"]())
    late = {row["controller"]: row["late"] for row in found}
    assert late["ExactBalance, T = 0.25"] < late["none"]
    assert late["Quantile"] < late["none"]
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in late)
    assert "never in 6" in printed
