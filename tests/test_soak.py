"""The soak finds nothing in some cases, finds what is planted, and its truth is the other truth."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import circuitroute as cr
from tests.truth import world_truth
from tools.soak import command, rules, work
from tools.soak.cases import case
from tools.soak.checks import Fault, Run
from tools.soak.truth import Truth, derivative, worlds

SOME = range(0, 96, 8)


@pytest.mark.parametrize("number", SOME)
def test_no_fault_in_some_cases(number):
    outcome = work.run_case(number)
    assert outcome.fault is None
    assert outcome.covered


def test_a_case_is_a_function_of_its_number():
    first, again, other = case(5), case(5), case(6)
    assert first.rule.constraint == again.rule.constraint == other.rule.constraint  # threads share its circuit
    assert torch.equal(first.logits.nan_to_num(), again.logits.nan_to_num())
    assert work.run_case(5).digest == work.run_case(5).digest != work.run_case(6).digest


def test_a_planted_fault_is_found(monkeypatch):
    entropy = cr.SubsetDistribution.entropy
    monkeypatch.setattr(cr.SubsetDistribution, "entropy", lambda self: entropy(self) + 1e-3)
    found = [work.run_case(number).fault for number in SOME]
    assert any(fault is not None and fault["message"].startswith("entropy") for fault in found)


def test_a_planted_gradient_is_found(monkeypatch):
    marginals = cr.SubsetDistribution.marginals.fget
    wrong = property(lambda self: marginals(self).detach() * 2 - marginals(self))
    monkeypatch.setattr(cr.SubsetDistribution, "marginals", wrong)
    found = [work.run_case(number).fault for number in range(0, 96, 4)]
    assert any(fault is not None and "gradient" in fault["message"] for fault in found)


def test_an_error_is_a_fault(monkeypatch):
    def broken(self, *_, **__):
        raise RuntimeError("out of order")

    monkeypatch.setattr(cr.SubsetDistribution, "sample", broken)
    found = [fault for number in SOME if (fault := work.run_case(number).fault) is not None]
    assert {fault["kind"] for fault in found} == {"RuntimeError"}
    assert "out of order" in found[0]["trace"]


@pytest.mark.parametrize("seed", range(12))
def test_its_truth_is_the_other_truth(seed):
    rng = np.random.default_rng(seed)
    rule = rules.draw(rng, 6)
    theta = torch.from_numpy(rng.normal(size=(4, rule.n)) * 3)
    theta[0, 0], theta[1, -1], theta[2, 0] = np.inf, -np.inf, np.nan
    phi = torch.from_numpy(rng.normal(size=(4, rule.n + 1)))
    ours = Truth(rule, theta.requires_grad_(), phi.requires_grad_())
    theirs = world_truth(theta, rule.allows(worlds(rule.n)), phi)
    for name in ("log_partition", "marginals", "count_probs", "entropy"):
        np.testing.assert_allclose(getattr(ours, name).detach(), getattr(theirs, name), atol=1e-11, err_msg=name)
    u = torch.ones_like(theta)
    slope = derivative(ours.marginals, ours.theta, u).detach()
    kept = ~ours.lost
    exact = np.einsum("tij,tj->ti", theirs.covariance, u)
    np.testing.assert_allclose(slope[kept], np.where(theta.detach().isinf(), 0, exact)[kept], atol=1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_walks_say_what_enumeration_says(seed):
    rng = np.random.default_rng(seed)
    rule = next(r for r in iter(lambda: rules.draw(rng, 6), None) if r.walk is not None)
    theta = torch.from_numpy(rng.normal(size=(3, rule.n))).requires_grad_()
    truth = Truth(rule, theta)
    torch.testing.assert_close(truth._walked(), truth._enumerated(), rtol=1e-12, atol=1e-12)


def test_what_is_not_close_is_a_fault():
    run = Run(case(0))
    bounds = {torch.float32: 1e-5, torch.float64: 1e-5}
    run.close("this", torch.tensor([1.0]), torch.tensor([1.0 + 1e-6], dtype=torch.float64), bounds)
    with pytest.raises(Fault, match=r"this\[1\] is 2\.0: expected 1\.0 within"):
        run.close("this", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), bounds)
    with pytest.raises(Fault, match="has shape"):
        run.close("this", torch.ones(2), torch.ones(3), bounds)
    with pytest.raises(Fault, match="that"):
        run.equal("that", torch.ones(2), torch.zeros(2))


def test_threads_write_what_they_covered_and_memory_is_watched(tmp_path):
    options = command._parser().parse_args(["--minutes", "0.02", "--threads", "2", "--processes", "1"])

    class Lines(list):
        put = list.append

    lines = Lines()
    command._process(0, options, lines)
    assert lines[-1]["report"]["cases"] > 0
    assert json.dumps(lines)
    assert lines[-1]["report"]["covered"]["log_partition"] > 0
    options.ceiling = 1.0
    command._process(0, options, lines)
    assert any("are resident" in line.get("fault", {"message": ""})["message"] for line in lines)


def test_growth_is_a_fault():
    options = command._parser().parse_args(["--minutes", "30"])
    steady = [(float(t), 100.0 + (t < 100) * t) for t in range(1000)]
    assert command._memory_faults(steady, options) == []
    growing = [(float(t), 100.0 + t) for t in range(1000)]
    assert "grew from" in command._memory_faults(growing, options)[0]["message"]


def test_workers_that_are_forked_give_the_same_to_the_bit():
    faults: list[object] = []
    tally = work.Tally(faults.append)
    work.in_child("fork", [3], 0, tally)
    assert faults == []
    assert tally.covered["forked workers"] == 1


def test_one_case_from_the_command_line(capsys):
    assert command.main(["--case", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["fault"] is None
