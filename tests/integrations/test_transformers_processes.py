"""Two processes that hold a patched model of transformers together decide, and lose, what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.integrations.test_processes import run_together

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
]

WORKER = Path(__file__).with_name("transformers_worker.py")
# Both processes hold all tokens, or each its own.
SHARED = (
    "expert_parallel_exact",
    "expert_parallel_range",
    "expert_parallel_all_reduce",
    "expert_parallel_float64",
    "tensor_parallel_exact",
    "tensor_parallel_range",
    "expert_parallel_probes",
    "tensor_parallel_probes",
)
SPLIT = ("expert_parallel_split", "fsdp_checkpoint_exact", "fsdp_checkpoint_range", "fsdp_checkpoint_probes")
# What the cheapest padding is that is right, in two processes; in one it is "ragged", or "sentinel" in the eager loop.
PADDING = {
    "expert_parallel_range": "distinct",
    "expert_parallel_all_reduce": "distinct",
    "expert_parallel_float64": "distinct",
    "expert_parallel_split": "distinct",
    "tensor_parallel_range": "ragged",
    "fsdp_checkpoint_range": "ragged",
    "expert_parallel_probes": "distinct",
    "tensor_parallel_probes": "ragged",
    "fsdp_checkpoint_probes": "ragged",
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    return run_together(tmp_path_factory.mktemp("processes"), WORKER)


def test_all_scenarios_ran(together: dict[int, dict[str, Any]]) -> None:
    assert set(together[1]) == set(together[2]) == {*SHARED, *SPLIT}


@pytest.mark.parametrize("scenario", SHARED)
def test_processes_that_share_tokens_decide_alike(together: dict[int, dict[str, Any]], scenario: str) -> None:
    alone, both = together[1][scenario]["decisions"], together[2][scenario]["decisions"]
    assert len(alone) == 3
    assert both == [[layer + layer for layer in step] for step in alone]


@pytest.mark.parametrize("scenario", SPLIT)
def test_processes_that_split_tokens_decide_as_one(together: dict[int, dict[str, Any]], scenario: str) -> None:
    alone, both = together[1][scenario]["decisions"], together[2][scenario]["decisions"]
    assert len(alone) == 3
    assert both == alone


@pytest.mark.parametrize("scenario", SHARED + SPLIT)
def test_two_processes_lose_what_one_does(together: dict[int, dict[str, Any]], scenario: str) -> None:
    """The third loss has two updates behind it, and the evaluation three."""
    alone, both = together[1][scenario], together[2][scenario]
    tolerance = 1e-12 if scenario.endswith("float64") else 1e-5
    assert both["losses"] == pytest.approx(alone["losses"], abs=tolerance)
    assert both["evaluation"] == pytest.approx(alone["evaluation"], abs=5 * tolerance)


@pytest.mark.parametrize("scenario", SHARED + SPLIT)
def test_every_parameter_moves_as_far(together: dict[int, dict[str, Any]], scenario: str) -> None:
    """Sharded experts too: no gradient is counted twice, or by half."""
    alone, both = together[1][scenario]["moved"], together[2][scenario]["moved"]
    assert both == pytest.approx(alone, rel=1e-9 if scenario.endswith("float64") else 1e-3)
    assert min(alone.values()) > 0


def test_padding_is_what_is_right_in_several_processes(together: dict[int, dict[str, Any]]) -> None:
    assert {name: together[2][name]["padding"] for name in PADDING} == PADDING
    alone = {name: together[1][name]["padding"] for name in PADDING}
    assert alone == {**dict.fromkeys(PADDING, "ragged"), "expert_parallel_float64": "sentinel"}


def test_expert_parallelism_refuses_the_others(together: dict[int, dict[str, Any]]) -> None:
    refused = together[2]["expert_parallel_range"]["refused"]
    assert ["in several processes" in message for message in refused] == [True, True]
    assert refused[0].startswith("padding='ragged'")
    assert refused[1].startswith("padding='sentinel'")
