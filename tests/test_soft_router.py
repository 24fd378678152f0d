"""SoftMoE's router: soft weights, what is executed of them, calibration, and the layers and losses around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute import losses, metrics
from circuitroute.layers.allocation import LayerAllocation
from circuitroute.layers.soft_router import SoftTopKRouter
from circuitroute.routing.decision import SoftRouting
from circuitroute.routing.soft_topk import soft_topk
from circuitroute.routing.weights import Combine

H, E, T, K = 5, 8, 40, 2.5

COMBINE = get_args(Combine)
every_combine = pytest.mark.parametrize("combine", COMBINE)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _router(k: float = K, alpha: Any = 0.5, **options: Any) -> SoftTopKRouter:
    torch.manual_seed(0)
    return SoftTopKRouter(H, E, k, alpha, **options)


def _fixed(*rows: list[float], **options: Any) -> tuple[SoftTopKRouter, Tensor]:
    """A router whose logits are the hidden states."""
    router = SoftTopKRouter(E, E, options.pop("k", 2.0), options.pop("alpha", 1.0), **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    return router, torch.tensor(rows)


# ---------------------------------------------------------------------------------------------- decisions


def test_weights_are_the_soft_top_k_of_the_linear_map() -> None:
    router, hidden = _router(bias=True), _randn(T, H)
    with torch.no_grad():
        router.bias.copy_(_randn(E, seed=1))
    routing = router(hidden)
    logits = nn.functional.linear(hidden, router.weight, router.bias)
    assert isinstance(routing, SoftRouting)
    assert isinstance(routing, cr.Routing)
    assert torch.equal(routing.logits, logits)
    assert torch.equal(routing.marginals, soft_topk(logits, K, 0.5))
    torch.testing.assert_close(routing.marginals.sum(-1), torch.full((T,), K))
    assert torch.equal(routing.mask, routing.marginals > 0.1)
    assert torch.equal(routing.counts, routing.mask.sum(-1))
    assert 1 < metrics.active_experts(routing) < E


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("max_experts", [None, 1, 3, E])
def test_executed_are_those_above_the_threshold_within_the_cap_and_one_at_least(
    threshold: float, max_experts: int | None
) -> None:
    routing = _router(threshold=threshold, max_experts=max_experts)(_randn(T, H))
    above = (routing.marginals > torch.tensor(threshold)).sum(-1)
    assert torch.equal(routing.counts, above.clamp(min=1, max=max_experts or E))
    for logits, mask, count in zip(routing.logits, routing.mask, routing.counts, strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(logits.topk(int(count)).indices.tolist())
    if threshold > 0:
        assert bool((routing.counts <= max(1.0, K / threshold)).all())


def _published(logits: Tensor, weights: Tensor, k: list[float], cap: float | None, c: float = 1.8) -> list[set[int]]:
    """SoftMoE's truncation, token by token: the weights of at least c k / E among the ceil(k cap) largest."""
    found = []
    for row, p, mass in zip(logits.tolist(), weights.double().tolist(), k, strict=True):
        order = sorted(range(E), key=lambda e: (-row[e], e))
        most = E if cap is None else min(E, math.ceil(mass * cap))
        kept = {e for e in order[:most] if p[e] >= c * mass / E}
        found.append((kept or {order[0]}) if mass > 0 else set())
    return found


def _sets(mask: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 4.0, 100.0])
@pytest.mark.parametrize("k", [0.0, 0.8, 1.5, 2.0, 3.7, 8.0])
def test_softmoe_truncates_as_published(k: float, cap: float) -> None:
    torch.manual_seed(0)
    router = SoftTopKRouter.softmoe(H, E, k, cap)
    routing = router(3 * _randn(T, H))
    assert _sets(routing.mask) == _published(routing.logits, routing.marginals, [k] * T, cap)
    assert torch.equal(routing.gates, torch.where(routing.mask, routing.marginals, 0.0))
    width = min(E, max(1, math.ceil(k * cap)))
    assert routing.max_count == width
    assert routing.padded()[0].shape == (T, width)
    assert repr(router).endswith(
        f"alpha=1.0, max_experts=None, cap_factor={cap}, relative_threshold=True, combine='marginal')"
    )


