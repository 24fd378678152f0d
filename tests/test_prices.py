"""Price and bias: what they move, and the controller of a price.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import circuitroute as cr
from tests.tempered import INF, E, T, compiled, key_of, logits_of, with_evidence


def test_price_and_bias_move_the_choice_alone() -> None:
    circuit, logits = compiled(cr.Between(1, 4)), with_evidence()
    bias = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, 1.0])
    price = torch.linspace(-1, 3, T)
    routing = cr.route(logits, circuit, key=key_of(), price=price, bias=bias, temperature=0.5)
    moved = logits + bias - price[:, None]
    torch.testing.assert_close(routing.marginals, circuit(moved / 0.5).marginals)
    assert torch.equal(routing.logits, logits)
    assert torch.equal(routing.gates, cr.route(logits, circuit, replay=routing.mask).gates)
    mode = cr.route(logits, circuit, decide="mode", price=price, bias=bias)
    assert torch.equal(mode.mask, circuit(logits + (bias - price[:, None])).mode == 1)


def test_prices_of_all_shapes() -> None:
    circuit, logits, key = compiled(cr.Between(1, 4)), logits_of(), key_of()
    alone = cr.route(logits, circuit, key=key, price=1.5)
    for price in (torch.tensor(1.5), torch.full((T,), 1.5), torch.full((1,), 1.5)):
        assert torch.equal(cr.route(logits, circuit, key=key, price=price).mask, alone.mask)
    each = torch.linspace(0, 2, T)
    flat = cr.route(logits, circuit, key=key, price=each)
    for shape in ((5, 8), (T, 1)):
        folded = cr.route(logits.view(*shape, E), circuit, key=key.view(shape), price=each.view(shape))
        assert torch.equal(folded.mask, flat.mask)
    assert cr.route(logits, circuit, decide="mode", price=20.0).counts.eq(1).all()
    assert cr.route(logits, circuit, decide="mode", price=-20.0).counts.eq(4).all()


def test_a_small_price_is_not_lost_on_narrow_logits() -> None:
    """Added in float32: bfloat16 cannot tell 8 from 8.01."""
    circuit, logits = compiled(cr.Between(1, 4)), torch.full((1, E), 8.0, dtype=torch.bfloat16)
    routing = cr.route(logits, circuit, price=0.01)
    torch.testing.assert_close(routing.marginals, circuit(logits.float() - 0.01).marginals)
    assert routing.logits.dtype == torch.float32


def test_the_count_controller_holds_its_target(tmp_path: Any) -> None:
    """Within 0.1 of its target, from a price that is far off; states go through files."""
    circuit, controller = compiled(cr.Between(1, 5)), cr.CountController(2.5, gain=0.1)
    state = type(controller.init())(torch.tensor(8.0))
    counts = []
    for step in range(400):
        routing = cr.route(logits_of(200, seed=step), circuit, decide="mode", price=state.price)
        counts.append(cr.metrics.active_experts(routing))
        if step % 100 == 50:
            torch.save(state._asdict(), tmp_path / "state.pt")
            again = type(state)(**torch.load(tmp_path / "state.pt", weights_only=True))
            assert torch.equal(controller.update(again, routing).price, controller.update(state, routing).price)
            state = again
        state = controller.update(state, routing)
    assert counts[0] < 1.5
    assert abs(sum(counts[-100:]) / 100 - 2.5) < 0.1
    assert state.price.shape == ()
    assert not state.price.requires_grad


def test_the_count_controller_moves_by_the_rule() -> None:
    controller = cr.CountController(2.0, gain=0.5)
    routing = cr.route(logits_of(), compiled(cr.Exactly(3)))
    state = controller.update(controller.init(), routing)
    assert float(state.price) == 0.5
    nothing = cr.route(logits_of(0), compiled(cr.Exactly(3)))
    assert torch.equal(controller.update(state, nothing).price, state.price)
    assert eval(repr(controller), {"CountController": cr.CountController}).gain == 0.5


def test_processes_agree_on_the_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of experts and of tokens are added up, not means: processes may have different numbers of tokens."""
    elsewhere = torch.tensor([100.0, 10.0]).double()  # experts, tokens of another process
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total, group: total.add_(elsewhere))
    controller = cr.CountController(2.0, gain=1.0)
    routing = cr.route(logits_of(), compiled(cr.Exactly(3)))
    group: Any = "a process group"
    state = controller.update(controller.init(), routing, group)
    assert float(state.price) == pytest.approx((3 * T + 100) / (T + 10) - 2)


@pytest.mark.parametrize(
    ("target", "gain", "message"),
    [(0, 0.1, "target=0.0"), (math.nan, 0.1, "target=nan"), (2, -1, "gain=-1.0"), (2, INF, "gain=inf")],
)
def test_controllers_refuse_nonsense(target: float, gain: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: must be positive and finite"):
        cr.CountController(target, gain)
