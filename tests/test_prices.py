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
    routing = cr.route(logits_of(), compiled(cr.Between(1, 4)), decide="mode", price=-20.0)
    state = controller.update(controller.init(), routing)
    assert float(state.price) == 1.0  # four experts each
    nothing = cr.route(logits_of(0), compiled(cr.Between(1, 4)))
    assert torch.equal(controller.update(state, nothing).price, state.price)
    assert eval(repr(controller), {"CountController": cr.CountController}).gain == 0.5
    several = controller.update(controller.init(), [routing, nothing, routing])
    assert torch.equal(several.price, state.price)


def test_processes_agree_on_the_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of experts and of tokens are added up, not means: processes may have different numbers of tokens."""
    elsewhere = torch.tensor([100.0, 10.0]).double()  # experts, tokens of another process

    def all_reduce(values: Any, op: Any = None, group: Any = None) -> None:
        if op is None:
            values.add_(elsewhere)
        else:  # the range of prices that can matter there
            values.copy_(values.maximum(torch.tensor([50.0, 50.0]).to(values)))

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    controller = cr.CountController(2.0, gain=1.0)
    routing = cr.route(logits_of(), compiled(cr.Between(1, 4)), decide="mode", price=-20.0)
    group: Any = "a process group"
    state = controller.update(controller.init(), routing, group)
    assert float(state.price) == pytest.approx((4 * T + 100) / (T + 10) - 2)


@pytest.mark.parametrize("target", [0.9, 4.1, 100.0])
def test_targets_that_no_price_reaches(target: float) -> None:
    controller = cr.CountController(target)
    with pytest.raises(
        ValueError, match=r"no price gets there, since every subset that Between\(1, 4\) .* from 1 to 4"
    ):
        controller.update(controller.init(), cr.route(logits_of(), compiled(cr.Between(1, 4))))
    with pytest.raises(
        ValueError, match=rf"target={target}: .* every subset that Exactly\(3\) allows has exactly 3 exp"
    ):
        controller.update(controller.init(), cr.route(logits_of(), compiled(cr.Exactly(3))))


def test_the_ends_of_a_range_are_reached_by_modes() -> None:
    circuit = compiled(cr.Between(1, 4))
    for target, sign in ((1.0, 1), (4.0, -1)):
        controller, logits = cr.CountController(target, gain=0.5), logits_of()
        state = controller.init()
        for _ in range(400):
            state = controller.update(state, cr.route(logits, circuit, decide="mode", price=state.price))
        assert cr.metrics.active_experts(cr.route(logits, circuit, decide="mode", price=state.price)) == target
        assert sign * float(state.price) > 0


STATES: dict[str, tuple[Any, type[Exception], str]] = {
    "balance": (cr.balance.LossFree(E).init(), TypeError, "state is a BalanceState: expected the CountState that cr"),
    "dict": ({"price": torch.zeros(())}, TypeError, r"state is a dict: .*make one: CountState\(\*\*values\)"),
    "shape": (torch.zeros(E), ValueError, r"state.price has shape \(6,\): expected \(\); one price for all experts"),
    "nan": (torch.tensor(math.nan), ValueError, "state.price holds nan: a state must be finite"),
    "inf": (torch.tensor(-INF), ValueError, "state.price holds -inf"),
    "integer": (torch.tensor(2), TypeError, "state.price has dtype torch.int64: expected a floating-point"),
    "number": (2.0, TypeError, "state.price=2.0: expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_states_of_something_else_are_refused(name: str) -> None:
    given, error, message = STATES[name]
    controller = cr.CountController(2.0)
    state = given if name in ("balance", "dict") else controller.init()._replace(price=given)
    with pytest.raises(error, match=message):
        controller.update(state, cr.route(logits_of(), compiled(cr.Between(1, 4))))


@pytest.mark.parametrize("rule", [cr.Between(1, 4), cr.Cost([1, 2, 3, 1, 2, 3], at_most=6)], ids=str)
@pytest.mark.parametrize("forced", [INF, -INF])
def test_a_price_that_can_do_nothing_does_not_wind_up(rule: cr.Constraint, forced: float) -> None:
    """Evidence holds the counts where no price moves them, for a thousand steps; once it is gone, so is its effect."""
    circuit, controller = compiled(rule), cr.CountController(2.0, gain=1.0)
    logits, free = logits_of(), logits_of()
    logits[:, [0, 1, 3] if forced > 0 else [0, 1, 2, 3, 4]] = forced
    state = controller.init()
    for _ in range(300):
        state = controller.update(state, cr.route(logits, circuit, decide="mode", price=state.price))
    assert abs(float(state.price)) < 150
    where = float(state.price)
    assert where > 0 if forced > 0 else where < 0
    # From beyond the range a price only goes towards it, and never jumps.
    far = controller.init()._replace(price=torch.tensor(1e4 if forced > 0 else -1e4))
    assert torch.equal(
        controller.update(far, cr.route(logits, circuit, decide="mode", price=far.price)).price, far.price
    )
    back = controller.update(far, cr.route(free, circuit, decide="mode", price=far.price))
    assert 0 < abs(float(far.price - back.price)) <= 4


def test_a_price_of_all_evidence_stays() -> None:
    logits = torch.full((5, E), -INF)
    logits[:, :3] = INF
    controller, circuit = cr.CountController(2.0), compiled(cr.Between(1, 4))
    state = controller.init()
    assert torch.equal(controller.update(state, cr.route(logits, circuit, price=state.price)).price, state.price)


def test_a_budget_under_a_price_holds_its_mean() -> None:
    """The soft budget beside the hard one: the mean of a layer is held, and no token exceeds its total."""
    torch.manual_seed(0)
    router, controller = cr.BudgetRouter(4, E, 2, cr.Between(1, 4), cr.AtMost(6)), cr.CountController(1.5, gain=0.3)
    router.eval()
    hidden = torch.randn(200, 4)
    state = controller.init()
    for _ in range(150):
        budget, counts = router.begin(hidden), []
        for _ in range(2):
            routing, budget = router(hidden, budget, price=state.price)
            counts.append(routing)
        state = controller.update(state, counts)
    mean = sum(float(each.counts.double().mean()) for each in counts) / 2
    assert abs(mean - 1.5) < 0.1
    assert int(budget.spent.max()) <= 6


@pytest.mark.parametrize(
    ("target", "gain", "message"),
    [(0, 0.1, "target=0.0"), (math.nan, 0.1, "target=nan"), (2, -1, "gain=-1.0"), (2, INF, "gain=inf")],
)
def test_controllers_refuse_nonsense(target: float, gain: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: must be positive and finite"):
        cr.CountController(target, gain)


def test_a_narrow_price_becomes_a_wide_one() -> None:
    """A step of it would be rounded off in bfloat16."""
    controller, circuit = cr.CountController(2.0), compiled(cr.Between(1, 4))
    state = controller.init()._replace(price=torch.tensor(8.0, dtype=torch.bfloat16))
    routing = cr.route(logits_of(), circuit, decide="mode", price=state.price)
    after = controller.update(state, routing).price
    assert after.dtype == torch.float32
    assert 7.9 < float(after) < 8.0
