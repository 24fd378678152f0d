"""Patched models of transformers at other temperatures: what they decide, how they weigh, and what is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from tests.integrations.models import FAMILIES, dynamic, tiny, tokens
from tests.integrations.support import SEED, logits_of

pytestmark = [
    pytest.mark.integrations,
    # Of transformers, about themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def _trained(handle: adapter.Handle) -> tuple[cr.Routing, ...]:
    handle.model.train()
    handle.set_step(0)
    handle.model(tokens(), use_cache=False)
    return handle.routings


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_mode_in_training_has_the_same_weights_at_any_temperature(family: str) -> None:
    """Each family's own rule weighs by the logits themselves; only the distribution is tempered."""
    found = []
    for temperature in (1.0, 0.25):
        model = tiny(family)
        handle = adapter.patch(model, dynamic(family), seed=SEED, decide="mode", temperature=temperature)
        found.append(_trained(handle))
    for plain, tempered in zip(*found, strict=True):
        assert torch.equal(plain.mask, tempered.mask)
        assert torch.equal(plain.gates, tempered.gates)
        assert torch.equal(plain.logits, tempered.logits)
        expected = plain.distribution.circuit(plain.logits / 0.25)
        torch.testing.assert_close(tempered.marginals, expected.marginals)
        assert not torch.allclose(tempered.marginals, plain.marginals)
        assert torch.equal(tempered.mask, plain.distribution.mode == 1)


def test_temperature_1_changes_no_decision() -> None:
    routings = []
    for options in ({}, {"temperature": 1, "decide": "sample"}):
        handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 4), seed=SEED, **options)
        routings.append(_trained(handle))
    for plain, given in zip(*routings, strict=True):
        assert torch.equal(plain.mask, given.mask)
        assert torch.equal(plain.gates, given.gates)


def test_a_schedule_sets_the_temperature() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2), seed=SEED, decide=0.5)
    schedule = cr.schedules.geometric(4.0, 0.01, 10)
    agreements = []
    for step in (0, 5, 10):
        handle.temperature = schedule(step)
        routings = _trained(handle)
        assert all(routing.temperature == schedule(step) for routing in routings)
        agreements.append(float(torch.stack([cr.metrics.mode_agreement(r) for r in routings]).mean()))
    assert agreements == sorted(agreements)
    with pytest.raises(ValueError, match=r"temperature=0\.0: must be positive"):
        handle.temperature = 0.0
    assert handle.temperature == pytest.approx(0.01)


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4)], ids=repr)
def test_evaluation_is_the_mode_at_any_temperature(constraint: cr.Constraint) -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, constraint, temperature=0.5)
    expected = logits_of(model)
    for routing in handle.routings:
        torch.testing.assert_close(routing.marginals, routing.distribution.circuit(routing.logits / 0.5).marginals)
    handle.temperature = 5.0
    assert torch.equal(logits_of(model), expected)


def test_the_temperature_is_saved_with_the_model(tmp_path: Path) -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED, decide=0.25, temperature=0.75)
    handle.temperature = 0.5
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["circuitroute"]
    assert (saved["decide"], saved["temperature"]) == (0.25, 0.5)
    again = adapter.get_handle(adapter.load(tmp_path))
    assert again.temperature == 0.5
    for one, other in zip(_trained(again), _trained(handle), strict=True):
        assert torch.equal(one.mask, other.mask)


def test_numbers_of_other_kinds_are_saved_as_numbers(tmp_path: Path) -> None:
    model = tiny("OLMoE")
    adapter.patch(model, cr.Exactly(2), decide=torch.tensor(0.25), temperature=torch.tensor(0.5))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["circuitroute"]
    assert (saved["decide"], saved["temperature"]) == (0.25, 0.5)


def test_settings_without_a_temperature_are_at_1(tmp_path: Path) -> None:
    """As version 0.1 saved them."""
    model = tiny("OLMoE")
    adapter.patch(model, cr.Exactly(2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["circuitroute"]["temperature"], config["circuitroute"]["decide"]
    path.write_text(json.dumps(config))
    assert adapter.get_handle(adapter.load(tmp_path)).temperature == 1.0


def test_a_copy_has_a_temperature_of_its_own() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2), temperature=0.5)
    copied = adapter.get_handle(copy.deepcopy(handle.model))
    copied.temperature = 2.0
    assert (handle.temperature, copied.temperature) == (0.5, 2.0)
    assert handle.model.config.circuitroute["temperature"] == 0.5
    assert copied.model.config.circuitroute["temperature"] == 2.0
