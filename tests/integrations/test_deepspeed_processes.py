"""Two processes that share DeepSpeed's experts compute, and learn, what one does."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integrations.test_processes import environment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("deepspeed.moe.layer", reason="deepspeed and what it imports", exc_type=ImportError)

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
]

WORKER = Path(__file__).with_name("deepspeed_worker.py")
LAYERS = ("between", "fixed", "one", "replayed")
ENGINES = ("engine_zero_1", "engine_zero_2")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("deepspeed")
    command = [sys.executable, str(WORKER), str(directory)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return {processes: json.loads((directory / f"{processes}.json").read_text("utf-8")) for processes in (1, 2)}


def test_all_scenarios_ran(together: dict[int, dict[str, Any]]) -> None:
    assert set(together[1]) == set(together[2]) == {*LAYERS, *ENGINES}


@pytest.mark.parametrize("scenario", LAYERS)
def test_two_processes_are_one(together: dict[int, dict[str, Any]], scenario: str) -> None:
    alone, both = (together[processes][scenario] for processes in (1, 2))
    assert both["decisions"] == alone["decisions"]
    assert both["load"] == alone["load"] == torch.tensor(alone["decisions"]).sum(0).tolist()
    assert both["balance"] == pytest.approx(alone["balance"], rel=1e-5)
    for found, wanted in ((both["output"], alone["output"]), *zip(both["gradients"], alone["gradients"], strict=True)):
        expected = torch.tensor(wanted)
        assert expected.any()
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_both_make_room_for_the_largest_load_of_either(together: dict[int, dict[str, Any]]) -> None:
    for scenario in LAYERS:
        masks = torch.tensor(together[2][scenario]["decisions"]).chunk(2)
        assert together[2][scenario]["rows"] == [max(int(mask.sum(0).max()) for mask in masks)]


@pytest.mark.parametrize("scenario", ENGINES)
def test_engines_on_two_processes_learn_as_one_does(together: dict[int, dict[str, Any]], scenario: str) -> None:
    alone, both = (together[processes][scenario] for processes in (1, 2))
    assert both["decisions"] == alone["decisions"]
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert len(set(alone["losses"])) == len(alone["losses"]) == 3
