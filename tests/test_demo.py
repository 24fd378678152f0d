"""The demo, on settings that take seconds: training, interruption, resuming, and what it writes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from language_model import checkpoint, figures, process, progress, trainee, training
from language_model.config import ROUTERS, DemoConfig, DemoError
from language_model.model import build_model
from language_model.process import Interrupted
from language_model.texts import load_corpus
from language_model.training import Event

import circuitroute as cr
from circuitroute.cli.main import main

ROOT = Path(__file__).parents[1]
TINY = DemoConfig(
    steps=6,
    layers=2,
    experts=4,
    k=2,
    hidden=32,
    batch_size=2,
    seq_len=16,
    validations=2,
    validation_batches=2,
    oracle_sequences=2,
    oracle_rounds=2,
)
SIZES = {
    "steps": 6,
    "layers": 2,
    "experts": 4,
    "k": 2,
    "hidden": 32,
    "batch-size": 2,
    "seq-len": 16,
    "threads": 1,
}
ARGUMENTS = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


def never() -> bool:
    return False


class Watcher:
    """Told of training, does `act` after step `at`."""

    def __init__(self, at: int = 0, act: Callable[[], Any] = never) -> None:
        self.at, self.act = at, act

    def __call__(self, event: Event) -> None:
        if (event.kind, event.step) == ("step", self.at):
            self.act()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def square_{i}(x):\n    return x * {i}\n\n" for i in range(200)))
    return path


@pytest.fixture
def setting(text: Path, tmp_path: Path) -> trainee.Setting:
    config = replace(TINY, text=str(text))
    return trainee.Setting(config, load_corpus(config), torch.device("cpu"), tmp_path / "checkpoints")


def results(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "results.json").read_text())
    return value


def assert_same_run(a: trainee.Trainee, b: trainee.Trainee) -> None:
    """Equal to the last bit in all but the clocks."""
    assert a.record.losses == b.record.losses
    assert a.record.evaluations == b.record.evaluations
    assert a.record.swap_correlation == b.record.swap_correlation
    assert a.record.finished
    assert b.record.finished
    for (name, left), right in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(left, right), name
        states = a.optimizer.state.get(left, {}), b.optimizer.state.get(right, {})
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name


def test_the_library_is_used_by_its_public_names() -> None:
    for path in [*(ROOT / "examples" / "language_model").glob("*.py"), ROOT / "examples" / "prune_experts.py"]:
        imported = re.findall(r"^\s*(?:from|import) (circuitroute\S*)", path.read_text(), re.MULTILINE)
        assert set(imported) <= {"circuitroute"}, path


# Corpus


def test_standard_library_is_read_in_one_order_and_split_by_file() -> None:
    first, second = load_corpus(TINY), load_corpus(TINY)
    assert first.digest == second.digest
    assert first.train.numel() > 10 * first.valid.numel() > 1_000_000
    assert b"def " in bytes(first.valid[:100_000].tolist())


def test_batches_depend_on_seed_and_step_alone(setting: trainee.Setting) -> None:
    text, config = setting.corpus, setting.config
    torch.manual_seed(1)
    batch = text.batch(config, 3)
    torch.manual_seed(2)
    assert torch.equal(batch, text.batch(config, 3))
    assert not torch.equal(batch, text.batch(config, 4))
    assert not torch.equal(batch, text.batch(replace(config, seed=1), 3))
    assert batch.shape == (2, 17)
    assert batch.dtype == torch.int64


def test_validation_windows_span_the_held_out_text(setting: trainee.Setting) -> None:
    batches = setting.corpus.validation(setting.config)
    assert [list(tokens.shape) for tokens in batches] == [[2, 17], [2, 17]]
    assert torch.equal(batches[0][0], setting.corpus.valid[:17].long())
    assert torch.equal(batches[-1][-1], setting.corpus.valid[-17:].long())


# Model


@pytest.mark.parametrize("router", ROUTERS)
def test_initial_weights_are_shared_and_leave_the_global_generator_alone(router: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    weights = dict(build_model(TINY, router).named_parameters())
    assert torch.equal(before, torch.get_rng_state())
    for name, weight in build_model(TINY, "top-k").named_parameters():
        if name in weights and weights[name].shape == weight.shape:
            assert torch.equal(weight, weights[name]), name


def test_model_is_causal() -> None:
    model = build_model(TINY, "exact-k").eval()
    tokens = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 10:] = 0
    torch.testing.assert_close(model(tokens)[0][:, :10], model(changed)[0][:, :10])


def test_override_replaces_one_layers_routing() -> None:
    model = build_model(TINY, "exact-k").eval()
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    logits, routings = model(tokens)
    seen: list[torch.Tensor] = []

    def same(logits_TE: torch.Tensor) -> cr.Routing:
        seen.append(logits_TE)
        return routings[1]

    again, overridden = model(tokens, overrides={1: same})
    torch.testing.assert_close(again, logits)
    assert overridden[1] is routings[1]
    torch.testing.assert_close(seen[0], routings[1].logits)
    other = build_model(TINY, "exact-k").eval()(tokens.flip(0))[1][1]
    assert not torch.allclose(model(tokens, overrides={1: lambda _: other})[0], logits)


def test_range_router_pays_for_what_inference_executes(setting: trainee.Setting) -> None:
    model = build_model(setting.config, "range-k")
    tokens = setting.corpus.batch(setting.config, 0)[:, :-1]
    keys = [cr.random_key(0, layer, torch.arange(tokens.numel())) for layer in range(2)]
    _, routings = model(tokens, keys=keys)
    _, at_inference = model.eval()(tokens)
    first = training.inference_count(routings[0])
    assert float(first.detach()) == pytest.approx(float(at_inference[0].counts.float().mean()))
    weight = model.router(0).weight
    (gradient,) = torch.autograd.grad(first, weight, retain_graph=True)
    (expected,) = torch.autograd.grad(cr.losses.expected_count(routings[0]), weight, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    free, dear = (replace(setting.config, count_weight=weight) for weight in (0.0, 1.0))
    price = training.auxiliary_loss(routings, dear, "range-k") - training.auxiliary_loss(routings, free, "range-k")
    counts = [float(training.inference_count(routing).detach()) for routing in routings]
    assert float(price.detach()) == pytest.approx(sum((count / 2 - 1) ** 2 for count in counts) / 2, abs=1e-5)


# Training, stopping, resuming


@pytest.mark.parametrize("router", ROUTERS)
def test_resumed_equals_uninterrupted(router: str, setting: trainee.Setting, tmp_path: Path) -> None:
    whole = trainee.start(replace(setting, checkpoints=tmp_path / "whole"), router, resume=False)
    training.train(whole, Watcher(), never)
    stopped: list[bool] = []
    first = trainee.start(setting, router, resume=False)
    with pytest.raises(Interrupted):
        training.train(first, Watcher(4, lambda: stopped.append(True)), lambda: bool(stopped))
    assert first.record.step == 4
    second = trainee.start(setting, router, resume=True)
    assert second.record.step == 4
    training.train(second, Watcher(), never)
    assert_same_run(whole, second)


def test_a_stop_before_a_due_validation_only_delays_it(setting: trainee.Setting, tmp_path: Path) -> None:
    whole = trainee.start(replace(setting, checkpoints=tmp_path / "whole"), "exact-k", resume=False)
    training.train(whole, Watcher(), never)
    stopped: list[bool] = []
    first = trainee.start(setting, "exact-k", resume=False)
    with pytest.raises(Interrupted):
        training.train(first, Watcher(3, lambda: stopped.append(True)), lambda: bool(stopped))
    assert (first.record.step, first.record.evaluations) == (3, [])
    second = trainee.start(setting, "exact-k", resume=True)
    training.train(second, Watcher(), never)
    assert_same_run(whole, second)


def test_an_exception_within_a_step_leaves_the_last_checkpoint(
    setting: trainee.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> float:
        if first.record.step == 4:
            raise KeyboardInterrupt
        return step(first)

    step = training.training_step
    first = trainee.start(setting, "exact-k", resume=False)
    monkeypatch.setattr(training, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.train(first, Watcher(), never)
    assert trainee.start(setting, "exact-k", resume=True).record.step == 3  # where it was last validated


def test_first_interrupt_asks_and_second_insists() -> None:
    before = signal.getsignal(signal.SIGINT)
    with process.interruptible() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# Checkpoints


@pytest.fixture
def trained(setting: trainee.Setting) -> trainee.Setting:
    training.train(trainee.start(setting, "top-k", resume=False), Watcher(), never)
    return setting


def test_checkpoint_is_one_safetensors_file_with_json(trained: trainee.Setting) -> None:
    (path,) = trained.checkpoints.iterdir()
    assert path.name == "top-k.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
        assert "model.embedding.weight" in file.keys()  # noqa: SIM118  not a mapping
    assert state["format"] == checkpoint.CHECKPOINT_FORMAT
    assert state["record"]["step"] == 6


def damage_tensors(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Changes the text of the state and nothing else."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load(path.read_bytes())
    path.write_bytes(safetensors.torch.save(tensors, {**metadata, "state": change(metadata["state"])}))


def edit_state(**changes: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda state: json.dumps({**json.loads(state), **changes}))


def drop_metadata(path: Path) -> None:
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))


def leave_format_1(path: Path) -> None:
    """As version 0.1 left it: the state in a file of its own, beside the tensors."""
    path.with_suffix(".json").write_text(json.dumps({**checkpoint.load_state(path), "format": 1}))
    path.rename(path.with_name("top-k-0123456789ab.safetensors"))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (damage_tensors, "checksum"),
        (truncate, "damaged"),
        (lambda path: rewrite(path, lambda state: state[:-20]), "damaged"),
        (lambda path: rewrite(path, lambda state: "[]"), "not a JSON object"),
        (drop_metadata, "damaged"),
        (edit_state(format=0), "format 0"),
        (edit_state(record={}), "record is damaged"),
        (edit_state(text="0" * 64), "another text"),
        (edit_state(config={**TINY.to_json(), "experts": 8}), "another config"),
        (leave_format_1, "version 0.1"),
    ],
)
def test_a_bad_checkpoint_is_refused(harm: Callable[[Path], Any], says: str, trained: trainee.Setting) -> None:
    harm(trained.checkpoint("top-k"))
    with pytest.raises(DemoError, match=says) as refusal:
        trainee.start(trained, "top-k", resume=True)
    assert "without --resume" in str(refusal.value)


def test_a_finished_run_keeps_its_weights_without_the_optimizer(trained: trainee.Setting) -> None:
    saved = checkpoint.load_tensors(trained.checkpoint("top-k"))
    assert not [name for name in saved if name.startswith("optimizer.")]
    finished = trainee.start(trained, "top-k", resume=True)
    assert finished.record.finished
    for name, value in finished.model.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"])


def test_a_checkpoint_that_vanishes_is_missed(trained: trainee.Setting) -> None:
    trained.checkpoint("top-k").unlink()
    with pytest.raises(DemoError, match="damaged or missing"):
        checkpoint.load_tensors(trained.checkpoint("top-k"))


def test_another_models_tensors_are_refused(trained: trainee.Setting) -> None:
    state = {**trained.identity, "record": trainee.Record("top-k").to_json()}
    checkpoint.save(trained.checkpoint("top-k"), {"model.other": torch.zeros(1)}, state)
    with pytest.raises(DemoError, match="another model's tensors"):
        trainee.start(trained, "top-k", resume=True)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    path = tmp_path / "file"
    checkpoint.write_bytes(path, b"old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_so_do_permissions(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to("target")
    for data in (b"old", b"new"):
        checkpoint.write_bytes(link, data)
        assert link.is_symlink()
        assert target.read_bytes() == data
    target.chmod(0o600)
    checkpoint.write_bytes(link, b"newer")
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(tmp_path.iterdir()) == [link, target]


# The command, from end to end


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_interrupted_and_resumed_command_gives_the_uninterrupted_result(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*ARGUMENTS, "--text", str(text), "--routers", "top-k", "exact-k"]
    assert main(["demo", *arguments, "--out", str(tmp_path / "whole")]) == 0
    shown = capsys.readouterr().out
    for name in ("validation_curves.png", "utilization.png", "executed_experts.png"):
        path = tmp_path / "whole" / name
        assert str(path) in shown
        assert min(png_size(path)) > 200
        assert path.stat().st_size > 5_000

    halved, show = tmp_path / "half [way]", progress.PlainProgress.__call__

    def interrupt(self: progress.PlainProgress, event: Event) -> None:
        show(self, event)
        if (event.run.router, event.kind, event.step) == ("exact-k", "step", 3):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(progress.PlainProgress, "__call__", interrupt)
        assert main(["demo", *arguments, "--out", str(halved)]) == 130
    shown = capsys.readouterr().out
    assert "exact-k (step 3/6)" in shown
    assert f"--resume --out '{halved}'" in shown
    partial = results(halved)
    assert not partial["complete"]
    assert [(row["router"], row["steps"]) for row in partial["rows"]] == [("top-k", 6), ("exact-k", 3)]

    assert main(["demo", "--resume", "--out", str(halved), "--threads", "1"]) == 0
    whole, resumed = results(tmp_path / "whole"), results(halved)
    assert resumed["complete"]
    assert resumed["command"].startswith("circuitroute demo --resume")
    clocks = {"seconds", "training_seconds", "tokens_per_second"}
    for part in ("rows", "runs"):
        for a, b in zip(whole[part], resumed[part], strict=True):
            assert {**a, **dict.fromkeys(clocks)} == {**b, **dict.fromkeys(clocks)}


def test_results_say_what_was_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["demo", *ARGUMENTS, "--text", str(text), "--routers", "range-k", "--out", str(out)]
    assert main(arguments) == 0
    found = results(out)
    assert found["command"] == " ".join(["circuitroute", *arguments])
    assert found["versions"]["torch"] == torch.__version__
    assert found["config"]["routers"] == ["range-k"]
    (row,), (run,) = found["rows"], found["runs"]
    assert 0 < row["validation_bits_per_byte"] < 9
    assert 1 <= row["executed_experts_per_token"] <= 4
    assert 0 <= row["load_entropy"] <= 1
    assert row["max_violation"] >= 0
    last = run["evaluations"][-1]
    assert np.shape(last["utilization"]) == (2, 4)
    tokens = 2 * sum(last["executed_counts"]) // 4
    assert tokens * row["executed_experts_per_token"] == pytest.approx(
        tokens * np.sum(last["utilization"]) / 2, rel=1e-5
    )


def test_interrupt_before_any_checkpoint_still_reports(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", interrupt)
        assert main(["demo", *ARGUMENTS, "--text", str(text), "--routers", "top-k", "--out", str(out)]) == 130
    assert results(out)["rows"] == []
    assert main(["demo", "--resume", "--out", str(out), "--threads", "1"]) == 0
    assert len(results(out)["rows"]) == 1


def test_resume_refuses_other_options_and_another_text(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["demo", *ARGUMENTS, "--text", str(text), "--routers", "top-k", "--out", str(out)]) == 0
    assert main(["demo", "--resume", "--out", str(out), "--experts", "8"]) == 2
    assert "argument --experts: the run in" in capsys.readouterr().err
    text.write_text(text.read_text().replace("square", "circle"))
    assert main(["demo", "--resume", "--out", str(out)]) == 2
    assert "another text" in capsys.readouterr().err


def test_a_fresh_run_removes_an_earlier_ones_files_alone(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["demo", *ARGUMENTS, "--text", str(text), "--out", str(out)]
    assert main([*arguments, "--routers", "top-k"]) == 0
    (out / "notes.txt").write_text("mine")
    assert main([*arguments, "--routers", "exact-k"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["exact-k.safetensors"]
    assert [path.name for path in out.glob("*.jsonl")] == ["exact-k.jsonl"]
    assert [row["router"] for row in results(out)["rows"]] == ["exact-k"]


def test_what_a_router_did_is_logged(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, name = tmp_path / "out", "range-k-calibrated"
    assert main(["demo", *ARGUMENTS, "--text", str(text), "--routers", name, "--steps", "11", "--out", str(out)]) == 0
    log = out / f"{name}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert rows[0] == {"circuitroute": "run", "version": 1, "run": f"{name}, seed 0"}
    assert [row["step"] for row in rows[1:]] == [0, 10]
    assert all(row["loss"] > 0 and 0 < row["all/load_entropy"] <= 1 for row in rows[1:])
    log.write_text("mine")
    assert main(["demo", "--resume", "--out", str(out)]) == 2
    assert "argument --resume: path=" in capsys.readouterr().err
    assert log.read_text() == "mine"


def test_a_damaged_checkpoint_stops_the_command(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["demo", *ARGUMENTS, "--text", str(text), "--routers", "top-k", "--out", str(out)]
    assert main(arguments) == 0
    damage_tensors(out / "checkpoints" / "top-k.safetensors")
    assert main(["demo", "--resume", "--out", str(out)]) == 2
    assert "damaged" in capsys.readouterr().err


# Figures


def test_figures_leave_pyplot_alone(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from language_model import figures\n"
        f"print(figures.utilization_heatmaps({{'a': [[0.5] * 16] * 4}}, {str(tmp_path / 'map.png')!r}))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "examples", capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(tmp_path / "map.png"), "False"]
    assert min(png_size(tmp_path / "map.png")) > 200


def test_figures_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="curves is empty"):
        figures.validation_curves({}, path)
    with pytest.raises(ValueError, match="2 steps and 1 values"):
        figures.validation_curves({"a": ([1, 2], [1.0])}, path)
    with pytest.raises(ValueError, match=r"shape \[layers, experts\]"):
        figures.utilization_heatmaps({"a": [1.0, 2.0]}, path)
    with pytest.raises(ValueError, match="not all 0"):
        figures.executed_histogram({"a": [0, 0]}, path)
    assert not path.exists()


@pytest.mark.parametrize("kind", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_a_config_of_any_integers_is_that_of_plain_ones(kind: Any) -> None:
    given = DemoConfig(steps=kind(3), seed=kind(5), k=kind(2), routers=np.array(["top-k"]), passes=np.True_)
    plain = DemoConfig(steps=3, seed=5, k=2, routers=("top-k",), passes=True)
    assert json.dumps(given.to_json()) == json.dumps(plain.to_json())
    assert repr(given) == repr(plain)
    assert hash(given) == hash(plain)
