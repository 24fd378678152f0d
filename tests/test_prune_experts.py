"""The pruning example, on settings that take seconds: what its table says must hold, however little was learned."""

import re
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import circuitroute as cr

EXAMPLE = Path(__file__).parent.parent / "examples" / "prune_experts.py"
LAYERS, EXPERTS, K = 4, 16, 4
# 33 does not divide evenly by the layers; 17 leaves one expert more than every layer's least.
TINY = ["--steps", "2", "--prune-steps", "2", "--budgets", "33", "17", "--calibration", "1", "--held-out", "1"]
ROW = re.compile(r"^ +(\d+) +(\S.*?)  +(\d+\.\d+) +([+-]\d+\.\d+) +(-|\d+(?: \d+)*) *$", re.MULTILINE)
ESTIMATORS = {"score function", "SIMPLE"}
BASELINES = {"random, mean of 5", "magnitude, equal layers", "magnitude", "usage", "removal, one at a time"}


@pytest.fixture(scope="module")
def example():
    """The example's functions."""
    return runpy.run_path(str(EXAMPLE))


def run(arguments, monkeypatch, capsys):
    """What the example prints."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return capsys.readouterr().out


def test_every_method_keeps_the_budget_and_enough_experts_to_route_to(example, monkeypatch, capsys, tmp_path):
    printed = run([*TINY, "--checkpoint", str(tmp_path)], monkeypatch, capsys)
    whole = float(re.search(r"(\d+\.\d+) with all 64 experts", printed)[1])
    kept = defaultdict(dict)
    for budget, method, bits, lost, per_layer in ROW.findall(printed):
        assert float(bits) - whole == pytest.approx(float(lost), abs=2e-3)  # rounded three times
        kept[int(budget)][method] = None if per_layer == "-" else [int(count) for count in per_layer.split()]

    assert sorted(kept) == [17, 33]
    for budget, by_method in kept.items():
        again = set() if budget == 33 else {"learned for 33, SIMPLE"}
        assert set(by_method) == BASELINES | {f"learned, {name}" for name in ESTIMATORS} | again
        assert by_method.pop("random, mean of 5") is None
        for counts in by_method.values():
            assert len(counts) == LAYERS
            assert sum(counts) == budget
            assert K <= min(counts) <= max(counts) <= EXPERTS
        equal = by_method["magnitude, equal layers"]
        assert max(equal) - min(equal) <= 1

    # The exact marginals of each learned distribution add up to its budget, but for 64 roundings to a percent.
    percent = torch.tensor([[int(p) for p in row.split()] for row in re.findall(r"layer \d:([ \d]+)", printed)])
    totals = percent.view(2, len(ESTIMATORS), -1).sum(dim=-1) / 100
    assert torch.allclose(totals, torch.tensor([[33.0], [17.0]]), atol=0.005 * LAYERS * EXPERTS)

    # The model is in the checkpoint: nothing is trained again, and the numbers are the same.
    options = example["parse"]([*TINY, "--checkpoint", str(tmp_path)])
    task = example["prepare"](example["config_of"](options), tmp_path, 1, example["Console"]())
    assert "from step 2" in capsys.readouterr().out
    assert round(task.bits(), 3) == whole
    assert round(task.bits(torch.ones(LAYERS * EXPERTS)), 3) == whole


def test_a_gradient_in_what_is_kept_changes_no_decision(example):
    """The forward pass that SIMPLE learns from is that of the pruned model, to the weights of its experts."""
    generator = torch.Generator().manual_seed(0)
    router = cr.TopKRouter(8, EXPERTS, K)
    logits = torch.randn(200, EXPERTS, generator=generator)
    kept = cr.compile(cr.Exactly(6), EXPERTS)(torch.zeros(200, EXPERTS)).sample(key=cr.random_key(0, torch.arange(200)))
    pruned = example["route_kept"](logits, router, kept)
    assert (pruned.counts == K).all()
    assert not (pruned.mask & (kept == 0)).any()
    among_kept = cr.route(logits.masked_fill(kept == 0, -torch.inf), router.circuit, training=False)
    assert torch.equal(pruned.gates, among_kept.gates)

    learning = example["route_kept"](logits, router, kept.requires_grad_())
    assert torch.allclose(learning.gates, pruned.gates, atol=1e-6)
    wanted = cr.route(logits, router.circuit, training=False).mask
    assert torch.equal(learning.mask, pruned.mask | wanted)
    (gradient,) = torch.autograd.grad(learning.gates[learning.mask & ~pruned.mask].sum(), kept)
    assert (gradient[wanted & (kept == 0)] != 0).all()  # removed experts hear that they were wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "48", "15"], "total=Exactly(15)"),  # 4 layers need 4 each
        (["--budgets", "65"], "total=Exactly(65)"),
        (["--prune-steps", "0"], "must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused_before_training(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as refused:
        run(arguments, monkeypatch, capsys)
    assert message in str(refused.value) + capsys.readouterr().err


def test_a_checkpoint_of_other_options_is_refused(monkeypatch, capsys, tmp_path, example):
    config = example["config_of"](example["parse"](TINY))
    example["prepare"](config, tmp_path, 1, example["Console"]())
    with pytest.raises(SystemExit, match="another config: start again with another --checkpoint"):
        run([*TINY, "--seed", "1", "--checkpoint", str(tmp_path)], monkeypatch, capsys)