def test_both_halves_of_the_truncation_decide() -> None:
    """Otherwise the comparison above would hold without them."""
    hidden = _randn(T, H)
    router = {cap: _router(2.0, 1.0, threshold=1.2, relative_threshold=True, cap_factor=cap) for cap in (1.0, 1.5, 4.0)}
    counts = {cap: each(hidden).counts for cap, each in router.items()}
    assert counts[1.0].max() == 2
    assert counts[1.0].min() == 1  # fewer than the cap allows: the threshold
    assert counts[1.5].max() == 3
    assert counts[4.0].max() < 8  # no more than E / 1.2 can reach it
    assert counts[4.0].double().mean() > counts[1.5].double().mean() > counts[1.0].double().mean()


@pytest.mark.parametrize("cap", [None, 1.0, 2.0])
def test_threshold_and_cap_follow_the_mass_of_the_token_and_of_the_layer(cap: float | None) -> None:
    router = _router(alpha=1.0, threshold=1.8, relative_threshold=True, cap_factor=cap)
    hidden, k = 3 * _randn(T, H), torch.linspace(0, 5, T, requires_grad=True)
    routing = router(hidden, k=k)
    assert _sets(routing.mask) == _published(routing.logits, routing.marginals, k.tolist(), cap)
    routing.gates.sum().backward()
    assert k.grad is not None
    assert bool(k.grad.isfinite().all())
    share = LayerAllocation(2, 5.0)()[1]  # a tensor without dimensions
    routing = router(hidden, k=share)
    assert _sets(routing.mask) == _published(routing.logits, routing.marginals, [2.5] * T, cap)
    assert torch.equal(routing.mask, router(hidden, k=2.5).mask)
    # A width that followed a tensor would have to wait for its value.
    assert routing.max_count == E
    assert router(hidden, k=2.5).max_count == (E if cap is None else math.ceil(2.5 * cap))


def test_the_smaller_of_two_caps_holds() -> None:
    hidden, k = 3 * _randn(T, H), torch.linspace(1, 5, T)
    counts = {}
    for name, options in (("both", {"max_experts": 3}), ("factor", {})):
        routing = _router(threshold=0.0, cap_factor=1.0, **options)(hidden, k=k)
        assert routing.max_count == options.get("max_experts", E)
        counts[name] = routing.counts
    assert torch.equal(counts["factor"], k.ceil().long())
    assert torch.equal(counts["both"], k.ceil().long().clamp(max=3))
    assert _router(threshold=0.0, cap_factor=1.0, max_experts=3)(hidden, k=2).max_count == 2


@pytest.mark.parametrize(("k", "cap", "most"), [(5.0, 1.4, 7), (4.0, 1.1, 5), (2.0000002, 1.5, 3), (2.001, 1.5, 4)])
def test_rounding_does_not_add_an_expert_to_the_cap(k: float, cap: float, most: int) -> None:
    router = _router(threshold=0.0, cap_factor=cap)
    for mass in (k, torch.tensor(k), torch.full((T,), k)):
        assert router(_randn(T, H), k=mass).counts.tolist() == [most] * T


def test_what_just_reaches_a_relative_threshold_is_executed_and_without_weight_nothing_is() -> None:
    """Two weights of exactly 1 at k = 2, of 8 experts: 4 times the mean. An absolute threshold has to be exceeded."""
    cold = {"k": 2.0, "alpha": 0.01}
    router, hidden = _fixed([0.0, 9.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0], threshold=4.0, relative_threshold=True, **cold)
    assert _sets(router(hidden).mask) == [{1, 3}]
    router.threshold.fill_(0.0)
    assert _sets(router(hidden).mask) == [{1, 3}]
    router, _ = _fixed(hidden.tolist()[0], threshold=1.0, **cold)
    assert _sets(router(hidden).mask) == [{1}]


def test_a_checkpoint_of_a_plain_router_loads_into_a_capped_one() -> None:
    plain, capped = _router(threshold=0.3), _router(threshold=0.1, cap_factor=1.0)
    capped.load_state_dict(plain.state_dict())
    counts = plain(_randn(T, H)).counts
    assert int(counts.max()) > 3
    assert torch.equal(capped(_randn(T, H)).counts, counts.clamp(max=3))
    assert list(SoftTopKRouter.softmoe(H, E, 2.0, 2.0).state_dict()) == ["weight", "threshold"]


def test_equal_logits_are_executed_in_the_order_of_their_indices() -> None:
    router, hidden = _fixed([1.0, 3.0, 0.0, 3.0, 3.0, 3.0, 0.0, 0.0], threshold=0.0, max_experts=2)
    assert router(hidden).mask.nonzero()[:, 1].tolist() == [1, 3]
    router.threshold.fill_(1.0)
    assert router(hidden).mask.nonzero()[:, 1].tolist() == [1]


