"""The example of reinforcement learning with another engine's rollouts, on few steps: what each training side sees."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

import circuitroute as cr

EXAMPLE = Path(__file__).parent.parent / "examples" / "rl_replay.py"


@pytest.fixture(scope="module")
def example():
    """The example's names, with little teaching."""
    found = runpy.run_path(str(EXAMPLE))
    found["teach"].__globals__.update(TAUGHT=8, PROMPTS=8)
    return found | {"PROMPTS": 8}


@pytest.fixture(scope="module")
def rollout(example):
    """A policy, and what the serving engine made of it."""
    policy = example["teach"](example["Setting"](), 0)
    return policy, example["roll_out"](example["served"](policy), 0, 0)


def test_the_answers_are_the_smallest_and_the_largest_digit(example):
    prompts = torch.tensor([[3, 9, 0, 5], [7, 7, 7, 7]])
    assert example["answers_of"](prompts).tolist() == [[0, 9], [7, 7]]
    assert example["seen_at"](prompts, torch.tensor([[0, 9], [7, 7]]), 0).tolist() == [
        [3, 9, 0, 5, 10],
        [7, 7, 7, 7, 10],
    ]
    assert example["seen_at"](prompts, torch.tensor([[0, 9], [7, 7]]), 1).tolist() == [[3, 9, 0, 5, 0], [7, 7, 7, 7, 7]]


def test_a_rollout_is_what_the_serving_engine_did(example, rollout):
    policy, made = rollout
    count = example["PROMPTS"] * example["GROUP"]
    assert len(made.record) == len(made.token) == 2 * count
    answers = made.token.view(2, count).t()
    assert made.seen[count:, -1].equal(answers[:, 0])
    prompts = made.seen[:count, :4]
    right = (answers == example["answers_of"](prompts)).all(1).float()
    assert made.reward == pytest.approx(float(right.mean()))
    groups = made.advantage[:count].view(example["PROMPTS"], -1)
    assert groups.mean(1).abs().max() < 1e-5
    assert made.advantage[:count].equal(made.advantage[count:])
    scores, routings = example["served"](policy)(made.seen, made.keys)
    assert cr.replay.mismatch(routings, made.record).subsets == 0
    torch.testing.assert_close(scores.gather(1, made.token[:, None])[:, 0], made.log_prob)


def test_with_replay_only_rounding_is_between_the_engines(example, rollout):
    policy, made = rollout
    curves = {arm: example["Curve"]() for arm in example["ARMS"]}
    for arm, curve in curves.items():
        example["compare"](policy, made, arm, curve)
    own, again, replay, truncated = curves.values()
    assert own.subsets[0] > 0.5 > 0.3 > again.subsets[0] > 0.01
    assert replay.subsets[0] == truncated.subsets[0] == 0
    assert own.divergence[0] > again.divergence[0] > replay.divergence[0] > 0
    assert replay.divergence == truncated.divergence


def test_the_loss_is_the_clipped_objective(example, rollout):
    """By hand, from the log-probabilities; weighted by the truncated ratio of the path in the last arm."""
    policy, made = rollout
    some = torch.arange(0, 128, 3)
    for arm in example["ARMS"]:
        loss, ratio = example["grpo_loss"](policy, made, some, arm)
        log_prob, routings = example["forward"](policy, made, some, arm)
        expected = (log_prob - made.log_prob[some]).exp()
        torch.testing.assert_close(ratio, expected.detach(), rtol=1e-5, atol=0)
        gain = torch.minimum(expected * made.advantage[some], expected.clamp(0.8, 1.2) * made.advantage[some])
        if arm == "replay, truncated ratio":
            moved = torch.stack([r.log_prob for r in routings], 1) - made.record[some].log_probs
            weight = moved.double().sum(1).exp().clamp(max=2).float().detach()
            assert weight.std() > 0.01
            gain = gain * weight
        torch.testing.assert_close(loss, -gain.mean(), rtol=1e-5, atol=1e-7)


def test_it_runs_and_tells(example, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = example["main"](["--steps", "2", "--seeds", "0", "--epochs", "1", "--rows", str(path)])
    arms = list(example["ARMS"])
    assert [(row.arm, row.seed) for row in rows] == [(arm, seed) for seed in (0,) for arm in arms]
    assert all(1 <= row.spike < math.inf and row.gradient > 0 for row in rows)
    assert [row.subsets == 0 for row in rows] == [False, False, True, True]
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["reward"] for row in written] == [row.reward for row in rows]
    assert {row["steps"] for row in written} == {2}
    printed = capsys.readouterr().out
    assert "replay, truncated ratio" in printed
    assert " of 1 " in printed


def test_arms_can_be_left_out(example, capsys):
    arms = ["replay, truncated ratio", "replay"]
    rows = example["main"](["--steps", "1", "--seeds", "0", "--epochs", "1", "--decide", "mode", "--arms", *arms])
    assert [row.arm for row in rows] == arms
    assert "route again" not in capsys.readouterr().out.split("paired")[1]


@pytest.mark.parametrize(("rewards", "collapsed"), [([0.1] * 10 + [0.8] * 10 + [0.3] * 10, True), ([0.2] * 30, False)])
def test_a_collapse_is_told_by_the_reward(example, rewards, collapsed):
    curve = example["Curve"](reward=rewards, gradient=[1.0, 1.0, 8.0])
    for name in ("subsets", "divergence", "spread", "clipped"):
        setattr(curve, name, [0.0])
    row = example["row_of"]("replay", 0, curve)
    assert row.collapsed == collapsed
    assert row.reward == pytest.approx(rewards[-1])
    assert row.spike == 8


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--decide", "never"], ["--epochs", "x"]])
def test_options_are_checked(example, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        example["main"](arguments)
    assert arguments[0] in capsys.readouterr().err
