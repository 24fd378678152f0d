"""The study of budgets, on settings that take seconds: what it promises, counts, resumes and draws."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_model import evaluation, figures, process, progress, trainee, training
from language_model.config import ALL_ROUTERS, DemoConfig, DemoError, Run
from language_model.model import build_model
from language_model.process import Interrupted
from language_model.studies import budgets, budgets_report, execution
from language_model.studies.budgets import ROUTERS, BudgetsConfig, preset
from language_model.studies.budgets_report import row_of, summarise
from language_model.texts import load_corpus
from language_model.training import Event

from circuitroute.cli.main import main
from tests.test_demo import TINY, Watcher, assert_same_run, never, png_size, results

STUDY = ["demo", "--study", "budgets"]
SIZES = {"steps": 3, "layers": 2, "experts": 4, "hidden": 32, "batch-size": 2, "seq-len": 16, "seeds": 1}
FIGURES = ("pareto.png", "experts_per_layer.png", "budget_use.png")
CLOCKS = dict.fromkeys(("seconds", "training_seconds", "tokens_per_second"))
SHARED = ("soft-learned", "budget")  # the routers whose layers share something
KEPT = (
    "soft-learned",
    "budget-calibrated",
    "range-k-calibrated",
    "range-k-controlled",
    "exact-k-annealed",
    "dropout-0.2",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _short_validation() -> Iterator[None]:
    """Validation takes longer than training these models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(budgets.CPU, "validation_batches", 4)
        yield


@pytest.fixture(autouse=True)
def _figures_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does drawing."""
    if request.node.name != "test_table_and_figures":
        monkeypatch.setattr(budgets_report, "draw_budgets", lambda *_: [])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def square_{i}(x):\n    return x * {i}\n\n" for i in range(200)))
    return path


@pytest.fixture
def setting(text: Path, tmp_path: Path) -> trainee.Setting:
    config = replace(TINY, text=str(text))
    return trainee.Setting(config, load_corpus(config), torch.device("cpu"), tmp_path / "checkpoints")


def arguments(text: Path, *more: str) -> list[str]:
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    return [*STUDY, *sizes, "--text", str(text), "--budgets", "2", *more]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of all routers, from one end to the other."""
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(text, "--processes", "1", "--out", str(out))) == 0
    return out


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("router", KEPT)
def test_resumed_equals_uninterrupted(router: str, setting: trainee.Setting, tmp_path: Path) -> None:
    """Thresholds, temperatures and prices are no parameters, and must be in the checkpoint."""
    setting = replace(setting, config=replace(setting.config, calibrate_every=3))
    uninterrupted = trainee.start(replace(setting, checkpoints=tmp_path / "whole"), router, resume=False)
    training.train(uninterrupted, Watcher(), never)
    stopped: list[bool] = []
    first = trainee.start(setting, router, resume=False)
    with pytest.raises(Interrupted):
        training.train(first, Watcher(4, lambda: stopped.append(True)), lambda: bool(stopped))
    second = trainee.start(setting, router, resume=True)
    assert second.record.step == 4
    training.train(second, Watcher(), never)
    assert_same_run(uninterrupted, second)
    for (name, left), right in zip(uninterrupted.model.named_buffers(), second.model.buffers(), strict=True):
        assert torch.equal(left, right), name


def test_all_routers_start_from_the_same_weights() -> None:
    first = build_model(TINY, "top-k")
    routers = {layer: first.router(layer) for layer in range(TINY.layers)}
    for name in ALL_ROUTERS:
        model = build_model(TINY, name)
        for layer, router in routers.items():
            own = model.router(layer) or model.plan.budget.router(layer)
            assert torch.equal(own.weight, router.weight)


def test_a_plan_learns_its_tables_at_their_own_rate(setting: trainee.Setting) -> None:
    """Preferences among counts are matrices in shape only: no decay, and they start where the library puts them."""
    budget = trainee.start(setting, "budget", resume=False)
    tables = {id(budget.model.plan.budget.preferences), id(budget.model.plan.budget.estimates)}
    assert not budget.model.plan.budget.preferences.any()
    (group,) = [g for g in budget.optimizer.param_groups if {id(p) for p in g["params"]} == tables]
    training.training_step(budget)
    assert group["weight_decay"] == 0
    assert group["lr"] == pytest.approx(setting.config.table_rate * training.learning_rate(setting.config, 0))
    assert budget.model.plan.budget.preferences.any()
    soft = trainee.start(setting, "soft-learned", resume=False)
    before = soft.model.plan.allocation.eta.clone()
    training.training_step(soft)
    assert not torch.equal(before, soft.model.plan.allocation.eta)