def test_without_mass_nothing_is_executed() -> None:
    router, hidden = _router(threshold=0.0), _randn(3, H).requires_grad_()
    k = torch.tensor([0.0, 1e-3, 2.0], requires_grad=True)
    routing = router(hidden, k=k)
    assert bool((routing.mask.any(-1) == torch.tensor([False, True, True])).all())
    assert bool((routing.gates[0] == 0).all())
    assert router(hidden, k=0).counts.tolist() == [0, 0, 0]
    routing.gates.sum().backward()
    assert k.grad is not None
    assert bool(k.grad.isfinite().all())


def test_cold_it_is_top_k() -> None:
    hidden = _randn(T, H)
    top, soft = cr.TopKRouter(H, E, 3), _router(3, alpha=1e-4)
    soft.load_state_dict({**top.state_dict(), "threshold": soft.threshold})
    assert torch.equal(soft(hidden).mask, top(hidden).mask)
    for combine in ("softmax", "normalized", "sigmoid"):
        top.combine = soft.combine = combine
        torch.testing.assert_close(soft(hidden).gates, top(hidden).gates)


def test_decisions_are_deterministic_and_keep_no_state() -> None:
    router, hidden, before = _router(), _randn(T, H), torch.get_rng_state()
    state = copy.deepcopy(router.state_dict())
    first = router(hidden, key=1)
    router(_randn(4, H, seed=3))
    for again in (router(hidden, key=2), router.eval()(hidden), copy.deepcopy(router)(hidden)):
        assert torch.equal(again.gates, first.gates)
    assert torch.equal(before, torch.get_rng_state())
    assert state.keys() == router.state_dict().keys()
    assert all(torch.equal(value, router.state_dict()[name]) for name, value in state.items())


def test_a_recorded_mask_is_executed_again() -> None:
    router, hidden = _router(max_experts=3), _randn(2, 3, H)
    mask = torch.zeros(6, E, dtype=torch.bool)
    mask[torch.arange(6), torch.arange(6)] = True
    for recorded in (mask, mask.float().reshape(2, 3, E)):
        routing = router(hidden, replay=recorded)
        assert torch.equal(routing.mask, mask)
        assert torch.equal(routing.gates, torch.where(mask, routing.marginals, 0.0))
    own = router(hidden)
    assert torch.equal(router(hidden, replay=own.mask).gates, own.gates)


def test_a_replay_keeps_within_the_cap_of_its_k() -> None:
    router, hidden = _router(threshold=0.0, cap_factor=1.0), _randn(3, H)
    k = torch.tensor([1.0, 2.0, 3.0])
    recorded = router(hidden, k=k).mask
    assert recorded.sum(-1).tolist() == [1, 2, 3]
    assert torch.equal(router(hidden, k=k, replay=recorded).mask, recorded)
    with pytest.raises(
        ValueError, match=r"replay executes more than cap_factor=1.0 allows for this k .* in rows 1, 2$"
    ):
        router(hidden, k=torch.ones(()), replay=recorded)
    with pytest.raises(ValueError, match=r"in row 2$"):
        router(hidden, k=2.0, replay=recorded)


@pytest.mark.parametrize("lead", [(), (6,), (2, 1, 3), (2, 0)], ids=str)
def test_leading_dimensions_become_tokens(lead: tuple[int, ...]) -> None:
    router, hidden = _router(), _randn(*lead, H)
    tokens = hidden.numel() // H
    k = torch.linspace(1, 3, max(tokens, 1))[:tokens]
    flat = router(hidden.reshape(tokens, H), k=k)
    assert flat.gates.shape == (tokens, E)
    torch.testing.assert_close(flat.marginals.sum(-1), k)
    for shaped in (k, k.reshape(lead)):
        assert torch.equal(router(hidden, k=shaped).gates, flat.gates)


def test_a_mass_per_position_is_shared_by_the_sequences_of_a_batch() -> None:
    router, k = _router(), torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(router(_randn(2, 3, H), k=k).marginals.sum(-1), k.repeat(2))
    torch.testing.assert_close(router(_randn(2, 3, H), k=3.5).marginals.sum(-1), torch.full((6,), 3.5))


# ---------------------------------------------------------------------------------------------- gates


