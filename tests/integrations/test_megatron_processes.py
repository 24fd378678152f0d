"""Experts of a Megatron layer spread over two processes: what one process gives, and what a dense layer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integrations.test_processes import run_together

pytest.importorskip(
    "tests.integrations.megatron_support",
    reason="megatron-core: pip install --no-deps megatron-core==0.16.1",
    exc_type=ImportError,
)

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
]

WORKER = Path(__file__).with_name("megatron_worker.py")
S, SEQUENCES, E = 6, 4, 8
T = S * SEQUENCES
SCENARIOS = (
    "one count",
    "several counts",
    "no experts for some",
    "groups",
    "float32",
    "allgather",
    "recomputed",
    "evaluation",
    "other numbers of tokens",
    "tokens on one process",
    "replayed",
    "replayed, recomputed",
    "replayed in evaluation",
    "replayed, allgather",
    "replayed, other numbers of tokens",
    "an idle process",
    "an idle process that sends nothing",
    "nothing anywhere",
)
GRADIENTS = ("input", "router", "experts")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    return run_together(tmp_path_factory.mktemp("megatron"), WORKER)


def test_all_scenarios_ran(together: dict[int, dict[str, Any]]) -> None:
    assert set(together[1]) == set(together[2]) == set(SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_give_what_one_does(together: dict[int, dict[str, Any]], scenario: str) -> None:
    alone, both = together[1][scenario], together[2][scenario]
    assert both["mask"] == alone["mask"]
    for name in ("output", "log_prob", *GRADIENTS):
        close(both[name], alone[name], scenario)
    assert (tensor(alone["router"]).abs().sum() > 0) == (scenario != "nothing anywhere")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_and_what_a_dense_layer_does(together: dict[int, dict[str, Any]], scenario: str) -> None:
    alone = together[1][scenario]
    for name in ("output", *GRADIENTS):
        close(alone[name], alone["dense"][name], scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_experts_compute_what_was_chosen_and_nothing_else(together: dict[int, dict[str, Any]], scenario: str) -> None:
    for processes in (1, 2):
        found = together[processes][scenario]
        chosen = tensor(found["mask"]).sum((0, 1))
        assert found["counts"] == chosen.tolist()
        if scenario == "one count":
            assert chosen.sum() == 4 * T
        else:
            assert chosen.sum() < 4 * T


def test_idle_experts_are_idle(together: dict[int, dict[str, Any]]) -> None:
    """Those of the second process, which gets no token; with half as many experts, or none, for every token."""
    per_token = {"an idle process": 2 * T, "an idle process that sends nothing": T // 2, "nothing anywhere": 0}
    for scenario, pairs in per_token.items():
        counts = together[2][scenario]["counts"]
        assert sum(counts[: E // 2]) == pairs
        assert not any(counts[E // 2 :])
        assert not tensor(together[2][scenario]["experts"])[E // 2 :].any()


def test_a_record_is_of_all_tokens_sequence_by_sequence(together: dict[int, dict[str, Any]]) -> None:
    """However many of them a process has."""
    wanted = torch.zeros(T, E)
    for token in range(T):
        wanted[token, [(token * 3 + i * 5) % E for i in range(1 + token % 4)]] = 1
    by_position = wanted.view(SEQUENCES, S, E).transpose(0, 1)
    for scenario in (name for name in SCENARIOS if name.startswith("replayed")):
        for processes in (1, 2):
            assert torch.equal(tensor(together[processes][scenario]["mask"]), by_position.double())


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Any, wanted: Any, scenario: str) -> None:
    """To 1e-10 in float64, and 1e-5 in float32."""
    tolerance = 1e-5 if scenario == "float32" else 1e-10
    torch.testing.assert_close(tensor(found), tensor(wanted), atol=tolerance, rtol=tolerance)
