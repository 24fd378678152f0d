"""What a budget router is told, once for all its layers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitroute as cr


def test_how_layers_decide_is_said_once() -> None:
    """By the attributes of the router: its layers have none that could be set or read in vain, and decide nothing."""
    budget = cr.BudgetRouter(
        4, 6, 2, cr.Between(1, 3), cr.Exactly(4), combine="sigmoid", decide="mode", temperature=0.5, bias=True
    )
    shown = repr(budget)
    for setting in ("combine='sigmoid'", "estimator='simple'", "decide='mode'", "temperature=0.5"):
        assert shown.count(setting) == 1
        assert not hasattr(budget.router(1), setting.split("=")[0])
    assert not hasattr(budget.router(1), "calibrate_temperature")
    assert "BudgetLayer(hidden_size=4, num_experts=6, constraint=Between(1, 3))" in shown
    hidden = torch.randn(5, 4)
    with pytest.raises(NotImplementedError, match="a layer of a BudgetRouter decides nothing by itself: call the Budg"):
        budget.router(0)(hidden)
    routing, _ = budget(hidden, budget.begin(hidden))
    budget.combine = "normalized"
    changed, _ = budget(hidden, budget.begin(hidden))
    assert torch.equal(changed.mask, routing.mask)
    assert not torch.allclose(changed.gates, routing.gates)
    torch.testing.assert_close(changed.gates.sum(-1), torch.ones(5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"combine": "sum"}, ValueError, "combine='sum'"),
        ({"estimator": "reinforce"}, ValueError, "estimator='reinforce'"),
        ({"estimator": 3}, TypeError, "estimator=3: expected a name"),
        ({"decide": 2}, ValueError, "decide=2: a share"),
        ({"temperature": 0}, ValueError, r"temperature=0\.0: must be positive"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cr.BudgetRouter(4, 6, 2, cr.Between(1, 3), cr.Exactly(4), **options)
