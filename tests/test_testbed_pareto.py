"""The testbed's Pareto table: a teacher of several layers, students that divide a budget, curves to compare with."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from routing_testbed import command, pareto
from routing_testbed.layered_student import BudgetStudent, PricedStudent, SoftStudent
from routing_testbed.layered_task import LAYERED, SPLITS, LayeredTask, normalised
from routing_testbed.measures import normalised_error
from routing_testbed.pareto_summary import at, summarise
from routing_testbed.setting import LEAST, MOST
from routing_testbed.training import keys

import circuitroute as cr

TINY = replace(LAYERED, hidden=8, inner=8, steps=3, batch=32, held_out=256)


def _row(method: str, budget: float, seed: int, error: float, executed: float, shape: str = "rising") -> dict[str, Any]:
    layers = {"layers": [executed - 0.5, executed + 0.5 + seed], "teacher_layers": [1.0, 4.0]}
    found = {"shape": shape, "method": method, "budget": budget, "seed": seed, "error": error, "executed": executed}
    return {"table": "pareto", **found, **layers, "count_correlation": None if method == "top-k" else 0.5}


# ---------------------------------------------------------------------------------------------- the task


@pytest.mark.parametrize("split", SPLITS)
def test_the_teachers_layers_take_what_they_are_said_to(split: str) -> None:
    counts = LayeredTask(split, replace(LAYERED, hidden=8, inner=8, held_out=4096), 0).held_out().counts
    assert counts.double().mean(0).tolist() == pytest.approx(SPLITS[split], abs=0.1)
    assert (int(counts.min()), int(counts.max())) == (LEAST, MOST)


def test_the_target_is_what_the_teachers_layers_add() -> None:
    """A student of the teacher's own weights has no error, and takes as many experts."""
    task = LayeredTask("rising", TINY, 0)
    batch, counts = task.held_out(), []
    stream = batch.hidden
    for layer, price in task._layers:
        assert layer.router is not None
        logits = layer.router.logits(normalised(stream))
        weights = logits.softmax(-1)
        chosen = cr.compile(cr.Between(LEAST, MOST), 16)(logits - price).mode != 0
        each = torch.stack([_expert(layer, e, normalised(stream)) for e in range(16)], 1)
        stream = stream + ((weights * chosen)[..., None] * each).sum(1)
        counts.append(chosen.sum(-1))
    torch.testing.assert_close(stream - batch.hidden, batch.target, atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.stack(counts, -1), batch.counts)
    torch.testing.assert_close(normalised(stream).square().mean(-1), torch.ones(len(stream)))


def _expert(layer: cr.MoE, number: int, hidden: torch.Tensor) -> torch.Tensor:
    assert isinstance(layer.experts, cr.StackedExperts)
    up, down = layer.experts.up[number], layer.experts.down[number]
    return torch.nn.functional.gelu(hidden @ up.T) @ down.T


def test_data_are_a_function_of_the_seed() -> None:
    one, again, other = (LayeredTask("rising", TINY, seed) for seed in (3, 3, 4))
    assert torch.equal(one.held_out().target, again.held_out().target)
    assert not torch.equal(one.held_out().hidden, other.held_out().hidden)
    for first, second in zip(one.batches(), again.batches(), strict=True):
        assert torch.equal(first.target, second.target)
        assert not torch.equal(first.hidden, one.held_out().hidden[:32])


# ---------------------------------------------------------------------------------------------- students


def test_every_method_trains_and_fills_its_rows() -> None:
    for method, (_, budgets) in pareto.METHODS.items():
        rows = pareto.run("rising", method, budgets[-1:], 0, TINY)
        assert [(row["method"], row["budget"], row["steps"]) for row in rows] == [(method, budgets[-1], 3)]
        for row in rows:
            assert math.isfinite(row["error"])
            assert row["executed"] == pytest.approx(sum(row["layers"]) / 4)
            assert len(row["layers"]) == len(row["teacher_layers"]) == 4
            # So short a training leaves every token with all of its budget.
            constant = method in ("top-k", "soft-fixed") or method.startswith("budget")
            assert (row["count_correlation"] is None) == constant


def test_methods_start_from_the_same_weights() -> None:
    def weights(build: pareto.Build, budget: float) -> list[torch.Tensor]:
        torch.manual_seed(5)
        student = build("rising", budget, TINY)
        routers = [
            student.budget.router(n) if isinstance(student, BudgetStudent) else student.moe(n).router for n in range(4)
        ]
        return [r.weight for r in routers if r is not None] + [student.moe(n).experts.up for n in range(4)]

    first, *others = (weights(build, budgets[0]) for build, budgets in pareto.METHODS.values())
    assert len(first) == 8
    for found in others:
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


