"""The study of learning, on settings that take seconds: its texts, routers, regimes and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_model import checkpoint, figures, trainee, training
from language_model.config import ALL_ROUTERS, DemoConfig, DemoError, Run
from language_model.corpus import make_corpus
from language_model.evaluation import Evaluation, evaluate
from language_model.kinds import KINDS
from language_model.model import build_model
from language_model.studies import learning, learning_report
from language_model.studies.execution import Study
from language_model.studies.kinds import KINDS as STUDIES
from language_model.studies.learning import AGAIN, LearningConfig, Regime, fitted, preset
from language_model.studies.learning_report import row_of, summarise, table_of
from language_model.texts import load_corpus

import circuitroute as cr
from circuitroute.cli.main import main
from tests.test_demo import TINY, Watcher, never, png_size, results

STUDY = ["demo", "--study", "learning", "--processes", "1"]
SIZES = ("--steps", "3", "--layers", "2", "--experts", "4", "--hidden", "32", "--batch-size", "2", "--seq-len", "16")
CPU = torch.device("cpu")
WITH_TEST = replace(TINY, test_batches=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes through 20 windows."""
    monkeypatch.setattr(learning, "LITTLE", 340)
    monkeypatch.setattr(learning, "PASSES", 2)
    monkeypatch.setattr(learning, "CPU", {**learning.CPU, "validation_batches": 2, "test_batches": 2})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def square_{i}(x):\n    return x * {i}\n\n" for i in range(200)))
    return path


@pytest.fixture
def setting(text: Path, tmp_path: Path) -> trainee.Setting:
    config = replace(WITH_TEST, text=str(text))
    return trainee.Setting(config, load_corpus(config), CPU, tmp_path / "checkpoints")


# ---------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(("language", "word"), [("python", b"def "), ("c++", b"namespace "), ("english", b" the ")])
def test_every_language_has_two_held_out_parts(language: Any, word: bytes) -> None:
    config = replace(WITH_TEST, language=language)
    found = load_corpus(config)
    parts = [bytes(part.tolist()) for part in (found.train, found.valid, found.test)]
    assert all(word in part for part in parts)
    assert min(map(len, parts)) > 50_000
    assert not any(held_out[:2000] in parts[0] for held_out in parts[1:])
    assert parts[1][:2000] not in parts[2]
    assert found.digest == load_corpus(config).digest
    one = load_corpus(replace(config, test_batches=0))
    assert torch.equal(one.valid, found.valid)
    assert (one.test.numel(), one.train.numel() > found.train.numel()) == (0, True)
    limited = load_corpus(replace(config, text_limit=1000))
    assert torch.equal(limited.train, found.train[:1000])
    assert limited.digest != found.digest


def test_a_text_of_ones_own_has_two_held_out_ends(text: Path) -> None:
    data = text.read_bytes()
    found = load_corpus(replace(WITH_TEST, text=str(text)))
    assert bytes(torch.cat([found.train, found.valid, found.test]).tolist()) == data
    assert found.valid.numel() == found.test.numel() == len(data) // 10


def test_a_second_part_that_is_too_small_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(range(250)))
    with pytest.raises(DemoError, match=r"25 \+ 25 held out"):
        load_corpus(replace(WITH_TEST, text=str(path)))


def test_a_pass_reads_every_window_once() -> None:
    text = make_corpus(bytes(i % 256 for i in range(32 * 10 + 20)), bytes(40), "counting")
    config = replace(TINY, passes=True)
    assert text.steps_per_pass(config) == 10

    def starts(number: int) -> list[int]:
        windows = torch.cat([text.batch(config, 10 * number + i) for i in range(10)])
        assert bool(((windows[:, 1:] - windows[:, :-1]) % 256 == 1).all())
        return [int(start) for start in windows[:, 0]]

    first, second = starts(0), starts(1)
    for found in (first, second):
        places = sorted((start - found[0]) % 256 % 16 for start in found)
        assert places == [0] * 20  # one grid
        assert len(found) == 20
    assert first != second
    assert starts(0) == first
    other = torch.cat([text.batch(replace(config, seed=1), i) for i in range(10)])[:, 0].tolist()
    assert other != first


# ---------------------------------------------------------------------------------------------- routers


