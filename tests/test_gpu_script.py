"""``benchmarks/gpu.sh`` as far as it goes without a GPU, and that it tells right from wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import triton_check
from circuitroute.engines.subset import TritonSubset

pytest.importorskip("triton", minversion="3.4")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_all_parts_run(tmp_path):
    few = {"DEVICE": "cpu", "SMOKE": "3:2:1", "SIZES": "2:1-2", "WIDE": "2:1-2", "JOBS": "1"}
    environment = {**os.environ, **few, "OUT": str(tmp_path), "PYTHON": sys.executable}
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path)
    assert [row["title"] for row in found if row["part"] == "check" and row["right"]] == [
        "smoke 3:2:1",
        "wide n=2 counts=1..2 T=4",
        "wide n=2 counts=1..2 T=4, ordinary",
    ]
    timed = {row["call"]: row["graph_us"] for row in found if row["part"] == "time"}
    assert set(timed) >= {"forward", "sample", "backward", "topk_step", "route_step"}
    assert min(timed.values()) > 0
    assert "route_step" in (tmp_path / "profile.txt").read_text()
    # No memcheck.txt without a GPU.
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "summary.txt", "log.txt", "profile.txt"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_what_is_wrong_is_said_and_not_timed(tmp_path, monkeypatch):
    report = triton_check.Report(tmp_path, CPU)
    assert not triton_check.timed(report, 3, 1, 1), "never checked"
    sample = TritonSubset.sample
    monkeypatch.setattr(TritonSubset, "sample", lambda *arguments: ~sample(*arguments))
    assert triton_check.main(["wide", "3:1", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert all(row["wrong"] == ["sample alone"] for row in rows(tmp_path)[1:])
    assert "WRONG (sample alone) wide n=3" in (tmp_path / "summary.txt").read_text()
    monkeypatch.undo()
    assert triton_check.smoke(report, "evidence")
    assert not triton_check.timed(report, 3, 1, 1), "found wrong once"
    assert [row.get("timed") for row in rows(tmp_path) if row["part"] == "time"] == [False, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_timing_that_dies_costs_no_other_row(tmp_path, monkeypatch):
    report = triton_check.Report(tmp_path, CPU)
    report.tell("right", part="check", size=[3, 1, 1], right=True)

    def broken():
        raise RuntimeError("no such thing")

    calls = {"broken": lambda x: broken, "copy": lambda x: x.clone}
    monkeypatch.setattr(triton_check, "calls_of", lambda *arguments: calls)
    assert not triton_check.timed(report, 3, 1, 1)
    assert [row.get("call") for row in rows(tmp_path) if "graph_us" in row] == ["copy"]
    assert "FAILED broken (3, 1..1)" in (tmp_path / "summary.txt").read_text()


def test_kinds_of_rows_have_names(tmp_path):
    with pytest.raises(ValueError, match="smoke nonsense: expected n:k:T, evidence"):
        triton_check.smoke(triton_check.Report(tmp_path, CPU), "nonsense")
    assert triton_check._size("64:4-8") == (64, 4, 8)
    assert triton_check._size("64:8") == (64, 8, 8)