def test_estimates_learn_from_the_plan_s_loss(setting: trainee.Setting) -> None:
    model = build_model(setting.config, "budget")
    _, routings = model(setting.corpus.batch(setting.config, 0)[:, :-1])
    assert float(model.plan.loss(routings).detach()) > 0
    assert build_model(setting.config, "top-k").plan.loss(routings) is None


@pytest.mark.parametrize("router", ["soft-uniform", "soft-learned"])
def test_calibration_executes_the_budget_on_the_text_it_saw(router: str, setting: trainee.Setting) -> None:
    model = build_model(setting.config, router).eval()
    if router == "soft-learned":
        with torch.no_grad():
            model.plan.allocation.eta.copy_(torch.tensor([0.5, -0.5]))
    tokens = setting.corpus.batch(setting.config, 0)[:, :-1]
    model.calibrate(tokens)
    _, routings = model(tokens)
    executed = [float(routing.counts.double().mean()) for routing in routings]
    mass = [float(routing.marginals.detach().sum(-1).mean()) for routing in routings]
    assert executed == pytest.approx(mass, abs=1 / tokens.numel())
    assert sum(executed) == pytest.approx(2 * setting.config.k, abs=2 / tokens.numel())
    assert (executed[0] > executed[1] + 0.2) == (router == "soft-learned")