def test_every_router_has_a_kind() -> None:
    assert tuple(KINDS) == ALL_ROUTERS


@pytest.mark.parametrize("router", ALL_ROUTERS)
def test_every_router_trains(router: str, setting: trainee.Setting) -> None:
    run = trainee.start(setting, router, resume=False)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    losses = [training.training_step(run) for _ in range(2)]
    assert all(0 < loss < 6 for loss in losses)
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    routers = {name for name in before if "router" in name and name.endswith("weight")}
    assert "head.weight" in moved
    assert (routers <= moved) == (router != "frozen")


def test_annealing_goes_down_by_the_step(setting: trainee.Setting) -> None:
    seen: list[float] = []
    run = trainee.start(setting, "exact-k-annealed", resume=False)
    training.train(
        run, lambda event: seen.append(run.model.router(0).temperature) if event.kind == "step" else None, never
    )
    assert seen == pytest.approx([0.125 ** (step / 6) for step in range(6)])


@pytest.mark.parametrize("router", ["range-k-calibrated", "budget-calibrated"])
def test_calibration_finds_the_agreement(router: str, setting: trainee.Setting) -> None:
    model = build_model(setting.config, router)
    tokens = setting.corpus.batch(setting.config, 0)[:, :-1]
    state = torch.get_rng_state()
    model.calibrate(tokens)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    temperatures = model.plan.temperatures
    assert bool((temperatures > 0).all())
    assert bool((temperatures != 1).all())
    if router == "range-k-calibrated":
        with torch.no_grad():
            _, routings = model.eval()(tokens)
        for routing in routings:
            assert float(cr.metrics.mode_agreement(routing).mean()) == pytest.approx(0.75, abs=2e-3)


def test_a_price_holds_the_count(setting: trainee.Setting) -> None:
    run = trainee.start(setting, "range-k-controlled", resume=False)
    before = run.model.plan.price.clone()
    with torch.no_grad():
        _, routings = run.model.eval()(setting.corpus.batch(setting.config, 0)[:, :-1])
    run.model.train()
    training.training_step(run)
    mean = float(torch.stack([routing.counts.double().mean() for routing in routings]).mean())
    assert float(run.model.plan.price - before) == pytest.approx(0.05 * (mean - setting.config.k), abs=1e-6)


def test_a_bias_moves_the_load_and_no_loss_does(setting: trainee.Setting) -> None:
    run = trainee.start(setting, "top-k-bias", resume=False)
    tokens = setting.corpus.batch(setting.config, 0)[:, :-1]
    with torch.no_grad():
        _, routings = run.model(tokens)
    loads = [routing.mask.sum(dim=0) for routing in routings]
    weighty = replace(setting.config, balance_weight=1e3)
    assert (
        training.auxiliary_loss(routings, weighty, "top-k-bias")
        < 1
        < training.auxiliary_loss(routings, weighty, "top-k")
    )
    training.training_step(run)
    for layer, load in enumerate(loads):
        wanted = [3e-3 * ((mean := float(load.sum()) / 4) > n) - 3e-3 * (mean < n) for n in load.tolist()]
        assert run.model.plan.bias[layer].tolist() == pytest.approx(wanted)
    with torch.no_grad():
        run.model.plan.bias[0] = torch.tensor([-100.0, -100.0, 0.0, 0.0])
        assert run.model(tokens)[1][0].mask.sum(dim=0).tolist() == [0, 0, 32, 32]


def test_dropout_depends_on_seed_and_step_alone(setting: trainee.Setting) -> None:
    losses = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        run = trainee.start(setting, "dropout-0.3", resume=False)
        losses.append(training.training_step(run))
        assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[1]
    assert losses[0] != training.training_step(trainee.start(setting, "top-k", resume=False))


def test_the_noise_floor_is_the_same_mathematics(setting: trainee.Setting) -> None:
    runs = [trainee.start(setting, router, resume=False) for router in ("top-k", AGAIN)]
    first, again = ([training.training_step(run) for _ in range(3)] for run in runs)
    assert again == pytest.approx(first, rel=1e-4)