@every_combine
def test_gates_weigh_the_executed_weights(combine: Any) -> None:
    routing = _router(combine=combine)(_randn(T, H))
    kept = torch.where(routing.mask, routing.marginals, 0.0)
    by_logit = kept * torch.where(routing.mask, routing.logits.exp(), 0.0)
    expected = {
        "marginal": kept,
        "softmax": kept * routing.logits.softmax(-1),
        "sigmoid": kept * routing.logits.sigmoid(),
        "normalized": by_logit / by_logit.sum(-1, keepdim=True),
    }[combine]
    torch.testing.assert_close(routing.gates, expected)
    assert bool((routing.gates[~routing.mask] == 0).all())


@every_combine
def test_recorded_experts_without_any_weight_have_gates_of_zero(combine: Any) -> None:
    router, hidden = _fixed([0.0, 0.0, 900.0, 900.0, 0.0, 0.0, 0.0, 0.0], combine=combine)
    recorded = torch.zeros(1, E)
    recorded[0, 0] = 1
    routing = router(hidden, replay=recorded)
    assert routing.marginals[0, 0].item() == 0
    assert bool((routing.gates == 0).all())
    routing.gates.sum().backward()
    assert router.weight.grad is not None
    assert bool(router.weight.grad.isfinite().all())


@every_combine
def test_gates_have_the_gradient_of_the_truncated_weights(combine: Any) -> None:
    """In hidden states, weight, soft mass and temperature, with what is executed taken as given."""
    router = _router(alpha=nn.Parameter(torch.tensor(0.5)), combine=combine).double()
    hidden = _randn(6, H).double().requires_grad_()
    k = torch.linspace(1, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = router(hidden, k=k).mask
    assert 0 < int(mask.sum()) < mask.numel()

    def gates(hidden: Tensor, k: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        parameters = {"weight": weight, "alpha": alpha}
        return torch.func.functional_call(router, parameters, (hidden,), {"k": k, "replay": mask}).gates

    assert torch.autograd.gradcheck(gates, (hidden, k, router.weight, router.alpha))


def test_experts_that_are_not_executed_get_gradients_as_competitors_only() -> None:
    router, hidden = _router(), _randn(T, H)
    routing = router(hidden)
    logits = routing.logits.detach().requires_grad_()
    upstream = _randn(T, E, seed=1)
    for left_out in (0.0, 1e3):
        ignored = torch.where(routing.mask, upstream, left_out)  # what arrives at them does not matter
        gradients = torch.autograd.grad((routing.gates * ignored).sum(), router.weight, retain_graph=True)[0]
        weights = soft_topk(logits, K, 0.5)
        (to_logits,) = torch.autograd.grad(weights, logits, torch.where(routing.mask, upstream, 0.0))
        torch.testing.assert_close(gradients, to_logits.t() @ hidden)
        assert bool((to_logits[~routing.mask] != 0).any())


def test_all_layers_of_an_allocation_learn() -> None:
    routers = nn.ModuleList(_router() for _ in range(3))
    allocation, hidden = LayerAllocation(3, 7.5, maximum=E), _randn(T, H)
    costs = torch.tensor([1.0, 0.0, -1.0])
    mass = torch.stack([router(hidden, k=k).gates.sum() for router, k in zip(routers, allocation(), strict=True)])
    (mass * costs).sum().backward()
    gradient = allocation.eta.grad
    assert gradient is not None
    assert gradient[0] > 0 > gradient[2]  # descending takes from the dear layer and gives to the one that pays


# ---------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("executed", [1.0, 1.5, 2.5, 4.0, 7.9, 8.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_calibration_reaches_a_mean_number_of_executed_experts(executed: float, dtype: torch.dtype) -> None:
    router, hidden = _router().to(dtype), _randn(4, 100, H).to(dtype)
    threshold = router.calibrate(hidden, executed=torch.tensor(executed, requires_grad=True))
    assert threshold == router.calibrate(hidden, executed=executed)
    assert threshold == float(router.threshold)
    assert metrics.active_experts(router(hidden)) == pytest.approx(executed, abs=0.05 if dtype == torch.bfloat16 else 0)
    loaded = _router().to(dtype)
    loaded.load_state_dict(router.state_dict())
    assert torch.equal(loaded(hidden).mask, router(hidden).mask)


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_calibration_keeps_a_share_of_the_mass_and_no_more_than_it_needs(mass: float) -> None:
    router, hidden = _router(), _randn(200, H)
    router.calibrate(hidden, mass=mass)
    routing = router(hidden)
    total = K * 200
    assert float(routing.gates.detach().sum()) >= mass * total * (1 - 1e-5)
    smallest = routing.gates[routing.mask & (routing.marginals < routing.marginals.amax(-1, keepdim=True))]
    if len(smallest):  # without the smallest that is kept, it is less
        assert float((routing.gates.sum() - smallest.min()).detach()) < mass * total * (1 + 1e-5)


def test_all_of_the_mass_can_be_kept_in_spite_of_rounding() -> None:
    router = _router(alpha=0.01)  # so cold that sums of the weights are not exact
    for seed in range(20):
        hidden = _randn(31, H, seed=seed)
        router.calibrate(hidden, mass=1.0)
        routing = router(hidden)
        torch.testing.assert_close(routing.gates.sum(), routing.marginals.sum())


def test_calibration_minds_the_cap_the_mass_and_the_tokens_without_any() -> None:
    router, hidden = _router(max_experts=3), _randn(100, H)
    k = torch.cat([torch.zeros(50), torch.full((50,), 4.0)])
    for executed in (0.5, 1.0, 1.5):
        router.calibrate(hidden, executed=executed, k=k)
        routing = router(hidden, k=k)
        assert metrics.active_experts(routing) == executed
        assert routing.counts[:50].tolist() == [0] * 50
        assert int(routing.counts.max()) <= 3
    router.calibrate(hidden, mass=0.5, k=k)
    assert float(router(hidden, k=k).gates.detach().sum()) >= 100
    with pytest.raises(ValueError, match=r"mass=0.99: max_experts and cap_factor keep 0\.\d+ of the soft mass at most"):
        router.calibrate(hidden, mass=0.99, k=k)
    assert router.calibrate(hidden, mass=0.99, k=torch.zeros(())) <= 1  # of nothing, everything is kept


@pytest.mark.parametrize("executed", [1.0, 1.3, 1.8, 2.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_calibration_of_a_relative_threshold_minds_a_cap_that_follows_the_mass(
    executed: float, dtype: torch.dtype
) -> None:
    router = _router(relative_threshold=True, cap_factor=1.0).to(dtype)
    hidden, k = _randn(100, H).to(dtype), torch.linspace(1, 4, 100, dtype=dtype)
    threshold = router.calibrate(hidden, executed=executed, k=k)
    routing = router(hidden, k=k)
    assert metrics.active_experts(routing) == executed
    assert bool((routing.counts <= k.ceil()).all())
    kept = _published(routing.logits, routing.marginals, k.tolist(), 1.0, threshold)
    assert _sets(routing.mask) == kept
    most = int(k.ceil().sum()) / 100
    with pytest.raises(ValueError, match=rf"executed={most + 0.01}: .* from 1 .* to {most} experts per token"):
        router.calibrate(hidden, executed=most + 0.01, k=k)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6])
def test_calibration_of_a_relative_threshold_keeps_a_share_of_the_mass(share: float) -> None:
    """Shares are of weights, though experts are ordered by their weight over the mean: by trying all thresholds."""
    router, hidden = _router(relative_threshold=True, cap_factor=2.0), _randn(60, H)
    k = torch.linspace(0.5, 6, 60)
    router.calibrate(hidden, mass=share, k=k)
    found, kept = float(router.threshold), float(router(hidden, k=k).gates.detach().sum())
    assert kept >= share * float(k.sum())
    scores = (router(hidden, k=k).marginals.detach() * E / k[:, None]).flatten()
    for threshold in scores[scores > found].sort().values[:3].tolist():  # the next ones up, and all beyond, keep less
        router.threshold.fill_(threshold + 1e-4)
        if not torch.equal(router(hidden, k=k).gates.sum(), torch.tensor(kept)):
            assert float(router(hidden, k=k).gates.detach().sum()) < share * float(k.sum()) < kept
            return
    pytest.fail("no threshold above changed anything")


def test_calibration_tells_neighbours_apart() -> None:
    """Two scores that are adjacent numbers: the threshold is the larger one, which alone reaches it."""
    router, _ = _fixed([0.0] * E, relative_threshold=True)
    below = torch.tensor(1.5)  # to which the number in the middle is rounded
    above = torch.nextafter(below, torch.tensor(2.0))
    router._put_between(torch.stack([above, below]).double(), 1)
    assert router._reaching(torch.stack([above, below])).tolist() == [True, False]
    router._put_between(torch.stack([above, above]).double(), 1)
    assert router._reaching(torch.stack([above, above])).tolist() == [True, True]
    router._put_between(torch.stack([above, below]).double(), 0)
    assert router._reaching(torch.stack([above, below])).tolist() == [False, False]


def test_calibration_executes_equal_weights_together() -> None:
    router, hidden = _fixed([3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    router.calibrate(hidden, executed=2)
    assert router(hidden).counts.tolist() == [4]
    router.calibrate(hidden, mass=0.5)
    assert router(hidden).counts.tolist() == [4]


def test_calibration_is_the_only_thing_it_changes() -> None:
    router = _router(alpha=nn.Parameter(torch.tensor(0.5)))
    before = {name: value.clone() for name, value in router.state_dict().items()}
    hidden = _randn(30, H).requires_grad_()
    router.calibrate(hidden, executed=2.0)
    changed = {name for name, value in router.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"threshold"}
    assert hidden.grad is None
    router.reset_parameters()
    assert float(router.threshold) == pytest.approx(0.1)


# ---------------------------------------------------------------------------------------------- around it


def test_there_is_no_distribution_and_no_log_probability() -> None:
    routing = _router()(_randn(T, H))
    with pytest.raises(AttributeError, match=r"no distribution: nothing was drawn.*\.marginals.*ExactKRouter"):
        _ = routing.distribution
    with pytest.raises(AttributeError, match=r"no log_prob.*Replay its \.mask instead.*ExactKRouter"):
        _ = routing.log_prob
    assert repr(routing) == f"SoftRouting({T} tokens, {E} experts, at most {E} of them executed)"


@pytest.mark.parametrize("max_experts", [None, 3])
def test_projections_describe_one_decision(max_experts: int | None) -> None:
    router, hidden = _router(max_experts=max_experts, threshold=0.2), _randn(T, H)
    routing = router(hidden)
    weights, indices = routing.padded()
    assert weights.shape == indices.shape == (T, max_experts or E)
    assert torch.equal(torch.zeros(T, E).scatter_add(-1, indices, weights), routing.gates)
    largest = int(routing.counts.max())
    narrow, _ = routing.padded(largest, pad="sentinel")
    assert torch.equal(narrow, weights[:, :largest])
    with pytest.raises(ValueError, match=f"width={largest - 1}: a token has {largest} experts"):
        routing.padded(largest - 1)
    for by in ("token", "expert"):
        token, expert, weight = routing.ragged(by=by)
        assert torch.equal(torch.zeros(T, E).index_put((token, expert), weight), routing.gates)


def test_losses_and_metrics_take_it() -> None:
    routing = _router()(_randn(T, H))
    share = routing.mask.float().mean(0) / routing.mask.float().mean(0).sum()
    expected = E * (share * routing.marginals.mean(0) / K).sum()
    torch.testing.assert_close(losses.load_balance(routing), expected)
    torch.testing.assert_close(losses.expected_count(routing), torch.tensor(K))
    torch.testing.assert_close(losses.z_loss(routing), routing.logits.logsumexp(-1).square().mean())
    assert losses.load_balance(routing, "softmax").requires_grad
    assert metrics.soft_mass(routing) == pytest.approx(K)
    assert metrics.active_experts(routing) == float(routing.counts.double().mean())
    assert metrics.active_experts(routing) > K
    assert 0 < metrics.load_entropy(routing) <= 1


def test_the_soft_mass_of_a_drawn_routing_is_its_expected_count() -> None:
    routing = cr.DynamicKRouter(H, E, 1, 4)(_randn(T, H))
    assert metrics.soft_mass(routing) == pytest.approx(float(losses.expected_count(routing).detach()))
    assert metrics.soft_mass(cr.ExactKRouter(H, E, 3)(_randn(T, H))) == pytest.approx(3)
    assert metrics.soft_mass(_router()(_randn(0, H))) == 0


def _layer(**options: Any) -> cr.MoE:
    router = _router(alpha=nn.Parameter(torch.tensor(0.5)), threshold=0.3, **options)
    return cr.MoE(router, [nn.Sequential(nn.Linear(H, 3), nn.Tanh(), nn.Linear(3, H)) for _ in range(E)])


def _backward(layer: cr.MoE, hidden: Tensor, output: Tensor, *more: Tensor) -> list[Tensor]:
    layer.zero_grad(set_to_none=True)
    output.square().sum().backward()
    found = [x.grad for x in (hidden, *layer.parameters(), *more)]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


@every_combine
def test_the_sparse_layer_is_the_dense_one(combine: Any) -> None:
    layer = _layer(combine=combine).double()
    hidden = _randn(2, 20, H).double().requires_grad_()
    output, routing = layer(hidden)
    found = _backward(layer, hidden, output)
    hidden.grad = None
    routing = layer.router(hidden)
    outputs = torch.stack([expert(hidden.reshape(-1, H)) for expert in layer.experts], 1)
    dense = torch.einsum("te,teh->th", routing.gates, outputs).reshape(hidden.shape)
    torch.testing.assert_close(output, dense)
    for gradient, expected in zip(found, _backward(layer, hidden, dense), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_identical_gradients(use_reentrant: bool) -> None:
    layer, allocation = _layer(max_experts=3), LayerAllocation(2, 5.0, maximum=E)

    def run(hidden: Tensor, k: Tensor) -> Tensor:
        output, _ = layer(hidden, routing=layer.router(hidden, k=k))
        return output

    results = []
    for call in (run, lambda *x: checkpoint(run, *x, use_reentrant=use_reentrant, preserve_rng_state=False)):
        hidden = _randn(T, H).requires_grad_()
        allocation.zero_grad(set_to_none=True)
        results.append(_backward(layer, hidden, call(hidden, allocation()[1]), allocation.eta))
    assert len(results[0]) > 10
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_modules_of_any_dtype_route_in_float32_or_wider(dtype: torch.dtype) -> None:
    layer, hidden = _layer().to(dtype), _randn(T, H).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    output, routing = layer(hidden)
    assert output.dtype == dtype
    assert routing.logits.dtype == routing.marginals.dtype == routing.gates.dtype == wide
    torch.testing.assert_close(routing.marginals.sum(-1), torch.full((T,), K, dtype=wide))
    assert all(g.dtype == dtype and bool(g.isfinite().all()) for g in _backward(layer, hidden, output))


@every_combine
def test_autocast_does_not_touch_the_router(combine: Any) -> None:
    router, hidden = _router(combine=combine), _randn(T, H)
    expected = router(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(hidden)
        router.calibrate(hidden, executed=2.0)
    assert torch.equal(routing.gates, expected.gates)


@pytest.mark.parametrize("published", [False, True])
def test_a_traced_router_decides_alike(published: bool) -> None:
    hidden, options = _randn(T, H), {"cap_factor": 1.0, "relative_threshold": True} if published else {"max_experts": 3}
    router = _router(alpha=nn.Parameter(torch.tensor(0.5)), **options)

    def gates(hidden: Tensor, k: Tensor) -> Tensor:
        routing: cr.Routing = router(hidden, k=k)
        return routing.gates

    results = []
    for run in (gates, torch.compile(gates, fullgraph=True, backend="aot_eager")):
        k = torch.full((T,), K, requires_grad=True)
        found = run(hidden, k)
        results.append([found, *torch.autograd.grad(found.square().sum(), (k, *router.parameters()))])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


def test_parameters_and_buffers() -> None:
    assert list(_router().state_dict()) == ["weight", "threshold"]
    learned = _router(alpha=nn.Parameter(torch.tensor([0.5])), bias=True)
    assert {name for name, _ in learned.named_parameters()} == {"weight", "bias", "alpha"}
    kept = _router(alpha=torch.tensor(0.25))
    assert dict(kept.named_buffers()).keys() == {"threshold", "alpha"}
    assert not kept.alpha.requires_grad
    assert torch.equal(kept(_randn(T, H)).gates, _router(alpha=0.25)(_randn(T, H)).gates)
    meta = _router(device="meta", dtype=torch.bfloat16)
    assert {(x.device.type, x.dtype) for x in (*meta.parameters(), *meta.buffers())} == {("meta", torch.bfloat16)}
    made = meta.to_empty(device="cpu")
    made.reset_parameters()
    assert float(made.threshold) == pytest.approx(0.1, abs=1e-3)
    shown = "hidden_size=5, num_experts=8, k=2.5, alpha=0.5, max_experts=None, combine='marginal'"
    assert repr(_router()) == f"SoftTopKRouter({shown})"
    assert "alpha=learned" in repr(learned)


# ---------------------------------------------------------------------------------------------- refusals

MANY = torch.ones(3, E)
MADE: Callable[..., Any] = _router


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: SoftTopKRouter(0, E, 2), ValueError, "hidden_size=0: must be at least 1"),
        (lambda: MADE("two"), TypeError, "k='two': expected a number, got str"),
        (lambda: MADE(-1), ValueError, r"k=-1.0: must lie in 0..8"),
        (lambda: MADE(E + 0.1), ValueError, r"k=8.1: must lie in 0..8"),
        (lambda: MADE(alpha=0), ValueError, "alpha=0.0: the temperature must be positive and finite"),
        (lambda: MADE(alpha="hot"), TypeError, "alpha='hot': expected a number"),
        (lambda: MADE(alpha=torch.ones(2)), ValueError, r"alpha has shape \(2,\): expected one temperature"),
        (lambda: MADE(threshold=1.5), ValueError, r"threshold=1.5: must lie in 0..1"),
        (lambda: MADE(max_experts=0), ValueError, "max_experts=0: must be at least 1"),
        (lambda: MADE(max_experts=9), ValueError, "max_experts=9: there are only num_experts=8"),
        (lambda: MADE(cap_factor=0), ValueError, "cap_factor=0.0: must be positive and finite"),
        (lambda: MADE(cap_factor=float("inf")), ValueError, "cap_factor=inf: must be positive and finite"),
        (lambda: MADE(cap_factor="two"), TypeError, "cap_factor='two': expected a number, got str"),
        (lambda: MADE(threshold=-1, relative_threshold=True), ValueError, r"threshold=-1.0: must lie in 0..inf"),
        (lambda: SoftTopKRouter.softmoe(H, E, 9, 2), ValueError, r"k=9.0: must lie in 0..8"),
        (lambda: SoftTopKRouter.softmoe(H, E, 2, 2, alpha=0), ValueError, "alpha=0.0: the temperature must be"),
        (lambda: MADE(combine="magic"), ValueError, "combine='magic'"),
        (lambda: MADE()(_randn(2, 4)), ValueError, r"hidden has shape \(2, 4\): the last dimension must be"),
        (lambda: MADE()(_randn(2, H), k=9), ValueError, "k=9.0 in rows 0, 1: k must lie between"),
        (lambda: MADE()(_randn(2, H), k=torch.tensor([1.0, -1.0])), ValueError, "k=-1.0 in row 1"),
        (lambda: MADE()(_randn(2, H), k=torch.ones(3)), ValueError, r"k has shape \(3,\): it must broadcast to \(2,\)"),
        (lambda: MADE()(_randn(2, H) * float("nan")), ValueError, "logits hold NaN in rows 0, 1"),
        (lambda: MADE(alpha=torch.tensor(-1.0))(_randn(2, H)), ValueError, "alpha=-1.0 in rows 0, 1"),
        (lambda: MADE()(_randn(2, H), replay=MANY), ValueError, r"replay has shape \(3, 8\): it must be that of the"),
        (lambda: MADE()(_randn(3, H), replay=MANY[:, 1:]), ValueError, r"replay has shape \(3, 7\)"),
        (lambda: MADE()(_randn(3, H), replay=MANY * 2), ValueError, "replay holds 2.0: every value must be 0 or 1"),
        (lambda: MADE()(_randn(3, H), replay=[1]), TypeError, r"replay=\[1\]: expected a tensor, got list"),
        (lambda: MADE(max_experts=7)(_randn(3, H), replay=MANY), ValueError, "more than max_experts=7 in rows 0, 1, 2"),
        (lambda: MADE().calibrate(_randn(9, H)), ValueError, "executed=None, mass=None: give exactly one"),
        (
            lambda: MADE().calibrate(_randn(9, H), executed=2, mass=0.5),
            ValueError,
            "executed=2, mass=0.5: give exactly",
        ),
        (lambda: MADE().calibrate(_randn(0, H), executed=2), ValueError, r"hidden has shape \(0, 5\): there are no"),
        (lambda: MADE().calibrate(_randn(9, H), executed="all"), TypeError, "executed='all': expected a number"),
        (lambda: MADE().calibrate(_randn(9, H), executed=0.5), ValueError, "executed=0.5: .* gives from 1 .* to 8 exp"),
        (lambda: MADE().calibrate(_randn(9, H), executed=8.1), ValueError, "executed=8.1: .* to 8 experts per token"),
        (
            lambda: MADE(2, 1e-6).calibrate(_randn(9, H), executed=3),
            ValueError,
            "executed=3.0: .* from 1 .* to 2 experts",
        ),
        (lambda: MADE().calibrate(_randn(9, H), executed=float("nan")), ValueError, "executed=nan"),
        (lambda: MADE().calibrate(_randn(9, H), mass=0), ValueError, "mass=0.0: must be a share of the soft mass"),
        (lambda: MADE().calibrate(_randn(9, H), mass=1.1), ValueError, "mass=1.1: must be a share"),
        (lambda: MADE().calibrate(_randn(9, H), executed=torch.ones(2)), TypeError, "expected a number, got Tensor"),
        (lambda: MADE().calibrate(_randn(9, H), mass=True), TypeError, "mass=True: expected a number, got a bool"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
