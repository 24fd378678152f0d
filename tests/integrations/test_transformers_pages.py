"""The page about transformers and the example that fine-tunes one of its models run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

import transformers

import circuitroute
from benchmarks import rows
from benchmarks.transformers_layer import main as benchmark
from circuitroute.routing.runs import read_run
from tests.integrations.models import tiny, tokens

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def test_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They are fenced as ``py``: blocks fenced as ``python`` are run without any extra."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    scope: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs/transformers.md", "exec", dont_inherit=True), scope)
    printed = capsys.readouterr().out
    for line in ("{0: Exactly(2), 1: Exactly(2)}", "Handle(OlmoeForCausalLM, layers=[1])"):
        assert line in printed
        assert line in text


def test_the_page_about_a_training_run_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: Trainer needs it")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "training-run.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    settings: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    scope: dict[str, Any] = {
        "__name__": "docs",
        "cr": circuitroute,
        "model": tiny("OLMoE"),
        "arguments": transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=20, logging_steps=10, **settings
        ),
        "rows": [{"input_ids": row, "labels": row} for row in tokens(32)],
    }
    exec(compile(block, "docs/training-run.md", "exec", dont_inherit=True), scope)
    steps = read_run(tmp_path / "run.jsonl").steps
    assert [step.step for step in steps] == [10, 20]
    assert all(step.loss is not None for step in steps)
    logged = [row for row in scope["trainer"].state.log_history if "routing/layer0/load_entropy" in row]
    assert [row["step"] for row in logged] == [10, 20]
    assert logged[1]["routing/layer1/price"] != 0.0


@pytest.mark.parametrize("extra", [[], ["--checkpointing"]], ids=["plain", "checkpointing"])
def test_the_example_runs(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: Trainer needs it")
    main = runpy.run_path(str(ROOT / "examples" / "finetune_transformers.py"))["main"]
    found = main(["--steps", "2", "--batch", "2", "--length", "16", "--held-out", "2", "--kmax", "5", *extra])
    assert [row["run"] for row in found] == ["stock", "frozen router", "exact-k", "range-k"]
    before = torch.tensor([row["before"] for row in found])
    torch.testing.assert_close(before[:3], before[:1].expand(3))  # own rule: evaluated as the stock model is
    assert all(row["after"] < row["before"] for row in found)
    assert [row["experts"] for row in found[:3]] == [4.0, 4.0, 4.0]
    assert 2.0 <= found[3]["experts"] <= 5.0
    assert all(row["run"] in capsys.readouterr().out for row in found[:1])


def test_the_benchmark_writes_its_rows(tmp_path: Path) -> None:
    sizes = ["--tokens", "32", "--experts", "8", "--k", "2", "--hidden", "16", "--intermediate", "8", "--repeats", "1"]
    assert benchmark([*sizes, "--out", str(tmp_path / "rows.jsonl")]) == 0
    found = rows.read(tmp_path / "rows.jsonl")
    assert [row["provider"] for row in found] == ["stock", "exact", "range"]
    assert found[0]["ratio_to_stock"] == 1.0
    assert all(row["median_ms"] > 0 and row["transformers"] for row in found)