def test_agreement_is_measured_where_training_samples(setting: trainee.Setting) -> None:
    batches = setting.corpus.validation(setting.config)
    for router in ("exact-k", "exact-k-0.25", "mode", "top-k", "soft-uniform"):
        model = build_model(setting.config, router)
        found = evaluate(model, batches, 0, never, setting.corpus.testing(setting.config))
        assert found.test_bits_per_byte != found.bits_per_byte
        if not router.startswith("exact"):
            assert found.mode_agreement is None
            continue
        with torch.no_grad():
            model.eval()
            agreements = [cr.metrics.mode_agreement(r) for tokens in batches for r in model(tokens[:, :-1])[1]]
        assert found.mode_agreement == pytest.approx(float(torch.cat(agreements).mean()), abs=1e-6)
    assert evaluate(model, batches, 0, never).test_bits_per_byte is None


# ---------------------------------------------------------------------------------------------- pretrained weights


def test_fine_tuning_starts_from_the_pretrained_weights(setting: trainee.Setting, tmp_path: Path) -> None:
    training.train(trainee.start(setting, "top-k", resume=False), Watcher(), never)
    pretrained = setting.checkpoint("top-k")
    saved = checkpoint.load_tensors(pretrained)
    tuned = replace(setting, config=replace(setting.config, pretrained_steps=6), pretrained=pretrained)
    for router in ("exact-k-0.5", "soft-learned", "budget", "frozen"):
        model = trainee.start(tuned, router, resume=False).model
        own = model.router(1) or model.plan.budget.router(1)
        assert torch.equal(own.weight, saved["model.blocks.1.experts.router.weight"])
        assert torch.equal(model.head.weight, saved["model.head.weight"])
        assert torch.equal(model.blocks[0].experts.experts.up, saved["model.blocks.0.experts.experts.up"])
    assert not model.router(0).weight.requires_grad
    other = replace(tuned, config=replace(tuned.config, hidden=64))
    with pytest.raises(DemoError, match=r"the pretrained model has no embedding.weight of shape \[256, 64\]"):
        trainee.start(other, "top-k", resume=False)


# ---------------------------------------------------------------------------------------------- the preset