def test_a_price_for_all_layers_moves_with_their_mean_count() -> None:
    together = pareto.range_k("rising", 2.5, TINY, decide="mode")
    apart = pareto.range_k("rising", 2.5, TINY, decide="mode", held="as the teacher")
    assert isinstance(together, PricedStudent)
    assert isinstance(apart, PricedStudent)
    batch = next(LayeredTask("rising", TINY, 0).batches())
    for student in (together, apart):
        _, routings = student.train()(batch.hidden, keys(0, 0, 32))
        student.after(routings)
        means = [float(routing.counts.double().mean()) for routing in routings]
        prices = [float(student.options(number, None)["price"]) for number in range(4)]
        if student is together:
            assert prices == pytest.approx([0.02 * (sum(means) / 4 - 2.5)] * 4, rel=1e-5)
        else:
            targets = zip(means, SPLITS["rising"], strict=True)
            assert prices == pytest.approx([0.02 * (mean - target) for mean, target in targets], rel=1e-5)
    tenth = pareto.range_k("rising", 1.0, TINY, held="as the teacher")
    assert isinstance(tenth, PricedStudent)
    assert [c.target for c in tenth._controllers] == pytest.approx([mean / 2.5 for mean in SPLITS["rising"]])


@pytest.mark.parametrize("learned", [False, True])
def test_calibrated_layers_execute_their_soft_mass(learned: bool) -> None:
    student = pareto.soft("rising", 2.5, TINY, learned=learned, calibrated=True)
    assert isinstance(student, SoftStudent)
    if student.allocation is not None:
        with torch.no_grad():
            student.allocation.eta.copy_(torch.tensor([1.0, 0.0, 0.0, -1.0]))
    hidden = LayeredTask("rising", TINY, 0).held_out().hidden
    student.calibrate(hidden)
    _, routings = student(hidden, keys(0, 0, len(hidden)))
    with torch.no_grad():
        mass = [float(k) for k in student.begin(hidden)]
    assert (mass[0] > mass[3]) == learned
    assert [float(routing.counts.double().mean()) for routing in routings] == pytest.approx(mass, abs=0.01)
    assert [cr.metrics.soft_mass(routing) for routing in routings] == pytest.approx(mass, rel=1e-4)


def test_softmoe_is_never_calibrated_and_keeps_its_cap() -> None:
    student = pareto.soft("rising", 1.5, TINY)
    hidden = LayeredTask("rising", TINY, 0).held_out().hidden
    routers = [student.moe(number).router for number in range(4)]
    for router in routers:
        assert isinstance(router, cr.SoftTopKRouter)
        with torch.no_grad():
            router.weight.mul_(3)
    student.calibrate(hidden)
    _, routings = student(hidden, keys(0, 0, len(hidden)))
    assert [float(router.threshold) for router in routers if isinstance(router, cr.SoftTopKRouter)] == pytest.approx(
        [1.8] * 4
    )
    assert max(int(routing.counts.max()) for routing in routings) == 3


def test_soft_weights_on_a_fixed_number_are_those_of_the_largest_logits() -> None:
    student = pareto.soft_fixed("rising", 2.0, TINY)
    hidden = LayeredTask("rising", TINY, 0).held_out().hidden
    _, routings = student(hidden, keys(0, 0, len(hidden)))
    for routing in routings:
        assert torch.equal(routing.mask.nonzero()[:, 1].view(-1, 2), routing.logits.topk(2, -1).indices.sort(-1).values)
        weights = cr.soft_topk(routing.logits, 2.0, 1.0)
        assert torch.equal(routing.gates, torch.where(routing.mask, weights, 0.0))


def test_a_budget_is_kept_by_every_token() -> None:
    student = pareto.budgeted("rising", 1.5, TINY)
    batch = next(LayeredTask("rising", TINY, 0).batches())
    for mode in (True, False):
        output, routings = student.train(mode)(batch.hidden, keys(0, 0, 32))
        assert int(torch.stack([routing.counts for routing in routings]).sum(0).max()) <= 6
    student.train()
    output, routings = student(batch.hidden, keys(0, 0, 32))
    (normalised_error(output, batch.target) + student.more_loss(routings)).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    fast = pareto.budgeted("rising", 1.5, TINY, fast=True)
    assert isinstance(fast, BudgetStudent)
    assert student.splitting() == []
    assert [id(parameter) for parameter in fast.splitting()] == [id(fast.budget.preferences), id(fast.budget.estimates)]


