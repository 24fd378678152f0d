"""Router modules: parameters, modes, dtypes, and agreement with the plain functions they wrap."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitroute as cr
from circuitroute.routing.estimators import Simple

H, E = 5, 8

ROUTERS: dict[str, Callable[..., cr.Router]] = {
    "router": lambda **options: cr.Router(H, E, cr.CountIn({1, 3}), **options),
    "exact": lambda **options: cr.ExactKRouter(H, E, 3, **options),
    "dynamic": lambda **options: cr.DynamicKRouter(H, E, 1, 4, **options),
    "topk": lambda **options: cr.TopKRouter(H, E, 3, **options),
    "over": lambda **options: cr.Router(H, E, cr.Exactly(2).over([0, 3, 5, 6]), **options),
}
every_router = pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _made(make: Callable[..., cr.Router], **options: Any) -> cr.Router:
    torch.manual_seed(0)
    return make(**options)


@every_router
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_a_linear_layers(make: Callable[..., cr.Router], bias: bool) -> None:
    router = _made(make, bias=bias)
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    assert shapes == ({"weight": (E, H), "bias": (E,)} if bias else {"weight": (E, H)})
    assert [name for name, _ in router.named_parameters()] == list(shapes)
    assert list(router.buffers()) == []
    assert bool((router.weight != 0).any())
    assert float(router.weight.detach().abs().max()) <= H**-0.5  # as torch.nn.Linear draws it
    assert (router.bias is not None) == bias
    assert router.bias is None or bool((router.bias == 0).all())


@every_router
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_route_of_the_linear_map(make: Callable[..., cr.Router], bias: bool) -> None:
    router, hidden, key = _made(make, bias=bias), _randn(10, H), cr.random_key(1, torch.arange(10))
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    for training in (True, False):
        router.train(training)
        logits = torch.nn.functional.linear(hidden, router.weight, router.bias)
        routing = router(hidden, key=key)
        sampled = training and not isinstance(router, cr.TopKRouter)
        expected = cr.route(logits, router.circuit, estimator=router.estimator, training=sampled, key=key)
        assert torch.equal(routing.logits, logits)
        assert torch.equal(routing.mask, expected.mask)
        assert torch.equal(routing.gates, expected.gates)
        (got,) = torch.autograd.grad(routing.gates.square().sum(), router.weight)
        (wanted,) = torch.autograd.grad(expected.gates.square().sum(), router.weight)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@every_router
@pytest.mark.parametrize("lead", [(), (6,), (2, 1, 3), (2, 0)], ids=str)
def test_leading_dimensions_become_tokens(make: Callable[..., cr.Router], lead: tuple[int, ...]) -> None:
    router, hidden = _made(make), _randn(*lead, H)
    tokens = hidden.numel() // H
    key = cr.random_key(1, torch.arange(tokens))
    flat = router(hidden.reshape(tokens, H), key=key)
    assert flat.gates.shape == (tokens, E)
    # A key or a recorded mask comes with the leading dimensions of the hidden states, or flattened.
    for shaped in (key, key.reshape(lead)):
        assert torch.equal(router(hidden, key=shaped).gates, flat.gates)
    for recorded in (flat.mask, flat.mask.reshape(*lead, E)):
        assert torch.equal(router(hidden, replay=recorded).gates, flat.gates)


def test_a_key_per_position_is_shared_by_the_sequences_of_a_batch() -> None:
    router, hidden = _made(ROUTERS["exact"]), _randn(2, 3, H)
    per_position = cr.random_key(1, torch.arange(3))
    whole = cr.random_key(1, torch.arange(3).repeat(2))
    assert torch.equal(router(hidden, key=per_position).mask, router(hidden, key=whole).mask)
    with pytest.raises(ValueError, match=r"key has shape \(3, 2\): it must broadcast to \(2, 3\)"):
        router(hidden, key=torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("name", ["router", "exact", "dynamic", "over"])
def test_training_samples_and_evaluation_takes_the_mode(name: str) -> None:
    router, hidden = _made(ROUTERS[name]), _randn(200, H)
    torch.manual_seed(0)
    assert not torch.equal(router(hidden).mask, router(hidden).mask)
    router.eval()
    mode = router(hidden)
    assert torch.equal(mode.mask, router(hidden, key=cr.random_key(3, torch.arange(200))).mask)
    assert torch.equal(mode.mask, mode.distribution.mode == 1)


@every_router
def test_forward_keeps_no_state(make: Callable[..., cr.Router]) -> None:
    """Activation checkpointing runs it twice; nothing may differ, nor stay behind."""
    router, hidden, key = _made(make), _randn(9, H), cr.random_key(2, torch.arange(9))
    before = set(router.__dict__)
    first = router(hidden, key=key)
    router(_randn(4, H, seed=1))
    again = router(hidden, key=key)
    assert torch.equal(first.gates, again.gates)
    assert set(router.__dict__) == before


@every_router
def test_copies_decide_alike_and_share_nothing_but_the_circuit(make: Callable[..., cr.Router]) -> None:
    router, hidden, key = _made(make, bias=True), _randn(9, H), cr.random_key(2, torch.arange(9))
    expected = router(hidden, key=key)
    twin = copy.deepcopy(router)
    assert twin.circuit is router.circuit
    assert twin.weight is not router.weight
    loaded = pickle.loads(pickle.dumps(router))
    buffer = io.BytesIO()
    torch.save(router.state_dict(), buffer)
    buffer.seek(0)
    fresh = _made(make, bias=True)
    fresh.reset_parameters()
    fresh.load_state_dict(torch.load(buffer))
    for same in (twin, loaded, fresh):
        assert torch.equal(same(hidden, key=key).gates, expected.gates)
    with torch.no_grad():
        router.weight.zero_()
    assert torch.equal(twin(hidden, key=key).gates, expected.gates)


@every_router
def test_a_linear_layers_weights_load(make: Callable[..., cr.Router]) -> None:
    router, linear = _made(make, bias=True), torch.nn.Linear(H, E)
    router.load_state_dict(linear.state_dict())
    hidden = _randn(4, H)
    torch.testing.assert_close(router(hidden).logits, linear(hidden))


# ---------------------------------------------------------------------------------------------- dtypes


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_modules_of_any_dtype_route_in_float32_or_wider(make: Callable[..., cr.Router], dtype: torch.dtype) -> None:
    router, hidden = _made(make, bias=True).to(dtype), _randn(7, H).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    routing = router(hidden, key=5)
    assert routing.logits.dtype == routing.gates.dtype == wide
    torch.testing.assert_close(routing.logits, hidden.to(wide) @ router.weight.to(wide).t())
    routing.gates.square().sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.dtype == dtype
    assert bool(torch.isfinite(router.weight.grad).all())


@every_router
def test_autocast_does_not_touch_the_router(make: Callable[..., cr.Router]) -> None:
    router, hidden, key = _made(make), _randn(7, H), cr.random_key(0, torch.arange(7))
    expected = router(hidden, key=key)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(hidden, key=key)
        cast = router(hidden.bfloat16(), key=key)
    assert torch.equal(routing.gates, expected.gates)
    assert routing.logits.dtype == cast.logits.dtype == torch.float32


def test_device_and_dtype_of_the_parameters_can_be_given() -> None:
    router = cr.Router(H, E, cr.Exactly(2), bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in router.parameters()} == {("meta", torch.bfloat16)}


# ---------------------------------------------------------------------------------------------- the top-k baseline


@pytest.mark.parametrize("k", [1, 3, E])
@pytest.mark.parametrize("training", [True, False])
def test_top_k_is_torchs_topk_of_the_softmax(k: int, training: bool) -> None:
    torch.manual_seed(0)
    router, hidden = cr.TopKRouter(H, E, k).train(training), _randn(20, H)
    weights, indices = router(hidden, key=3).padded()
    expected = torch.topk(torch.softmax(hidden @ router.weight.t(), -1), k)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(weights, expected.values)
    upstream = _randn(20, k, seed=1)
    (got,) = torch.autograd.grad((weights * upstream).sum(), router.weight)
    (wanted,) = torch.autograd.grad((expected.values * upstream).sum(), router.weight)
    torch.testing.assert_close(got, wanted)


def test_normalized_top_k_is_the_softmax_of_the_top_logits() -> None:
    torch.manual_seed(0)
    router, hidden = cr.TopKRouter(H, E, 3, combine="normalized"), _randn(20, H)
    weights, _ = router(hidden).padded()
    expected = torch.topk(hidden @ router.weight.t(), 3).values.softmax(-1)
    torch.testing.assert_close(weights, expected)


def test_top_k_sends_no_gradient_to_experts_it_did_not_choose_beyond_the_softmax() -> None:
    """With weights that do not couple experts, the unchosen ones get none at all; the exact router gives them some."""
    hidden = _randn(1, H)
    for make, reaches in ((cr.TopKRouter, False), (cr.ExactKRouter, True)):
        torch.manual_seed(0)
        router = make(H, E, 3, combine="sigmoid")
        routing = router(hidden, key=0)
        (gradient,) = torch.autograd.grad((routing.gates * _randn(E, seed=2)).sum(), router.weight)
        assert bool((gradient[~routing.mask[0]] != 0).any()) == reaches


def test_top_k_draws_nothing() -> None:
    router, before = cr.TopKRouter(H, E, 3), torch.get_rng_state()
    router(_randn(4, H))
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_an_exact_k_router_ends_at_top_k_when_it_is_sure() -> None:
    torch.manual_seed(0)
    exact, top, hidden = cr.ExactKRouter(H, E, 3), cr.TopKRouter(H, E, 3), _randn(30, H)
    top.load_state_dict({"weight": exact.weight * 1e4})
    exact.load_state_dict(top.state_dict())
    sampled, best = exact(hidden, key=cr.random_key(0, torch.arange(30))), top(hidden)
    sure = best.marginals[best.mask].reshape(30, 3).amin(-1) > 1 - 1e-6
    assert int(sure.sum()) > 20
    assert torch.equal(sampled.mask[sure], best.mask[sure])


# ---------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid", "marginal"])
@every_router
def test_combine_is_handed_through(make: Callable[..., cr.Router], combine: Any) -> None:
    router, hidden = _made(make, combine=combine), _randn(6, H)
    routing = router(hidden, key=1)
    expected = cr.route(routing.logits, router.circuit, combine=combine, replay=routing.mask)
    assert torch.equal(routing.gates, expected.gates)


@pytest.mark.parametrize("name", ["router", "exact", "dynamic", "over"])
@pytest.mark.parametrize("estimator", ["simple", "score", "none", Simple()], ids=str)
def test_the_estimator_is_handed_through(name: str, estimator: Any) -> None:
    router = _made(ROUTERS[name], estimator=estimator, combine="sigmoid")
    routing = router(_randn(6, H), key=1)
    same = cr.route(routing.logits, router.circuit, combine="sigmoid", estimator=estimator, replay=routing.mask)
    gradients = [
        torch.autograd.grad(r.gates.square().sum(), router.weight, retain_graph=True)[0] for r in (routing, same)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: cr.ExactKRouter(0, E, 2), ValueError, "hidden_size=0: must be at least 1"),
        (lambda: cr.ExactKRouter(H, 0, 2), ValueError, "num_experts=0: must be at least 1"),
        (lambda: cr.ExactKRouter(H, 2.5, 2), TypeError, "num_experts=2.5"),
        (lambda: cr.ExactKRouter(H, E, -1), ValueError, "k=-1: must be at least 0"),
        (lambda: cr.ExactKRouter(H, E, E + 1), cr.InfeasibleError, "Exactly"),
        (lambda: cr.TopKRouter(H, E, E + 1), cr.InfeasibleError, "Exactly"),
        (lambda: cr.DynamicKRouter(H, E, 3, 2), ValueError, "kmax=2: must be at least kmin=3"),
        (lambda: cr.DynamicKRouter(H, E, E + 1, E + 2), cr.InfeasibleError, "Between"),
        (lambda: cr.ExactKRouter(H, E, 2, estimator="magic"), ValueError, "estimator='magic'"),
        (lambda: cr.ExactKRouter(H, E, 2, estimator=None), TypeError, "estimator=None"),
        (lambda: cr.ExactKRouter(H, E, 2, combine="magic"), ValueError, "combine='magic'"),
        (lambda: cr.Router(H, E, 3), cr.UnsupportedConstraintError, "int is not a constraint"),
    ],
)
def test_bad_arguments_are_refused_at_construction(
    make: Callable[[], cr.Router], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make()


def test_hidden_states_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden has shape \(2, 4\): the last dimension must be hidden_size=5"):
        cr.ExactKRouter(H, E, 2)(_randn(2, 4))


def test_a_bad_replay_names_its_rows() -> None:
    replay = torch.zeros(2, E)
    replay[0, :2] = 1
    with pytest.raises(ValueError, match="in row 1"):
        cr.ExactKRouter(H, E, 2)(_randn(2, H), replay=replay)


def test_repr_says_what_is_routed() -> None:
    shown = repr(cr.DynamicKRouter(H, E, 1, 4, combine="normalized"))
    expected = "hidden_size=5, num_experts=8, constraint=Between(1, 4), combine='normalized', estimator='simple'"
    assert shown == f"DynamicKRouter({expected}, decide=None, temperature=1.0)"
