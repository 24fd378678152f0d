"""Two processes that share torchtitan's experts compute what one does, and exchange only what was chosen."""

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
    pytest.importorskip("torchtitan.models.common.moe", reason="torchtitan and what it imports", exc_type=ImportError)

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
]

WORKER = Path(__file__).with_name("torchtitan_worker.py")
SCENARIOS = ("ragged", "distinct", "ragged_checkpoint", "ragged_probes", "fixed", "empty_handed", "replayed")
TOKENS, STEPS = 24, 3


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("torchtitan")
    command = [sys.executable, str(WORKER), str(directory)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return {processes: json.loads((directory / f"{processes}.json").read_text("utf-8")) for processes in (1, 2)}


def test_all_scenarios_ran(together: dict[int, dict[str, Any]]) -> None:
    assert set(together[1]) == set(together[2]) == set(SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_are_one(together: dict[int, dict[str, Any]], scenario: str) -> None:
    """Decisions, load and numbers of rows the same; losses and all gradients of every step to rounding."""
    alone, both = (together[processes][scenario] for processes in (1, 2))
    for exact in ("decisions", "load", "rows"):
        assert both[exact] == alone[exact]
    assert len(alone["losses"]) == STEPS
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for ours, theirs in zip(both["gradients"], alone["gradients"], strict=True):
        for gradient, expected in zip(ours, theirs, strict=True):
            found, wanted = torch.tensor(gradient), torch.tensor(expected)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_experts_get_what_was_chosen(together: dict[int, dict[str, Any]]) -> None:
    results = together[2]

    def chosen(scenario: str) -> list[int]:
        return [int(torch.tensor(mask).sum()) for mask in results[scenario]["decisions"]]

    for scenario in ("ragged", "replayed", "empty_handed", "fixed"):
        assert results[scenario]["rows"] == chosen(scenario)
    assert results["empty_handed"]["rows"] == [4] * STEPS
    assert results["distinct"]["rows"] == [TOKENS * 4] * STEPS
    assert results["ragged_probes"]["rows"] == [count + TOKENS for count in chosen("ragged_probes")]
    assert 1.5 * TOKENS < max(results["ragged"]["rows"]) < 3.9 * TOKENS


def test_padding_and_recomputation_change_nothing(together: dict[int, dict[str, Any]]) -> None:
    for scenario in ("distinct", "ragged_checkpoint"):
        assert together[2][scenario]["losses"] == pytest.approx(together[2]["ragged"]["losses"], rel=1e-5)
    assert together[2]["distinct"]["decisions"] == together[2]["ragged"]["decisions"]


def test_load_is_of_the_chosen(together: dict[int, dict[str, Any]]) -> None:
    """Summed over steps; of the recomputed layer twice, as torchtitan knows; probes count nowhere."""
    for scenario in SCENARIOS:
        result, times = together[2][scenario], 2 if scenario == "ragged_checkpoint" else 1
        masks = [torch.tensor(mask).sum(0) for mask in result["decisions"]]
        for step in range(STEPS):
            assert result["load"][step] == (times * torch.stack(masks[: step + 1]).sum(0)).tolist()