def test_the_preset_has_three_regimes() -> None:
    config = preset(CPU, {})
    names = [regime.name for regime in config.regimes]
    assert names == ["pretraining", "scratch", "plenty", "little"]
    assert [regime.seeds for regime in config.regimes] == [3, 5, 3, 3]
    pretraining, scratch, plenty, little = (regime.config for regime in config.regimes)
    assert (scratch.language, plenty.language, little.language) == ("python", "c++", "english")
    assert plenty.pretrained_steps == little.pretrained_steps == pretraining.steps
    assert scratch.pretrained_steps == 0
    text = load_corpus(little)
    assert little.steps == 12 * text.steps_per_pass(little)
    assert little.validations == 12
    assert "dropout-0.3" in little.routers
    assert {"top-k", "exact-k", "exact-k-0.25", "probe", "densemixer", AGAIN} <= set(scratch.routers)
    run = Run("mode", 2, 1, "little")
    assert run in config.runs()
    assert config.pretraining(run) == Run("top-k", 2, 1, "pretraining")
    assert config.pretraining(Run("mode", 2, 1, "scratch")) is None
    assert LearningConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_what_the_command_line_sets_goes_first() -> None:
    config = preset(CPU, {"steps": 10, "routers": ("top-k", "mode"), "layers": 3}, ["scratch"], 2)
    (regime,) = config.regimes
    assert (regime.seeds, regime.config.steps, regime.config.layers) == (2, 10, 3)
    assert [run[:3] for run in config.runs()] == [(r, 2, seed) for seed in (0, 1) for r in ("top-k", "mode")]
    cuda = preset(torch.device("cuda"), {})
    assert [regime.name for regime in cuda.regimes] == ["pretraining", "scratch", "little"]
    assert cuda.regime("scratch").config.experts == 64
    assert cuda.regime("scratch").config.steps >= 1000


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--regimes", "much"], "argument --regimes: must name some of scratch, plenty, little, got ['much']"),
        (["--regimes", "little", "little"], "argument --regimes: names a regime twice: little little"),
        (["--seeds", "0"], "argument --seeds: must be at least 1, got 0"),
        (["--minutes", "0"], "argument --minutes: must be positive, got 0"),
        (["--budgets", "2"], "argument --budgets: belongs to the study of budgets: leave it out"),
        (["--k", "17"], "argument --k: must be at most the number of experts"),
    ],
)
def test_wrong_options_are_named(
    more: list[str], says: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*STUDY, "--text", str(text), "--batch-size", "2", *more, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_long_a_study_is_shortened_beforehand(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[tuple[str, str], float] = {}

    def timed(config: LearningConfig, *_: Any) -> dict[tuple[str, str], float]:
        names = [(regime.name, router) for regime in config.regimes for router in regime.config.routers]
        seconds.update(dict.fromkeys(names, 0.06))
        return seconds

    monkeypatch.setattr(learning, "_seconds_of_steps", timed)
    config = preset(CPU, {"routers": ("top-k", "probe")})
    validating = (8 + 24) / 3
    expected = 0.06 / 60 * (3 * (750 + validating) + 10 * (250 + 5 * validating) + 6 * (250 + 5 * validating))
    expected += 0.06 / 60 * 6 * (12 * 39 + 12 * validating)
    same, takes = fitted(config, {}, CPU, 60.0, 1)
    assert (same, takes) == (config, pytest.approx(expected))
    half, takes = fitted(config, {}, CPU, expected / 4, 2)
    assert 0.8 * expected / 4 < takes <= expected / 4
    before, scratch, plenty, little = (regime.config for regime in half.regimes)
    assert 300 < before.steps < 375
    assert before.steps == pytest.approx(3 * scratch.steps, abs=3)
    assert plenty.steps == scratch.steps
    assert plenty.pretrained_steps == little.pretrained_steps == before.steps
    assert little.steps == 39 * little.validations
    assert little.validations == 5


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("_short")
def test_a_study_from_end_to_end(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*STUDY, *SIZES, "--k", "2", "--seeds", "2", "--text", str(text), "--routers", "top-k", "exact-k-0.5"]
    out = tmp_path / "whole"
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("scratch:", "plenty:", "little:", "minus top-k", "14/14", "half way", "best step"):
        assert word in shown
    found = results(out)
    assert found["complete"]
    assert sorted(found["texts"]) == ["little", "plenty", "pretraining", "scratch"]
    assert [row["regime"] for row in found["rows"]] == ["pretraining"] * 2 + [
        name for name in ("scratch", "plenty", "little") for _ in range(4)
    ]
    little = [row for row in found["rows"] if row["regime"] == "little"]
    assert all(row["steps"] == 2 * 10 and len(row["curve"]) == 2 for row in little)
    assert all(0 < row["last"] < 9 for row in found["rows"])
    for name in found["figures"]:
        assert min(png_size(out / name)) > 200
    assert len(found["figures"]) == 2
    # Nothing is trained again, and other options are refused.
    monkeypatch.setattr(training, "training_step", None)
    assert main([*STUDY, "--resume", "--out", str(out)]) == 0
    assert results(out)["rows"] == found["rows"]
    capsys.readouterr()
    for option in ("--steps", "--seeds"):
        assert main([*STUDY, "--resume", "--out", str(out), option, "9"]) == 2
        assert f"argument {option}: the run in" in capsys.readouterr().err
    assert main([*STUDY, "--resume", "--out", str(out), "--regimes", "little"]) == 2
    assert "argument --regimes: the run in" in capsys.readouterr().err


@pytest.mark.usefixtures("_short")
def test_time_is_taken_before_anything_is_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*STUDY, *SIZES, "--text", str(text), "--routers", "top-k", "--seeds", "1", "--regimes", "scratch"]
    assert main([*words, "--minutes", "10", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Timing some steps of every router." in shown
    assert "as timed here" in shown
    assert [row["steps"] for row in results(tmp_path)["rows"]] == [3]


# ---------------------------------------------------------------------------------------------- the numbers


def evaluation(step: int, bits: float, tested: float) -> Evaluation:
    return Evaluation(step, bits, 2.0, 0.9, 0.5, [[0.5] * 4] * 2, [], [0] * 9, None, 0.8, tested)


def record_with(router: str, curve: list[tuple[int, float, float]]) -> trainee.Record:
    return trainee.Record(router, 4, [], [evaluation(*point) for point in curve], None, True, 2.0, 3.0)


def test_numbers_are_what_one_computes_by_hand() -> None:
    config = replace(WITH_TEST, steps=4, passes=True)
    curves = {
        ("top-k", 0): [(1, 3.0, 3.1), (2, 2.0, 2.2), (4, 2.5, 2.7)],
        ("mode", 0): [(1, 3.0, 3.0), (2, 2.1, 2.1), (4, 1.9, 2.0)],
        ("top-k", 1): [(1, 3.0, 3.1), (2, 2.0, 2.0), (4, 2.5, 2.5)],
        ("mode", 1): [(1, 1.0, 3.0), (2, 2.1, 2.2), (4, 1.9, 2.4)],
    }
    rows = [
        row_of(Run(router, 2, seed, "little"), record_with(router, curve), config)
        for (router, seed), curve in curves.items()
    ]
    assert [(row["half"], row["last"], row["best"], row["best_step"]) for row in rows] == [
        (2.2, 2.7, 2.2, 2),
        (2.1, 2.0, 2.0, 4),
        (2.0, 2.5, 2.0, 2),
        (2.2, 2.4, 3.0, 1),
    ]
    before = {**rows[0], "regime": "pretraining"}
    unfinished = {**rows[1], "finished": False, "seed": 2}
    top, mode = summarise([before, *rows, unfinished])
    assert (top["router"], mode["router"], mode["seeds"]) == ("top-k", "mode", 2)
    assert mode["last_difference"] == pytest.approx((-0.7 - 0.1) / 2)
    assert mode["last_difference_spread"] == pytest.approx(0.6 / math.sqrt(2))
    assert (mode["last_better"], mode["half_better"], mode["best_better"], mode["last_pairs"]) == (2, 1, 1, 2)
    assert mode["half_difference"] == pytest.approx(0.05)
    assert mode["best_difference"] == pytest.approx(0.4)
    assert mode["curve"] == [[1, 2, 4], pytest.approx([3.0, 2.15, 2.2])]
    assert top["last_difference"] == 0
    table = table_of("little", [top, mode], LearningConfig((Regime("little", config, 2),)))
    assert table.row_count == 2
    (alone,) = summarise(rows[1:2])
    assert (alone["last_difference"], alone["last_spread"], alone["last_pairs"]) == (None, None, 0)
    empty = row_of(Run("mode", 2, 0, "little"), trainee.Record("mode"), config)
    assert empty.keys() == rows[0].keys()
    assert (empty["last"], empty["best"]) == (None, None)


def test_an_empty_study_reports_nothing(tmp_path: Path) -> None:
    assert learning_report.draw_learning([], tmp_path) == []
    assert summarise([]) == []
    kind = STUDIES["learning"]
    config = preset(CPU, {"steps": 1, "routers": ("top-k",)}, ["scratch"], 1)
    study = Study(config, {"scratch": make_corpus(b"", b"", "nothing")}, CPU, tmp_path)
    assert study.record(study.config.runs()[0]) is None
    assert "1 routers x 1 seeds" in kind.describe(config)


def test_figures(tmp_path: Path) -> None:
    panels = {"a": {"x": (0.1, 0.05), "y": (-0.2, math.nan)}, "b": {"x": (0.0, 0.1)}}
    drawn = figures.differences(panels, tmp_path / "d.png", xlabel="difference", noise="x")
    assert min(png_size(drawn)) > 100
    lines = {"a": {"x": ([1, 2], [3.0, 2.0])}, "b": {"x": ([1], [3.0]), "y": ([1], [2.0])}}
    drawn = figures.curve_panels(lines, tmp_path / "c.png", ylabel="bits")
    assert min(png_size(drawn)) > 100
    with pytest.raises(ValueError, match="panels is empty"):
        figures.differences({}, tmp_path / "e.png", xlabel="")
    with pytest.raises(ValueError, match="has 2 steps and 1 values"):
        figures.curve_panels({"a": {"x": ([1, 2], [3.0])}}, tmp_path / "e.png", ylabel="")
    assert not (tmp_path / "e.png").exists()


def test_a_demo_configuration_of_before_is_read() -> None:
    values = {name: value for name, value in TINY.to_json().items() if name not in ("language", "passes")}
    assert DemoConfig.from_json(values) == TINY
