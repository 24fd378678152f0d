"""The ops ``step`` and ``evaluation`` read what they say, and hold it to the naive engine. Nothing here is timed."""

import pytest
import torch

from benchmarks import profile, rows
from benchmarks.__main__ import main
from benchmarks.registry import BOTH, FORWARD, Outputs, get_op, providers
from benchmarks.step.deployed import top_k
from benchmarks.subset.workload import SubsetCase

TINY = ["--tokens", "16", "--sizes", "8:2", "--repeats", "1"]


@pytest.mark.parametrize("op", ["step", "evaluation"])
def test_rows_of_every_reading_are_right(op, tmp_path):
    out = tmp_path / "rows.jsonl"
    names = [p.name for p in providers(op, None) if p.engine == "torch"] or None
    wanted = ["deployed", *(["torch:sample:balance", "torch:mode:padded"] if op == "step" else ["torch:gates"])]
    assert names is None  # composed steps run when asked for
    assert main(["--op", op, *TINY, "--providers", ",".join(wanted), "--out", str(out)]) == 0
    found = rows.read(out)
    passes = [FORWARD, BOTH] if op == "step" else [FORWARD]
    assert [(row["provider"], row["pass"]) for row in found] == [(name, each) for name in wanted for each in passes]
    errors = [row["max_abs_error"] for row in found if row["provider"] != "deployed"]
    assert all(0 < error < 1e-5 for error in errors)


def test_the_yardstick_renormalises():
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0]])
    torch.testing.assert_close(top_k(logits, 2), torch.softmax(torch.tensor([[3.0, 2.0]]), -1))


def test_a_wrong_gradient_shows():
    case = SubsetCase(16, 8, 2, 2)
    op = get_op("step")
    (build,) = (p.build for p in providers("step", ["torch:sample:gates"]) if p.name != "deployed")
    leaf = case.logits.clone().requires_grad_()
    outputs: Outputs = build(case)(leaf)
    (gradient,) = torch.autograd.grad(outputs.result, leaf, case.upstream(outputs.result))
    assert op.errors(case, outputs, gradient)[BOTH] < 1e-5
    assert op.errors(case, outputs, gradient + 0.01)[BOTH] > 0.009


@pytest.mark.slow  # compiles a prefix of the engine's loop
def test_the_profile_adds_up(tmp_path):
    pytest.importorskip("numba")
    out = tmp_path / "rows.jsonl"
    assert profile.main(["--sizes", "8:2", "--tokens", "16", "--repeats", "1", "--out", str(out)]) == 0
    found = [row for row in rows.read(out) if row["engine"] == "numba"]
    assert [row["stage"] for row in found[: len(profile.STAGES)]] == list(profile.STAGES)
    assert sum(row["share"] for row in found) == pytest.approx(1)