def test_what_divides_a_budget_learns_at_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[tuple[int, float]] = []
    adam = torch.optim.Adam

    def watched(given: list[dict[str, Any]]) -> torch.optim.Adam:
        groups.extend((len(group["params"]), group["lr"]) for group in given)
        return adam(given)

    monkeypatch.setattr(torch.optim, "Adam", watched)
    pareto.run("falling", "softmoe-learned", (2.5,), 0, replace(TINY, steps=1))
    # A router and two stacked matrices in each of four layers; the split.
    assert groups == [(12, TINY.rate), (1, 10 * TINY.rate)]


# ---------------------------------------------------------------------------------------------- curves and tables


def test_between_whole_numbers_the_curve_is_straight() -> None:
    curve = [(1.0, 0.5), (2.0, 0.4), (4.0, 0.3)]
    assert [at(curve, x) for x in (1.0, 1.5, 2.0, 3.0, 4.0)] == pytest.approx([0.5, 0.45, 0.4, 0.35, 0.3])
    assert at(curve, 0.99) is None
    assert at(curve, 4.01) is None
    assert at([], 2.0) is None


def test_methods_are_paired_with_top_k_of_the_same_seed_at_what_they_execute() -> None:
    rows = [
        _row("range-mode", 1.5, 1, 0.50, 1.5),
        _row("range-mode", 1.5, 0, 0.44, 1.25),
        _row("range-mode", 1.5, 2, 0.10, 2.5),  # more than top-k was asked for
        *(_row("top-k", k, 0, error, k) for k, error in ((2.0, 0.4), (1.0, 0.5))),
        *(_row("top-k", k, 1, error, k) for k, error in ((1.0, 0.6), (2.0, 0.5))),
        _row("top-k", 1.0, 2, 0.6, 1.0),
        _row("range-mode", 1.5, 0, 0.9, 1.5, shape="falling"),
    ]
    falling, one, two, mode = summarise(rows)
    assert [row["budget"] for row in (one, two, mode)] == [1.0, 2.0, 1.5]
    assert (one["paired"], falling["paired"]) == (None, None)
    assert (mode["seeds"], mode["pairs"]) == (3, 2)
    assert mode["paired"].difference == pytest.approx(((0.44 - 0.475) + (0.50 - 0.55)) / 2)
    assert mode["paired"].wins == 2
    assert mode["layers"] == pytest.approx([5.25 / 3 - 0.5, 5.25 / 3 + 1.5])
    assert (mode["later"], mode["later_spread"]) == (pytest.approx(2.0), pytest.approx(1.0))
    assert mode["count_correlation"] == 0.5
    assert [row["front"] for row in (falling, one, two, mode)] == [True, True, False, True]


def test_the_command_writes_rows_a_table_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    kept = {name: pareto.METHODS[name] for name in ("top-k", "softmoe-learned")}
    monkeypatch.setattr(pareto, "METHODS", kept)
    monkeypatch.setattr(pareto, "FALLING", {"top-k": (2.0, 3.0)})
    monkeypatch.setattr(command, "LAYERED", TINY)
    out, figure = tmp_path / "rows.jsonl", tmp_path / "new" / "pareto.svg"
    words = ["--tables", "pareto", "--seeds", "1", "--steps", "2", "--processes", "1", "--out", str(out)]
    assert command.main([*words, "--figure", str(figure)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4 + 4 + 2
    assert {row["steps"] for row in rows} == {2}
    printed = capsys.readouterr().out
    assert "rising: error against executed experts" in printed
    assert "falling: error against executed experts" in printed
    again = tmp_path / "again.svg"
    assert command.main(["--show", str(out), "--figure", str(again)]) == 0
    tables, _ = capsys.readouterr().out.split("figure in")
    assert tables in printed
    assert again.read_bytes() == figure.read_bytes()


def test_a_figure_needs_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--tables", "timing", "--figure", "pareto.svg"])
    assert "argument --figure" in capsys.readouterr().err


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from routing_testbed.drawing import draw_pareto

    with pytest.raises(ValueError, match="split='rising': there are no rows of it"):
        draw_pareto([], tmp_path / "pareto.svg")
