"""The benchmarks of serving functions: rows that say what they measured."""

from itertools import combinations

import pytest
import torch

from benchmarks import greedy_groups, rows, served

SMALL = ["--experts", "8", "--k", "3", "--groups", "4", "--active", "2"]


def test_what_the_greedy_groups_lose_is_counted(tmp_path, capsys):
    """Against every subset of three that lies in two groups of two."""
    out = tmp_path / "rows.jsonl"
    settings = ["--tokens", "60", "--spreads", "2", "--correlations", "0", "0.5", "--seeds", "2", "--out", str(out)]
    assert greedy_groups.main([*SMALL, *settings]) == 0
    found = rows.read(out)
    assert len(found) == 2 * 2 * 2  # rules, correlations, seeds
    allowed = [s for s in combinations(range(8), 3) if len({i // 2 for i in s}) <= 2]
    for row in found:
        options = greedy_groups.parser().parse_args([*SMALL, *settings])
        logits = greedy_groups.logits_of(options, row["spread"], row["correlation"], row["seed"])
        sigmoids = row["rule"] == "top2 of sigmoids"
        scores = torch.sigmoid(logits) if sigmoids else logits
        pairs = scores.view(60, 4, 2)
        worth = pairs.sum(-1) if sigmoids else pairs.amax(-1)
        other = losses = 0.0
        for token in range(60):
            best = max(sum(scores[token, list(s)].tolist()) for s in allowed)
            kept = worth[token].topk(2).indices.tolist()
            inside = sorted((float(scores[token, i]) for g in kept for i in (2 * g, 2 * g + 1)), reverse=True)
            lost = best - sum(inside[:3])
            other += lost > 1e-9
            losses += lost / best
        assert row["other_subset"] == pytest.approx(other / 60)
        assert row["mean_loss"] == pytest.approx(losses / 60, rel=1e-6)
    assert sum(row["other_subset"] for row in found) > 1
    assert "| top2 of sigmoids | 2 | 0.5 |" in capsys.readouterr().out


@pytest.mark.slow  # exports ten programs
def test_serving_functions_are_timed_eagerly_and_exported(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert served.main([*SMALL, "--tokens", "5", "--repeats", "1", "--out", str(out)]) == 0
    found = rows.read(out)
    assert len(found) == 1 + 2 * 10
    assert found[0]["ratio_to_topk"] == 1
    assert {"groups: sample, head, exported", "greedy groups, eager"} <= {row["provider"] for row in found}
