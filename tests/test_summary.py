"""The numbers of a training run: what each means, for which decisions it exists, and the file they are kept in.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.routing.runs import read_run

T, E = 40, 6
OF_MASKS = {
    "tokens",
    "load_entropy",
    "max_violation",
    "dead_experts",
    "experts_per_token",
    "experts_per_token_std",
}
OF_SOFT = OF_MASKS | {"budget_use", "soft_mass"}
OF_ROUTINGS = OF_SOFT | {"decision_entropy", "mode_agreement", "mode_distance", "invalid_tokens"}
OF_PATHS = {"experts_per_path", "experts_per_path_std"}


def logits(seed: int = 0, tokens: int = T, experts: int = E) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def routed(constraint: cr.Constraint | None = None, seed: int = 0, tokens: int = T, **options: Any) -> cr.Routing:
    circuit = cr.compile(cr.Between(1, 4) if constraint is None else constraint, E)
    return cr.route(logits(seed, tokens), circuit, key=cr.random_key(seed, torch.arange(tokens)), **options)


def soft() -> cr.Routing:
    return cr.SoftTopKRouter(8, E, k=2.5)(torch.randn(T, 8, generator=torch.Generator().manual_seed(0)))


def keys_of(found: dict[str, float], name: str) -> set[str]:
    return {key.split("/", 1)[1] for key in found if key.startswith(f"{name}/")}


# ---------------------------------------------------------------------------------------------- what the numbers are


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4), cr.AtMost(3) & ~cr.Exactly(1)], ids=repr)
def test_every_number_is_what_it_says(constraint: cr.Constraint, training: bool, temperature: float) -> None:
    routing = routed(constraint, training=training, temperature=temperature)
    found = cr.metrics.summary(routing)
    counts, mode = routing.counts.double(), routing.untempered.mode != 0
    union = (routing.mask.sum(-1) + mode.sum(-1)).clamp(min=1)
    expected = {
        "tokens": T,
        "load_entropy": cr.metrics.load_entropy(routing),
        "max_violation": cr.metrics.max_violation(routing),
        "dead_experts": (~routing.mask.any(0)).double().mean(),
        "experts_per_token": cr.metrics.active_experts(routing),
        "experts_per_token_std": counts.std(correction=0),
        "budget_use": counts.mean() / routing.max_count,
        "soft_mass": cr.metrics.soft_mass(routing),
        "decision_entropy": routing.distribution.entropy().double().mean(),
        "mode_agreement": cr.metrics.mode_agreement(routing).double().mean(),
        "mode_distance": ((routing.mask != mode).sum(-1) / union.double()).mean(),
        "invalid_tokens": 0.0,
    }
    assert {f"layer0/{name}": pytest.approx(float(value), abs=1e-9) for name, value in expected.items()} == {
        key: value for key, value in found.items() if key.startswith("layer0/")
    }
    assert set(expected) == OF_ROUTINGS
    assert (found["layer0/mode_distance"] == 0) == (not training)
    for name in expected:
        assert found[f"all/{name}"] == found[f"layer0/{name}"]
    assert (found["all/experts_per_path"], found["all/experts_per_path_std"]) == (
        found["layer0/experts_per_token"],
        found["layer0/experts_per_token_std"],
    )
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_layers_are_numbered_or_named_and_all_is_their_mean() -> None:
    each = [routed(cr.Exactly(2), 0), routed(cr.Between(1, 4), 1), routed(cr.Between(3, 5), 2)]
    numbered = cr.metrics.summary(each)
    assert cr.metrics.summary(iter(each)) == numbered
    assert cr.metrics.summary(tuple(each)) == numbered
    named = cr.metrics.summary({"first": each[0], "blocks/1/mlp": each[1], "9": each[2]})
    for old, new in (("layer0", "first"), ("layer1", "blocks/1/mlp"), ("layer2", "9"), ("all", "all")):
        assert {k[len(old) :]: v for k, v in numbered.items() if k.startswith(f"{old}/")} == {
            k[len(new) :]: v for k, v in named.items() if k.startswith(f"{new}/")
        }
    for layer, routing in enumerate(each):
        alone = cr.metrics.summary(routing)
        assert {k: v for k, v in numbered.items() if k.startswith(f"layer{layer}/")} == {
            k.replace("layer0", f"layer{layer}"): v for k, v in alone.items() if k.startswith("layer0/")
        }
    for name in OF_ROUTINGS:
        assert numbered[f"all/{name}"] == pytest.approx(sum(numbered[f"layer{i}/{name}"] for i in range(3)) / 3)
    total = torch.stack([routing.counts for routing in each]).sum(0).double()
    assert numbered["all/experts_per_path"] == pytest.approx(float(total.mean()))
    assert numbered["all/experts_per_path_std"] == pytest.approx(float(total.std(correction=0)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_have_what_needs_no_distribution(dtype: torch.dtype) -> None:
    routing = routed()
    found = cr.metrics.summary(routing.mask.to(dtype))
    assert keys_of(found, "layer0") == OF_MASKS
    assert keys_of(found, "all") == OF_MASKS | OF_PATHS
    whole = cr.metrics.summary(routing)
    assert all(whole[key] == value for key, value in found.items())


def test_soft_routings_have_a_mass_and_no_distribution() -> None:
    routing = soft()
    found = cr.metrics.summary([routing])
    assert keys_of(found, "layer0") == OF_SOFT
    assert found["layer0/soft_mass"] == pytest.approx(2.5, abs=1e-4)
    assert found["layer0/experts_per_token"] == cr.metrics.active_experts(routing)
    assert found["layer0/budget_use"] == pytest.approx(cr.metrics.active_experts(routing) / routing.max_count)


def test_layers_of_different_kinds_are_averaged_over_those_that_have_a_number() -> None:
    found = cr.metrics.summary({"a": routed(), "b": routed().mask, "c": soft()})
    assert keys_of(found, "all") == OF_ROUTINGS | OF_PATHS
    assert found["all/decision_entropy"] == found["a/decision_entropy"]
    assert found["all/soft_mass"] == pytest.approx((found["a/soft_mass"] + found["c/soft_mass"]) / 2)


def test_without_tokens_there_is_nothing_to_average() -> None:
    found = cr.metrics.summary([routed(tokens=0), routed(seed=1)])
    assert keys_of(found, "layer0") == {"tokens"}
    assert keys_of(found, "all") == OF_ROUTINGS
    assert found["all/tokens"] == T / 2
    assert found["all/load_entropy"] == found["layer1/load_entropy"]
    assert cr.metrics.summary(routed(tokens=0)) == {"layer0/tokens": 0.0, "all/tokens": 0.0}
    assert cr.metrics.summary(torch.zeros(0, 3)) == {"layer0/tokens": 0.0, "all/tokens": 0.0}


def test_one_token_one_expert_and_no_expert() -> None:
    one = cr.route(torch.zeros(1, 1), cr.compile(cr.Exactly(1), 1))
    found = cr.metrics.summary(one)
    assert (found["all/load_entropy"], found["all/max_violation"], found["all/dead_experts"]) == (1.0, 0.0, 0.0)
    assert (found["all/decision_entropy"], found["all/mode_distance"], found["all/budget_use"]) == (0.0, 0.0, 1.0)
    none = cr.route(torch.zeros(5, 3), cr.compile(cr.Exactly(0), 3))
    found = cr.metrics.summary(none)
    assert (found["all/experts_per_token"], found["all/budget_use"], found["all/mode_distance"]) == (0.0, 0.0, 0.0)
    assert (found["all/dead_experts"], found["all/max_violation"], found["all/mode_agreement"]) == (1.0, 0.0, 1.0)
    assert set(keys_of(found, "all")) == OF_ROUTINGS | OF_PATHS


def test_invalid_tokens_are_counted_and_left_out() -> None:
    given = logits()
    given[3, 2] = math.nan
    given[7] = -math.inf
    given[9, :2] = torch.tensor([-math.inf, math.inf])  # evidence that leaves something
    circuit = cr.compile(cr.Between(1, 4), E)
    valid = torch.ones(T, dtype=torch.bool)
    valid[[3, 7]] = False
    found = cr.metrics.summary(cr.route(given, circuit, key=cr.random_key(0, torch.arange(T)), validate_args=False))
    rest = cr.metrics.summary(cr.route(given[valid], circuit, key=cr.random_key(0, torch.arange(T)[valid])))
    assert found["all/invalid_tokens"] == pytest.approx(2 / T)
    for name in ("decision_entropy", "mode_agreement", "mode_distance", "soft_mass"):
        assert found[f"all/{name}"] == pytest.approx(rest[f"all/{name}"], rel=1e-6)
    assert found["all/experts_per_token"] == pytest.approx(rest["all/experts_per_token"] * 38 / T)
    assert all(math.isfinite(value) for value in found.values())
    nothing = cr.metrics.summary(cr.route(torch.full((4, E), math.nan), circuit, validate_args=False))
    assert keys_of(nothing, "all") == OF_SOFT - {"soft_mass"} | OF_PATHS | {"invalid_tokens"}
    assert nothing["all/invalid_tokens"] == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_precision(dtype: torch.dtype) -> None:
    found = cr.metrics.summary(cr.route(logits().to(dtype), cr.compile(cr.Exactly(2), E), training=False))
    expected = cr.metrics.summary(routed(cr.Exactly(2), training=False))
    assert found["all/decision_entropy"] == pytest.approx(expected["all/decision_entropy"], rel=2e-2)


def test_no_graph_is_kept_and_gradients_stay_what_they_were() -> None:
    found = []
    for summed in (False, True):
        leaf = logits().requires_grad_()
        routing = cr.route(leaf, cr.compile(cr.Between(1, 4), E), key=cr.random_key(0, torch.arange(T)))
        if summed:
            cr.metrics.summary(routing)
        loss = routing.gates.square().sum() + cr.losses.load_balance(routing) - routing.log_prob.sum()
        loss.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_inference_mode_and_pickled_decisions() -> None:
    with torch.inference_mode():
        routing = routed()
        inside = cr.metrics.summary(routing)
    assert cr.metrics.summary(routing) == inside
    assert cr.metrics.summary(pickle.loads(pickle.dumps(routed()))) == pytest.approx(inside)


# ---------------------------------------------------------------------------------------------- budgets


def paths(budget: cr.BudgetRouter) -> list[cr.Routing]:
    hidden = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    state, found = budget.begin(hidden), []
    for layer in range(3):
        routing, state = budget(hidden, state, key=cr.random_key(0, layer, torch.arange(30)))
        found.append(routing)
    return found


def test_a_budget_over_the_layers_is_used_by_whole_paths() -> None:
    budget = cr.BudgetRouter(4, E, layers=3, per_layer=cr.Between(1, 5), total=cr.CountIn({4, 7}))
    routings = paths(budget)
    found = cr.metrics.summary(routings, budget=budget)
    spent = torch.stack([routing.counts for routing in routings]).sum(0).double()
    assert found["all/budget_use"] == pytest.approx(float(spent.mean()) / 7)
    assert cr.metrics.summary(routings, budget=7) == found
    assert cr.metrics.summary(routings, budget=np.int64(7)) == found
    assert found["layer0/budget_use"] == pytest.approx(found["layer0/experts_per_token"] / 5)
    assert cr.metrics.summary(routings)["all/budget_use"] == pytest.approx(
        sum(found[f"layer{i}/budget_use"] for i in range(3)) / 3
    )
    empty = cr.metrics.summary([routing.mask[:0] for routing in routings], budget=budget)
    assert empty["all/tokens"] == 0.0
    assert "all/budget_use" not in empty


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (lambda: cr.Budget(E, 2, cr.Between(1, 5), cr.AtMost(7)), ValueError, r"over 2 layers, and routings are of 3"),
        (lambda: 0, ValueError, r"budget=0: must be at least 1"),
        (lambda: 2.5, TypeError, r"budget=2\.5: expected an integer"),
        (lambda: True, TypeError, r"budget=True: expected an integer"),
    ],
)
def test_budgets_that_do_not_fit(budget: Any, error: type[Exception], message: str) -> None:
    routings = [routed(seed=seed) for seed in range(3)]
    with pytest.raises(error, match=message):
        cr.metrics.summary(routings, budget=budget())


def test_a_budget_needs_the_same_tokens_in_all_layers() -> None:
    each = [routed(), routed(tokens=10)]
    assert not OF_PATHS & keys_of(cr.metrics.summary(each), "all")
    with pytest.raises(ValueError, match=r"routings have \[40, 10\] tokens: a budget is used by tokens"):
        cr.metrics.summary(each, budget=8)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, TypeError, r"routings is a NoneType: expected a Routing or a mask"),
        ("layer0", TypeError, r"routings is a str: expected a Routing"),
        ([], ValueError, r"routings is empty: give the decisions of one layer at least"),
        ({}, ValueError, r"routings is empty"),
        ({"all": torch.ones(2, 3)}, ValueError, r"routings has the name 'all'"),
        ({0: torch.ones(2, 3)}, TypeError, r"routings has the name 0: expected a text"),
        (torch.ones(3), ValueError, r"routings\['layer0'\] have shape \(3,\): expected \[tokens, experts\]"),
        ([torch.ones(2, 3), torch.ones(2, 3, 4)], ValueError, r"routings\['layer1'\] have shape \(2, 3, 4\)"),
        (["mask"], TypeError, r"routings\['layer0'\]='mask': expected a tensor"),
        ([torch.ones(2, 3, dtype=torch.complex64)], TypeError, r"routings\['layer0'\] has dtype torch.complex64"),
        (torch.ones(2, 0), ValueError, r"routings\['layer0'\] have shape \(2, 0\)"),
    ],
)
def test_what_is_no_decision_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cr.metrics.summary(given)


# ---------------------------------------------------------------------------------------------- the log of a run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_has_a_line_per_step_and_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    found = cr.metrics.summary([routed(), routed(seed=1)])
    log = cr.metrics.RunLog(path, run="seed 0")
    log.append(0, found, loss=2.5, learning_rate=np.float32(0.5))
    again = cr.metrics.RunLog(str(path), run="seed 0")
    again.append(np.int64(10), found, loss=torch.tensor(2.0))
    assert lines(path) == [
        {"circuitroute": "run", "version": 1, "run": "seed 0"},
        {"step": 0, "loss": 2.5, "learning_rate": 0.5, **found},
        {"step": 10, "loss": 2.0, **found},
    ]
    record = read_run(path)
    assert (record.run, [step.step for step in record.steps], record.notes) == ("seed 0", [0, 10], ())
    assert record.steps[1].loss == 2.0
    assert record.steps[0].values == {tuple(k.rsplit("/", 1)): v for k, v in found.items()}
    assert repr(again) == f"RunLog({str(path)!r}, run='seed 0')"


def test_a_step_takes_the_place_of_those_from_it_on(tmp_path: Path) -> None:
    """As a run that goes on from a checkpoint writes them."""
    log = cr.metrics.RunLog(tmp_path / "run.jsonl")
    for step, loss in ((0, 5.0), (10, 4.0), (20, 3.0), (10, 3.5), (15, 3.2)):
        log.append(step, {"all/load_entropy": 1.0}, loss=loss)
    steps = read_run(log.path).steps
    assert [(step.step, step.loss) for step in steps] == [(0, 5.0), (10, 3.5), (15, 3.2)]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = cr.metrics.RunLog(tmp_path / "run.jsonl")
    log.append(0, {"all/load_entropy": math.inf, "all/max_violation": 1}, loss=math.nan)
    assert lines(log.path)[1] == {"step": 0, "loss": None, "all/load_entropy": None, "all/max_violation": 1.0}
    (step,) = read_run(log.path).steps
    assert step.loss is None
    assert step.values == {("all", "max_violation"): 1.0}


def test_a_half_written_line_is_left_out_and_then_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    cr.metrics.RunLog(path, "a").append(0, {"all/load_entropy": 1.0})
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 1, "all/loa')
    record = read_run(path)
    assert len(record.steps) == 1
    assert record.notes == ("line 3, the last one, is half written and was left out",)
    cr.metrics.RunLog(path, "a")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"\n"[:0]])
def test_an_empty_file_becomes_a_log(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.jsonl").write_bytes(content)
    cr.metrics.RunLog(tmp_path / "run.jsonl", "a")
    assert lines(tmp_path / "run.jsonl") == [{"circuitroute": "run", "version": 1, "run": "a"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"circuitroute": "run", "version": 1, "run": "b"}\n', r"is the log of run='b', not of 'a'"),
        ('{"circuitroute": "run", "version": 2, "run": "a"}\n', r"line 1: it is of version 2, and this circuitroute"),
        ('{"circuitroute": "bench", "version": 1, "run": "a"}\n', r"line 1: it says circuitroute='bench'"),
        ('{"circuitroute": "run", "version": 1}\n', r"line 1: it says circuitroute='run'"),
        ('{"step": 0}\n', r"it has no first line that says so"),
        ("my notes\n", r"line 1: it is not JSON"),
        ("[1]\n", r"line 1: it is a JSON list"),
        ('{"circuitroute": "run", "versi', r"line 1: it is not JSON"),
        (b"\xff\xfe\x00", r"is not the log of a run"),
    ],
)
def test_another_runs_file_is_left_alone(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "run.jsonl"
    before = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(before)
    with pytest.raises(cr.CircuitFileError, match=message):
        cr.metrics.RunLog(path, run="a")
    assert path.read_bytes() == before


def test_bad_arguments_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for given, error in ((3, TypeError), ("", ValueError), (io.StringIO(), TypeError)):
        with pytest.raises(error, match="path="):
            cr.metrics.RunLog(given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="run=7: expected a text"):
        cr.metrics.RunLog(path, run=7)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="none"):
        cr.metrics.RunLog(tmp_path / "none" / "run.jsonl")
    log = cr.metrics.RunLog(path)
    before = path.read_bytes()
    bad: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((-1, {}), {}, ValueError, "step=-1"),
        ((1.5, {}), {}, TypeError, "step=1.5"),
        ((0, {"load_entropy": 1.0}), {}, ValueError, "the key 'load_entropy': expected 'layer/quantity'"),
        ((0, {3: 1.0}), {}, ValueError, "the key 3"),
        ((0, {"all/load_entropy": "high"}), {}, TypeError, r"summary\['all/load_entropy'\]='high': expected a number"),
        ((0, {}), {"loss": "low"}, TypeError, "loss='low'"),
        ((0, {}), {"rate": None}, TypeError, "rate=None"),
    ]
    for arguments, more, error, message in bad:
        with pytest.raises(error, match=message):
            log.append(*arguments, **more)
    assert path.read_bytes() == before


def test_lines_are_written_in_one_piece(tmp_path: Path) -> None:
    """Two writers at once leave whole lines, whoever comes first."""
    path = tmp_path / "run.jsonl"
    summary = {f"layer{i}/load_entropy": 0.5 for i in range(300)}
    logs = [cr.metrics.RunLog(path, "a") for _ in range(2)]

    def write(first: int) -> None:
        for step in range(first, 100, 2):
            logs[first].append(step, summary)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["step"] for row in lines(path)[1:]) == list(range(100))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"holds no steps"),
        ("\n\n", r"holds no steps"),
        ('{"circuitroute": "run", "version": 1, "run": "a"}\n', r"holds no steps"),
        ('{"step": 0, "loss": 1}\nbroken\n{"step": 1}\n', r"line 2: it is not JSON"),
        ('{"step": 0, "loss": 1}\n{"step": 1, "lo\n', r"line 2: it is not JSON"),
        ('{"loss": 1}\n', r"line 1: its step is None: expected a whole number"),
        ('{"step": "one"}\n', r"line 1: its step is 'one'"),
        ('{"step": -1}\n', r"line 1: its step is -1"),
        ('{"step": 0.5}\n', r"line 1: its step is 0\.5"),
        ('{"step": Infinity}\n', r"line 1: its step is inf"),
        ('{"step": 0}\n', r"has steps and no numbers"),
        ('{"step": true}\n', r"line 1: its step is True"),
        ('{"step": 0, "loss": "low"}', r"line 1: its loss is 'low': expected a number"),
        ('{"step": 0, "all/load_entropy": [1]}\n', r"line 1: its all/load_entropy is \[1\]"),
        ('{"step": 0, "all/load_entropy": true}\n', r"line 1: its all/load_entropy is True"),
        ("step,loss\n0,1\n", r"line 1: it is not JSON"),
        ("[[0, 1]]\n", r"line 1: it is a JSON list: expected an object"),
        ("[" * 100_000, r"line 1: its JSON is nested too deeply|line 1: it is not JSON"),
        ("my notes", r"line 1: it is not JSON"),
        ('{"step": 0}\nmy notes', r"line 2: it is not JSON"),
        ('{"step": 0}\n{"step": "one"}', r"line 2: its step is 'one'"),
        ('{"step": 0}\n' + "[" * 100_000, r"line 2: it"),
        (b"\x89PNG\r\n\x1a\n\xff", r"it is not text"),
    ],
)
def test_other_files_are_no_logs(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(cr.CircuitFileError, match=message):
        read_run(path)
    with pytest.raises(cr.CircuitFileError, match="cannot read"):
        read_run(tmp_path)


def test_lines_of_other_writers_are_read(tmp_path: Path) -> None:
    """Without a first line, with the names of a Trainer's logs, and with more than is known."""
    path = tmp_path / "run.jsonl"
    rows = [
        {"step": 1.0, "routing/layer0/load_entropy": 0.5, "routing/all/load_entropy": 0.5, "epoch": 0.1, "note": "x"},
        {"step": 2, "loss": 1, "blocks/0/mlp/max_violation": 2, "all/load_entropy": float("nan"), "big/x": 10**400},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    record = read_run(path)
    assert [dict(step.values) for step in record.steps] == [
        {("layer0", "load_entropy"): 0.5, ("all", "load_entropy"): 0.5},
        {("blocks/0/mlp", "max_violation"): 2.0},
    ]
    assert (record.run, record.steps[1].loss, record.notes) == ("", 1.0, ())
