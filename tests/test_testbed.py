"""The testbed: small students of every kind, the arithmetic of pairs, and gradients against enumeration."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from routing_testbed import baselines, command, gradients, measures, timing
from routing_testbed.baselines.gumbel import _successive_softmaxes
from routing_testbed.methods import METHODS, RANGE, methods_of
from routing_testbed.pairing import pair, summarise
from routing_testbed.setting import LEAST, MOST, SHAPES, Setting, Shape
from routing_testbed.student import Student
from routing_testbed.task import Task
from routing_testbed.training import keys, new_student, run_task

import circuitroute as cr

TINY = Setting(hidden=8, inner=8, steps=3, batch=32, held_out=256)
NUMBERS = ("error", "load_entropy", "executed", "dead", "cpu_per_step", "cpu_ratio")


@pytest.mark.parametrize(
    "shape", [Shape(8, 2), Shape(8, 2.5, "variable"), Shape(8, 1, "domains")], ids=lambda shape: shape.kind
)
def test_every_method_trains_and_fills_its_row(shape: Shape) -> None:
    rows = run_task(shape, list(methods_of(shape)), 0, TINY)
    assert [row["method"] for row in rows] == list(RANGE if shape.kind == "variable" else METHODS)
    for row in rows:
        assert (row["shape"], row["seed"], row["steps"]) == (str(shape), 0, 3)
        assert all(math.isfinite(row[name]) for name in NUMBERS)
        assert (row["purity"] is None) == (shape.kind != "domains")
    assert rows[0]["cpu_ratio"] == 1


def test_the_number_of_threads_is_given_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run_task(Shape(8, 1), ["top-k"], 0, TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rows_are_a_function_of_the_seed() -> None:
    def row(method: str, seed: int) -> dict[str, Any]:
        found = run_task(Shape(8, 2), [method], seed, TINY)[0]
        return {name: value for name, value in found.items() if not name.startswith("cpu")}

    for method in ("probe", "gumbel", "probe-uniform", "random", "sampled-1/4"):
        assert row(method, 3) == row(method, 3)
        assert row(method, 3) != row(method, 4)


def test_methods_start_alike_and_from_the_same_data() -> None:
    task = Task(Shape(8, 2), TINY, 5)
    first, *others = (dict(new_student(task, name).named_parameters()) for name in METHODS)
    for parameters in others:
        own = parameters.keys() - first.keys()
        assert own <= {"moe.router.bias"}  # ReMoE's
        assert all(not parameters[name].any() for name in own)
        assert all(torch.equal(parameters[name], first[name]) for name in first)
    for one, other in zip(task.batches(), Task(Shape(8, 2), TINY, 5).batches(), strict=True):
        assert torch.equal(one.hidden, other.hidden)
        assert torch.equal(one.target, other.target)


def test_a_teacher_of_variable_count_has_the_mean_it_is_asked_for() -> None:
    counts = Task(SHAPES["variable"], Setting(held_out=4096), 0).held_out().mask.sum(-1)
    assert counts.double().mean() == pytest.approx(2.5, abs=0.1)
    assert (int(counts.min()), int(counts.max())) == (LEAST, MOST)


def test_batches_of_domains_come_from_a_few() -> None:
    task = Task(SHAPES["domains"], TINY, 0)
    assert all(len(batch.domain.unique()) <= 3 for batch in task.batches() if batch.domain is not None)
    held_out = task.held_out()
    assert held_out.domain is not None
    assert len(held_out.domain.unique()) == 8
    assert measures.purity(held_out.mask, held_out.domain) > 0.5


# ---------------------------------------------------------------------------------------------- measures and pairs


def test_agreement_is_up_to_a_permutation() -> None:
    pytest.importorskip("scipy")
    teacher = Task(Shape(8, 2), TINY, 0).held_out().mask
    assert measures.agreement(teacher[:, torch.randperm(8)], teacher) == 1
    one, other = torch.tensor([[1, 1, 0], [1, 0, 1]]) != 0, torch.tensor([[0, 0, 1], [1, 0, 1]]) != 0
    assert measures.agreement(one, other) == pytest.approx(2 * 3 / (4 + 3))


def test_measures_by_hand() -> None:
    mask = torch.zeros(400, 4, dtype=torch.bool)
    mask[:, 0], mask[:2, 1] = True, True
    assert measures.dead_experts(mask) == 2  # 400, 2, 0 and 0 of a mean of 100.5: the second is just alive
    domain = torch.tensor([0] * 300 + [1] * 100)
    assert measures.purity(mask, domain) == pytest.approx((300 + 2) / 402)
    assert measures.count_correlation(mask, mask) == pytest.approx(1)
    assert measures.count_correlation(mask[:, :1], mask) is None
    assert measures.normalised_error(torch.zeros(3, 2), torch.ones(3, 2)) == 1


def test_pairs_by_hand() -> None:
    found = pair([0.9, 1.0, 2.2], [1.0, 1.0, 2.0])
    assert found.difference == pytest.approx(0.1 / 3)
    assert found.spread == pytest.approx(math.sqrt(((0.1 + 0.1 / 3) ** 2 + (0.1 / 3) ** 2 + (0.2 - 0.1 / 3) ** 2) / 2))
    assert found.relative == pytest.approx(0, abs=1e-12)
    assert found.relative_spread == pytest.approx(0.1)
    assert found.wins == 1
    assert math.isnan(pair([1.0], [2.0]).spread)


def test_summaries_pair_by_seed_in_whatever_order_rows_come() -> None:
    def row(method: str, seed: int, error: float) -> dict[str, Any]:
        return {"shape": "8x2", "method": method, "seed": seed, "error": error, "dead": seed, "purity": None}

    rows = [row("top-k", 1, 2.0), row("top-k", 0, 1.0), row("mode", 0, 0.5), row("mode", 1, 3.0), row("mode", 9, 9.0)]
    top, mode = summarise(rows, others=("dead", "purity"))
    assert (top["error"], top["paired"], top["seeds"]) == (1.5, None, 2)
    assert (mode["error"], mode["seeds"], mode["dead"], mode["purity"]) == (1.75, 2, 0.5, None)
    assert mode["paired"].difference == 0.25
    assert mode["paired"].wins == 1


# ---------------------------------------------------------------------------------------------- baselines


def test_the_random_router_depends_on_the_token_alone() -> None:
    router = baselines.RandomRouter(8, 16, cr.Exactly(2))
    hidden = torch.randn(4096, 8)
    mask = router(hidden).mask
    assert torch.equal(router.eval()(hidden.flip(0)).mask.flip(0), mask)
    assert cr.metrics.load_entropy(mask) > 0.99
    assert mask.sum(-1).eq(2).all()


def test_successive_softmaxes_add_up_to_k_and_harden_to_the_k_largest() -> None:
    scores = torch.randn(50, 8)
    soft = _successive_softmaxes(scores, 3)
    assert torch.allclose(soft.sum(-1), torch.full((50,), 3.0))
    hard = _successive_softmaxes(100 * scores, 2)
    assert torch.equal(hard.topk(2, -1).indices.sort().values, scores.topk(2, -1).indices.sort().values)


def test_loss_free_bias_moves_towards_the_underloaded() -> None:
    student = new_student(Task(Shape(8, 2), TINY, 0), "bias")
    batch = next(Task(Shape(8, 2), TINY, 0).batches())
    _, routing = student(batch.hidden, keys(0, 0, 32))
    student.after(routing)
    load = routing.mask.sum(0)
    assert torch.equal(student.options()["bias"], 1e-3 * (8.0 - load).sign())


@pytest.mark.parametrize("name", ["probe", "probe-uniform", "probes-2"])
def test_probes_add_nothing_in_value(name: str) -> None:
    task = Task(Shape(8, 2), TINY, 0)
    batch = next(task.batches())
    probed, plain = (new_student(task, method)(batch.hidden, keys(0, 0, 32))[0] for method in (name, "mode"))
    assert torch.allclose(probed, plain, atol=1e-6)


# ---------------------------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module", params=[1, 2])
def problem(request: pytest.FixtureRequest) -> gradients.Problem:
    return gradients.half_trained(Task(Shape(6, request.param), replace(TINY, held_out=12), 1), 3)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_truth_is_that_of_the_enumerated_expectation(problem: gradients.Problem, temperature: float) -> None:
    """Everything written out: every subset's probability, weights, output and loss, and autograd through their sum."""
    theta = problem.logits.double().requires_grad_()
    k, experts = problem.circuit.max_count, 6
    each = torch.stack(
        [problem.experts(problem.hidden, [12 if e == expert else 0 for e in range(6)]) for expert in range(experts)], 1
    ).double()
    subsets = [list(chosen) for chosen in combinations(range(experts), k)]
    scores = torch.stack([theta[:, chosen].sum(-1) / temperature for chosen in subsets], -1)
    losses = []
    for chosen in subsets:
        output = (theta.softmax(-1)[:, chosen, None] * each[:, chosen]).sum(1)
        losses.append((output - problem.target).square().sum(-1) / problem.target.square().sum(-1).mean())
    expected = (scores.softmax(-1) * torch.stack(losses, -1)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(expected, theta)
    assert torch.allclose(gradients.true_gradient(problem, temperature), gradient, atol=1e-6, rtol=1e-4)


def exact_student(k: int, **options: Any) -> Student:
    router = cr.ExactKRouter(8, 6, k, temperature=0.25, **{"decide": None, **options.pop("router", {})})
    return Student(cr.MoE(router, cr.StackedExperts(6, 8, 8), **options)).train()


def test_estimates_with_a_known_expectation_have_it(problem: gradients.Problem) -> None:
    """The score function's is the truth; that of probes with importance weights, all experts seen."""
    k = problem.circuit.max_count
    score = gradients.quality(problem, exact_student(k, router={"estimator": "score"}), 2000, 0)
    assert score["bias"] < 4 * math.sqrt(score["variance"] / 2000)
    for student in (exact_student(k, probes=1), exact_student(k, probes=1, router={"decide": "mode"})):
        found = gradients.quality(problem, student, 2000, 0)
        assert found["bias_seen"] < 0.05
    blind = gradients.quality(problem, exact_student(k, router={"decide": "mode"}), 2, 0)
    assert blind["bias_seen"] > 0.2
    seen = gradients.quality(problem, exact_student(k, probes="all", router={"decide": "mode"}), 2, 0)
    assert (seen["cosine_seen"], seen["bias_seen"]) == (pytest.approx(1), pytest.approx(0, abs=1e-5))


def test_gradients_have_a_row_for_each_method() -> None:
    rows = gradients.run("8x2", 0, trained=2, tokens=4, repeats=4)
    assert {row["method"] for row in rows} == {*METHODS, *gradients.EXTRA} - set(gradients.LEFT_OUT)
    assert all(math.isfinite(row[name]) for row in rows for name in ("cosine", "bias", "variance", "bias_seen"))


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_writes_rows_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    words = ["--seeds", "2", "--steps", "2", "--shapes", "16x1", "variable", "--methods", "probe", "range-mode"]
    assert command.main([*words, "--tables", "learning", "--processes", "1", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["shape"], row["method"]) for row in rows[::2]] == [("16x1", "top-k")] * 2 + [("variable", "top-3")] * 2
    assert {row["method"] for row in rows} == {"top-k", "probe", "top-3", "range-mode"}
    printed = capsys.readouterr().out
    assert "16x1: held-out error" in printed
    assert "variable: held-out error" in printed


def test_the_command_shows_rows_of_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    command.show(gradients.run("8x1", 0, trained=1, tokens=4, repeats=2) + timing.run("16x1", "small", rounds=1))
    printed = capsys.readouterr().out
    assert "8x1: gradients in the logits" in printed
    assert "16x1, small: CPU time" in printed


@pytest.mark.parametrize(
    "words",
    [
        ["--shapes", "3x3"],
        ["--methods", "top-9"],
        ["--methods", "probe", "range-mode", "--shapes", "16x1"],
        ["--seeds", "0"],
        ["--steps", "0"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(words)
    assert f"argument {words[0]}" in capsys.readouterr().err