def test_calibration_sees_training_text_alone(setting: trainee.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    soft = trainee.start(setting, "soft-uniform", resume=False)
    calibrate = soft.model.calibrate
    monkeypatch.setattr(soft.model, "calibrate", lambda tokens: (seen.append(tokens), calibrate(tokens)))
    training.train(soft, Watcher(), never)
    assert len(seen) == 1 + 2  # at step 0, and before two validations
    train = bytes(setting.corpus.train.tolist())
    assert all(bytes(row.tolist()) in train for tokens in seen for row in tokens)


def test_totals_are_counted_by_token(setting: trainee.Setting) -> None:
    model = build_model(setting.config, "range-k")
    batches = setting.corpus.validation(setting.config)
    found = evaluation.evaluate(model, batches, 0, never)
    totals = [0] * (2 * 4 + 1)
    with torch.no_grad():
        for tokens in batches:
            _, routings = model.eval()(tokens[:, :-1])
            for total in sum(routing.counts for routing in routings).tolist():
                totals[total] += 1
    assert found.executed_totals == totals
    assert found.soft_mass is None


def test_the_demo_takes_every_router(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a swap oracle where there is no circuit of one layer."""
    words = arguments(text)[3:-2]
    seeds = words.index("--seeds")
    words = ["demo", *words[:seeds], *words[seeds + 2 :], "--k", "2", "--routers", *SHARED]
    assert main([*words, "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)["rows"]
    assert [row["router"] for row in rows] == list(SHARED)
    assert [row["swap_oracle_correlation"] for row in rows] == [None, None]


# ---------------------------------------------------------------------------------------------- the command


def test_every_run_has_its_row(whole: Path, text: Path) -> None:
    found = results(whole)
    assert found["complete"]
    assert found["study"] == "budgets"
    assert found["command"] == " ".join(["circuitroute", *arguments(text, "--processes", "1", "--out", str(whole))])
    assert found["versions"]["torch"] == torch.__version__
    assert [(row["router"], row["k"], row["seed"]) for row in found["rows"]] == [(name, 2, 0) for name in ROUTERS]
    assert [row["router"] for row in found["summary"]] == list(ROUTERS)
    for row in found["rows"]:
        assert (row["steps"], row["finished"]) == (3, True)
        assert 0 < row["bits_per_byte"] < 9
        assert 1 <= row["executed"] <= 4
        assert sum(row["executed_per_layer"]) == pytest.approx(row["total_mean"])
        assert row["total_mean"] == pytest.approx(2 * row["executed"])
        assert (row["soft_mass"] is None) == (not row["router"].startswith("soft"))
        assert [name for name, value in row.items() if value is None and not name.startswith("soft")] == []


@pytest.mark.parametrize("router", ["top-k", "exact-k-0.25", "budget-calibrated"])
def test_executed_experts_are_equal_where_that_is_promised(router: str, whole: Path) -> None:
    (row,) = [row for row in results(whole)["rows"] if row["router"] == router]
    tokens = sum(row["totals"])
    assert row["totals"] == [tokens if total == 4 else 0 for total in range(9)]
    assert (row["total_spread"], row["over_budget"], row["executed"]) == (0, 0, 2)


@pytest.mark.parametrize("router", ["soft-uniform", "soft-learned"])
def test_soft_mass_and_executed_experts_are_told_apart(router: str, whole: Path) -> None:
    (row,) = [row for row in results(whole)["rows"] if row["router"] == router]
    assert sum(row["soft_mass_per_layer"]) == pytest.approx(4, abs=1e-4)
    # On held-out text, with thresholds from training text: near the budget, token by token above and below it.
    assert row["executed"] == pytest.approx(2, abs=0.4)
    assert row["total_spread"] > 0
    assert 0 < row["over_budget_share"] < 1


def test_table_and_figures(whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made from the checkpoints: nothing is trained again."""
    for name in FIGURES:
        assert min(png_size(whole / name)) > 200
    assert main([*STUDY, "--resume", "--processes", "1", "--out", str(whole)]) == 0
    shown = capsys.readouterr().out
    for word in (*ROUTERS, "6/6", "bits/byte", "over budget", "1 seed", *(str(whole / name) for name in FIGURES)):
        assert word in shown
    assert results(whole)["command"] == f"circuitroute demo --study budgets --resume --processes 1 --out {whole}"


def test_two_processes_stop_and_resume_to_the_same_numbers(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: progress.PlainStudyProgress, event: Event) -> None:
        if not told:
            signal.raise_signal(signal.SIGINT)
        told.append(event)

    told: list[Event] = []
    # Long enough for both workers to be stopped before they are through.
    words = arguments(text, "--steps", "40", "--routers", "top-k", "soft-uniform", "soft-learned")
    assert main([*words, "--processes", "1", "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "half [way]"
    with monkeypatch.context() as patch:
        patch.setattr(execution, "POLL", 0.01)
        patch.setattr(progress.PlainStudyProgress, "__call__", interrupt)
        assert main([*words, "--processes", "2", "--out", str(out)]) == 130
    assert f"--study budgets --resume --out '{out}'" in capsys.readouterr().out
    partial = results(out)
    assert not partial["complete"]
    assert partial["rows"]
    assert main([*STUDY, "--resume", "--processes", "1", "--out", str(out)]) == 0
    resumed, wanted = results(out), results(tmp_path / "whole")
    assert resumed["complete"]
    assert [{**row, **CLOCKS} for row in resumed["rows"]] == [{**row, **CLOCKS} for row in wanted["rows"]]


def test_interrupted_within_a_run(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: progress.PlainStudyProgress, event: Event) -> None:
        if (event.run.router, event.kind, event.step) == ("exact-k-0.25", "step", 2):
            signal.raise_signal(signal.SIGINT)

    routers = ("--routers", "top-k", "exact-k-0.25")
    with monkeypatch.context() as patch:
        patch.setattr(progress.PlainStudyProgress, "__call__", interrupt)
        assert main(arguments(text, *routers, "--processes", "1", "--out", str(tmp_path))) == 130
    partial = results(tmp_path)
    assert [(row["steps"], row["finished"]) for row in partial["rows"]] == [(3, True), (2, False)]
    assert [row["router"] for row in partial["summary"]] == ["top-k"]
    assert main([*STUDY, "--resume", "--processes", "1", "--out", str(tmp_path)]) == 0
    same = [{**row, **CLOCKS} for row in results(whole)["rows"][:2]]
    assert [{**row, **CLOCKS} for row in results(tmp_path)["rows"]] == same


def test_interrupted_before_anything(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "training_step", interrupt)
    assert main(arguments(text, "--processes", "1", "--out", str(tmp_path))) == 130
    found = results(tmp_path)
    assert (found["rows"], found["summary"], found["figures"], found["complete"]) == ([], [], [], False)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--study", "budget"], "argument --study: must be one of balance, budgets, learning, got 'budget'"),
        (["--k", "2"], "argument --k: this study takes several: --budgets 2"),
        (["--budgets", "5"], "argument --budgets: must lie between 1 and the number of experts, 4, got 5"),
        (["--budgets", "2", "2"], "argument --budgets: must name different numbers of experts, got 2 2"),
        (["--seeds", "0"], "argument --seeds: must be at least 1, got 0"),
        (["--seed", str(2**31 - 1), "--seeds", "2"], "argument --seed: must be below"),
        (["--processes", "0"], "argument --processes: must be at least 1, got 0"),
        (["--routers", "switch"], "argument --routers: must name some of top-k, exact-k, range-k, soft-uniform"),
        (["--device", "abacus"], "argument --device: 'abacus' is not usable here"),
    ],
)
def test_wrong_options_are_named(
    more: list[str], says: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(text, *more, "--out", str(tmp_path / "out"))) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "study"),
    [
        ("budgets", "budgets"),
        ("seeds", "balance"),
        ("processes", "balance"),
        ("regimes", "learning"),
        ("minutes", "learning"),
    ],
)
def test_options_of_studies_need_one(option: str, study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", f"--{option}", "2"]) == 2
    assert f"argument --{option}: belongs to studies: add --study {study}" in capsys.readouterr().err


def test_options_of_another_study_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STUDY, "--minutes", "2"]) == 2
    assert "argument --minutes: belongs to the study of learning: leave it out" in capsys.readouterr().err


