"""The study of learned priors: what it fits, what its tables and picture say, on decisions that are made here."""

import json
import math
from pathlib import Path

import pytest
import torch
from learned_prior import models, report, study
from learned_prior.decisions import ROUTERS, Decisions

import circuitroute as cr

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "examples" / "rows" / "learned-prior.jsonl"
E = 6


def decisions(tokens=300):
    """[T, 2, 6]: exactly four of six experts, by two hidden causes, in two layers."""
    circuit = cr.compile(cr.Exactly(4), E)
    logits = 2 * torch.randn(2, 2, E, generator=torch.Generator().manual_seed(0))
    cause = torch.arange(tokens) % 2
    return circuit(logits[cause]).sample(key=cr.random_key(0, torch.arange(2 * tokens).reshape(tokens, 2))) == 1


@pytest.fixture
def made(monkeypatch):
    for name in ("EM_STEPS", "GRADIENT_STEPS", "CURVE_STEPS", "JOINT_STEPS"):
        monkeypatch.setattr(study, name, 2)
    monkeypatch.setattr(study, "STATES", (2, 3))
    masks = decisions()
    monkeypatch.setattr(study, "recorded", lambda router, seed, *rest: Decisions(masks[:200], masks[200:]))
    return list(study.rows([0, 1], ["exact-k-0.25"]))


def test_rows_tables_and_picture(made, tmp_path):
    assert {row["part"] for row in made} == {"models", "choices", "curves"}
    assert {row["seed"] for row in made} == {0, 1}
    assert all(math.isfinite(row["bits"]) and row["bits"] > 0 for row in made)
    allowed = [row["bits"] for row in made if row.get("model") == "any allowed subset"]
    assert allowed == pytest.approx([math.log2(15)] * len(allowed))
    text = report.tables(made)
    for part in (
        "coins times constraint",
        "prior x constraint, S = 3, em",
        "adam under the constraint",
        "clustered",
        "em-batches",
    ):
        assert part in text
    report.picture(made, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_fits_are_distributions():
    """Every fit sums to 1 over what it allows, and no fit is worse than the family that it contains."""
    masks = decisions()[:, 0]
    circuit = cr.compile(ROUTERS["exact-k-0.25"], E)
    fitted = dict(models.baselines(masks, circuit))
    every = torch.tensor([[i >> j & 1 for j in range(E)] for i in range(1 << E)], dtype=torch.bool)
    for name in ("independent coins", "count, then any subset"):
        assert fitted[name].log_prob(every).exp().sum().item() == pytest.approx(1.0)
    bits = {name: models.bits(fit.log_prob, masks) for name, fit in fitted.items()}
    assert bits["coins times constraint"] < min(bits["any allowed subset"], bits["independent coins"])
    assert bits["any allowed subset"] == pytest.approx(math.log2(15))


@pytest.mark.parametrize("method", ["em", "em-batches", "adam", "adam-batches"])
def test_every_way_of_training_learns(method):
    masks = decisions()[:, 0]
    seen = []
    trained = models.train_prior(masks, method, 20, lambda *at: seen.append(at[0]), states=3)
    assert seen == list(range(1, 21))
    assert models.bits(trained.prior.log_prob, masks) < models.bits(cr.SubsetPrior(E, 3).log_prob, masks) - 0.5


def test_the_page_shows_the_rows_that_are_kept():
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    page = (ROOT / "docs" / "learned-priors.md").read_text(encoding="utf-8")
    shown = [line for line in report.tables(rows).splitlines() if line.startswith("|")]
    assert len(shown) > 30
    assert [line for line in shown if line not in page] == []