def test_resume_refuses_another_study(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main([*words, "--resume", "--out", str(whole)]) == 2
        return capsys.readouterr().err

    assert "argument --budgets: the run in" in refused(*STUDY, "--budgets", "2", "3")
    assert "argument --seeds: the run in" in refused(*STUDY, "--seeds", "2")
    assert "argument --hidden: the run in" in refused(*STUDY, "--hidden", "64")
    assert "holds the study 'budgets': add --study budgets" in refused("demo")
    record = whole / "run.json"
    kept = record.read_text()
    try:
        record.write_text(json.dumps({**json.loads(kept), "text": "0"}))
        assert "another text" in refused(*STUDY)
        record.write_text(json.dumps({**json.loads(kept), "config": {}}))
        assert "run.json is damaged" in refused(*STUDY)
        record.write_text(json.dumps({name: value for name, value in json.loads(kept).items() if name != "study"}))
        assert "holds a run of the demo: leave --study out" in refused(*STUDY)
    finally:
        record.write_text(kept)
    assert main([*STUDY, "--resume", "--out", str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_a_fresh_study_removes_an_earlier_ones_files_alone(text: Path, tmp_path: Path) -> None:
    words = arguments(text, "--steps", "1", "--processes", "1", "--out", str(tmp_path))
    assert main([*words, "--routers", "top-k"]) == 0
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*words, "--routers", "budget", "--seed", "1"]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints.glob("*/*")] == ["budget.safetensors"]


# ---------------------------------------------------------------------------------------------- workers


def small_study(text: Path, tmp_path: Path, **fields: Any) -> execution.Study:
    config = BudgetsConfig(replace(TINY, text=str(text), oracle_rounds=0, **fields), (2,), 1)
    return execution.Study(config, {"": load_corpus(config.base)}, torch.device("cpu"), tmp_path / "checkpoints")


def test_a_worker_that_dies_is_an_error_with_a_remedy(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, *_: Any) -> None: ...
        def shutdown(self, **_: Any) -> None: ...
        def submit(self, *_: Any) -> Any:
            raise BrokenProcessPool

    monkeypatch.setattr(execution, "ProcessPoolExecutor", Broken)
    with pytest.raises(DemoError, match="a worker process died") as died:
        execution.execute(small_study(text, tmp_path), 2, never_told, never)
    assert died.value.argument == "processes"
    with pytest.raises(Interrupted):  # Ctrl-C may reach a worker before it is ready for it
        execution.execute(small_study(text, tmp_path), 2, never_told, lambda: True)


def never_told(event: Event) -> None: ...


def test_ctrl_c_waits_while_workers_start() -> None:
    with process.interruptible() as stop:
        with process.interrupts_held():
            signal.raise_signal(signal.SIGINT)
            held = not stop()
        assert stop()
    assert held == hasattr(signal, "pthread_sigmask")


def test_workers_read_the_text_that_the_study_began_with(text: Path, tmp_path: Path) -> None:
    """Whatever becomes of the file: they are given what was read."""
    passing = tmp_path / "passing.txt"
    passing.write_bytes(text.read_bytes())
    made = small_study(passing, tmp_path, routers=("top-k", "soft-uniform"))
    passing.unlink()
    finished: list[Event] = []
    execution.execute(made, 2, lambda event: finished.append(event) if event.kind == "finished" else None, never)
    alone = replace(made, checkpoints=tmp_path / "alone")
    execution.execute(alone, 1, never_told, never)
    for run in made.config.runs():
        together, apart = made.record(run), alone.record(run)
        assert together.losses == apart.losses
        assert together.evaluations == apart.evaluations
    assert sorted(event.run for event in finished) == sorted(made.config.runs())


def test_bars_follow_events_in_any_order() -> None:
    rich = pytest.importorskip("rich.progress")
    bars = rich.Progress(console=pytest.importorskip("rich.console").Console(quiet=True))
    first, second = Run("top-k", 2, 0), Run("budget", 2, 0)
    tell = progress.BarStudyProgress(bars, {first: 10, second: 20})
    for event in (
        Event(first, "begin", 0),
        Event(second, "step", 4),
        Event(first, "finished", 10, bits=2.5),
        Event(first, "step", 9),  # late
        Event(second, "validated", 5, bits=3.0),
    ):
        tell(event)
    assert [(task.description, task.completed) for task in bars.tasks] == [("all runs", 15), (str(second), 5)]


# ---------------------------------------------------------------------------------------------- the numbers


def test_runs_go_seed_by_seed() -> None:
    config = BudgetsConfig(replace(TINY, routers=("top-k", "budget"), seed=7), (2, 1), 2)
    assert [run[:3] for run in config.runs()] == [
        (router, k, seed) for seed in (7, 8) for k in (2, 1) for router in ("top-k", "budget")
    ]
    assert BudgetsConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(DemoError, match="got none"):
        BudgetsConfig(TINY, ())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_are_valid_and_give_way(device: str) -> None:
    usual = preset(torch.device(device), {})
    assert usual.base.routers == ROUTERS
    assert len(usual.runs()) == 6 * (2 if device == "cuda" else 4) * 3
    assert preset(torch.device(device), {"layers": 3, "steps": 5}, [1], 2).runs()[-1] == Run("soft-learned", 1, 1)
    if device == "cuda":
        assert usual.base.hidden * usual.base.steps > 10 * DemoConfig.hidden * DemoConfig.steps


def record_with(totals: list[int], bits: float = 2.0) -> trainee.Record:
    last = evaluation.Evaluation(
        step=6,
        bits_per_byte=bits,
        executed=0.0,
        load_entropy=0.9,
        max_violation=0.5,
        utilization=[[0.5, 1.0, 0.0, 0.0], [1.0, 0.25, 0.25, 1.0]],
        executed_counts=[],
        executed_totals=totals,
        soft_mass=None,
    )
    return trainee.Record("range-k", 6, [], [last], None, True, 2.0, 3.0)


def test_rows_are_what_one_counts_by_hand() -> None:
    row = row_of(Run("range-k", 2, 0), record_with([0, 0, 2, 0, 1, 0, 1, 0, 0]), TINY)
    assert row["budget"] == 4
    assert row["total_mean"] == pytest.approx((2 + 2 + 4 + 6) / 4)
    assert row["executed"] == pytest.approx(3.5 / 2)
    assert row["total_spread"] == pytest.approx(math.sqrt((1.5**2 + 1.5**2 + 0.5**2 + 2.5**2) / 4))
    assert (row["total_max"], row["over_budget"], row["over_budget_share"]) == (6, 1, 0.25)
    assert row["executed_per_layer"] == [1.5, 2.5]
    assert row["tokens_per_second"] == pytest.approx(6 * TINY.tokens_per_step / 2.0)
    empty = row_of(Run("range-k", 2, 0), trainee.Record("range-k"), TINY)
    assert empty.keys() == row.keys()
    assert empty["executed"] is None


def test_summaries_are_what_one_computes_by_hand() -> None:
    rows = []
    for seed, (top, budget) in enumerate([(2.0, 1.9), (2.3, 2.1), (2.6, 2.5)]):
        for router, bits in (("top-k", top), ("budget", budget)):
            record = record_with([0, 0, 0, 0, 4 - seed, seed, 0, 0, 0], bits)
            rows.append(row_of(Run(router, 2, seed), record, TINY))
    rows.append({**rows[-1], "finished": False, "bits_per_byte": 100.0, "seed": 3})
    top, budget = summarise(rows)
    assert (top["router"], budget["router"], budget["seeds"]) == ("top-k", "budget", 3)
    assert top["bits_per_byte"] == pytest.approx(2.3)
    assert top["bits_per_byte_spread"] == pytest.approx(0.3)
    assert budget["difference"] == pytest.approx(-0.4 / 3)
    assert budget["difference_spread"] == pytest.approx(math.sqrt(2 / 3) * 0.1 / math.sqrt(2))
    assert (budget["over_budget"], budget["total_max"]) == (3, 5)
    assert budget["over_budget_share"] == pytest.approx((0 + 0.25 + 0.5) / 3)
    assert budget["totals"] == [0, 0, 0, 0, 9, 3, 0, 0, 0]
    assert budget["executed_per_layer"] == [1.5, 2.5]
    assert budget["executed_per_layer_spread"] == [0, 0]
    assert budget["soft_mass"] is None
    (alone,) = summarise(rows[1:2])  # no top-k to compare with, and one seed
    assert (alone["difference"], alone["bits_per_byte_spread"]) == (None, None)
    assert summarise([]) == []


# ---------------------------------------------------------------------------------------------- figures

NAN = math.nan
DRAW: dict[str, Callable[[Path], Path]] = {
    "pareto": lambda path: figures.pareto(
        {"a": ([2, 1], [1.0, 2.0], [0, 0.1], [NAN, 0.1]), "b": ([1], [1], [0], [0])}, path
    ),
    "experts_per_layer": lambda path: figures.experts_per_layer(
        {"k = 2": {"a": ([1, 3], [0.1, NAN])}, "k = 4": {"a": ([4, 4], [0, 0])}}, path
    ),
    "budget_use": lambda path: figures.budget_use(
        {"k = 1": (2, {"a": [0, 1, 3], "b": [0, 0, 2, 2]}), "k = 2": (4, {"a": [0, 0, 0, 0, 1], "b": [0, 0, 5]})}, path
    ),
}


@pytest.mark.parametrize("name", list(DRAW))
def test_figures_are_drawn_as_png_or_svg(name: str, tmp_path: Path) -> None:
    assert min(png_size(DRAW[name](tmp_path / "figure.png"))) > 200
    drawn = DRAW[name](tmp_path / "figure.svg").read_text()
    assert drawn.startswith("<?xml")
    assert drawn == DRAW[name](tmp_path / "again.svg").read_text()


def test_figures_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="fronts is empty"):
        figures.pareto({}, path)
    with pytest.raises(ValueError, match="four vectors of one length"):
        figures.pareto({"a": ([1, 2], [1.0], [0], [0])}, path)
    with pytest.raises(ValueError, match="two vectors of one length"):
        figures.experts_per_layer({"k": {"a": ([1, 2], [0.0])}}, path)
    with pytest.raises(ValueError, match="must all have the same names: a"):
        figures.budget_use({"x": (1, {"a": [1]}), "y": (1, {"b": [1]})}, path)
    with pytest.raises(ValueError, match="not all 0"):
        figures.budget_use({"x": (1, {"a": [0, 0]})}, path)
    assert not path.exists()
