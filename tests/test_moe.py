"""The sparse layer against a dense one that runs every expert on every token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import circuitroute as cr

H, E, T = 4, 6, 17

CONSTRAINTS = {
    "exactly": cr.Exactly(2),
    "one": cr.Exactly(1),
    "all": cr.Exactly(E),
    "between": cr.Between(1, 4),
    "atmost": cr.AtMost(2),
    "none": cr.Exactly(0),
    "over": cr.Exactly(1).over([1, 2, 5]),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)


class Expert(nn.Module):
    """A small nonlinear expert that counts its calls and the rows it is given."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, width), nn.Linear(width, H)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.down(torch.tanh(self.up(x)))


def _layer(constraint: cr.Constraint = CONSTRAINTS["exactly"], **options: Any) -> cr.MoE:
    torch.manual_seed(0)
    router = cr.Router(H, E, constraint, **options)
    return cr.MoE(router, [Expert() for _ in range(E)])


def _hidden(*lead: int, seed: int = 1) -> Tensor:
    return torch.randn(*lead, H, generator=torch.Generator().manual_seed(seed))


def _key(tokens: int = T) -> Tensor:
    return cr.random_key(0, torch.arange(tokens))


def _rows(layer: cr.MoE) -> list[list[int]]:
    return [expert.rows for expert in layer.experts]


def dense(layer: cr.MoE, hidden: Tensor, routing: cr.Routing) -> Tensor:
    """Every expert on every token; gates count on the chosen set only, as in any sparse layer."""
    x = hidden.reshape(-1, H)
    outputs = torch.stack([expert(x) for expert in layer.experts], 1)
    gates = torch.where(routing.mask, routing.gates, 0.0)
    return torch.einsum("te,teh->th", gates.to(outputs), outputs).reshape(hidden.shape)


def _parts(layer: cr.MoE, hidden: Tensor, output: Tensor) -> dict[str, Tensor]:
    """The output and every gradient of a random projection of it; zeros where there is none."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    inputs = {"hidden": hidden, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad((output * upstream).sum(), list(inputs.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(inputs.items(), gradients, strict=True)
    }
    return {"output": output, **found}


@every_constraint
@pytest.mark.parametrize(
    ("combine", "training"),
    [("softmax", True), ("normalized", True), ("sigmoid", True), ("marginal", True), ("softmax", False)],
)
def test_output_and_every_gradient_are_the_dense_layers(
    constraint: cr.Constraint, combine: Any, training: bool
) -> None:
    layer = _layer(constraint, combine=combine).double().train(training)
    hidden = _hidden(T).double().requires_grad_()
    output, routing = layer(hidden, key=_key())
    assert isinstance(routing, cr.Routing)
    expected = _parts(layer, hidden, dense(layer, hidden, layer.router(hidden, key=_key())))
    found = _parts(layer, hidden, output)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_constraint
def test_experts_see_each_chosen_pair_once_and_nothing_else(constraint: cr.Constraint) -> None:
    """Padding costs nothing, and an expert nobody chose is not called, not even on an empty batch."""
    layer = _layer(constraint)
    _, routing = layer(_hidden(T), key=_key())
    loads = routing.mask.sum(0).tolist()
    assert _rows(layer) == [[load] if load else [] for load in loads]
    assert sum(loads) == int(routing.mask.sum())


def test_experts_out_of_reach_are_never_called_and_get_no_gradient() -> None:
    layer, logits = _layer(), torch.zeros(T, E)
    logits[:, 3:] = -torch.inf
    output, _ = layer(_hidden(T), routing=cr.route(logits, layer.router.circuit, key=_key()))
    output.sum().backward()
    assert [bool(rows) for rows in _rows(layer)] == [True] * 3 + [False] * 3
    assert all(p.grad is None for expert in layer.experts[3:] for p in expert.parameters())
    assert all(p.grad is not None for expert in layer.experts[:3] for p in expert.parameters())


def test_each_expert_sees_its_tokens_in_order() -> None:
    class Recorder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x[:, 0].tolist()
            return x

    torch.manual_seed(0)
    layer = cr.MoE(cr.ExactKRouter(H, E, 3), [Recorder() for _ in range(E)])
    hidden = torch.arange(float(T))[:, None].expand(T, H)
    _, routing = layer(hidden, key=_key())
    for e, expert in enumerate(layer.experts):
        assert expert.seen == routing.mask[:, e].nonzero().flatten().tolist()


# ---------------------------------------------------------------------------------------------- edges


@every_constraint
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0), (2, 1, 3)], ids=str)
def test_leading_dimensions_are_kept(constraint: cr.Constraint, lead: tuple[int, ...]) -> None:
    layer, hidden = _layer(constraint), _hidden(*lead).requires_grad_()
    tokens = hidden.numel() // H
    output, routing = layer(hidden, key=_key(tokens).reshape(lead))
    assert output.shape == hidden.shape
    assert routing.mask.shape == (tokens, E)
    flat, _ = layer(hidden.reshape(tokens, H), key=_key(tokens))
    assert torch.equal(output.reshape(tokens, H), flat)
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


def test_tokens_without_an_expert_get_zeros() -> None:
    layer, hidden = _layer(CONSTRAINTS["atmost"]), _hidden(T)
    replay = torch.zeros(T, E)
    replay[::2, 1] = 1
    output, routing = layer(hidden, replay=replay)
    assert bool((output[1::2] == 0).all())
    assert bool((output[::2] != 0).any(-1).all())
    assert routing.counts.tolist() == [1, 0] * (T // 2) + [1]


def test_a_batch_without_any_expert_still_has_a_gradient_of_zero() -> None:
    """A training step that happens to choose nothing must not fail in backward."""
    layer, hidden = _layer(CONSTRAINTS["atmost"]), _hidden(T).requires_grad_()
    output, _ = layer(hidden, replay=torch.zeros(T, E))
    assert _rows(layer) == [[]] * E
    assert bool((output == 0).all())
    output.sum().backward()
    assert hidden.grad is not None
    assert bool((hidden.grad == 0).all())
    assert layer.router.weight.grad is not None
    assert bool((layer.router.weight.grad == 0).all())


def test_a_token_is_processed_alike_in_any_batch() -> None:
    layer, hidden, key = _layer(CONSTRAINTS["between"]).double(), _hidden(T).double(), _key()
    whole, _ = layer(hidden, key=key)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    shuffled, _ = layer(hidden[order], key=key[order])
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-12, atol=1e-12)
    alone = torch.cat([layer(hidden[t : t + 1], key=key[t : t + 1])[0] for t in range(T)])
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)


def test_evaluation_is_deterministic() -> None:
    layer, hidden = _layer(CONSTRAINTS["between"]).eval(), _hidden(T)
    assert torch.equal(layer(hidden)[0], layer(hidden)[0])


# ---------------------------------------------------------------------------------------------- routing and replay


def test_replay_gives_the_same_output_and_gradients() -> None:
    layer, results, recorded = _layer(), [], None
    for _ in range(2):
        hidden = _hidden(T).requires_grad_()
        output, routing = layer(hidden, key=_key()) if recorded is None else layer(hidden, replay=recorded)
        recorded = routing.mask
        results.append(_parts(layer, hidden, output))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_decision_made_elsewhere_is_used_and_the_router_left_alone() -> None:
    layer, hidden = _layer(), _hidden(T)
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(5)).requires_grad_()
    elsewhere = cr.route(logits, layer.router.circuit, key=_key())

    def refuse(*args: object) -> None:
        raise AssertionError("the router was called")

    layer.router.register_forward_pre_hook(refuse)
    output, routing = layer(hidden, routing=elsewhere)
    assert routing is elsewhere
    torch.testing.assert_close(output, dense(layer, hidden, elsewhere))
    output.sum().backward()
    assert layer.router.weight.grad is None
    assert logits.grad is not None


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((T + 1, E), f"routing is for {T + 1} tokens and {E} experts, but there are {T} and {E}"),
        ((T, E + 1), f"routing is for {T} tokens and {E + 1} experts"),
        ((T, E - 1), f"routing is for {T} tokens and {E - 1} experts"),
    ],
)
def test_a_decision_about_something_else_is_refused(shape: tuple[int, int], says: str) -> None:
    elsewhere = cr.route(torch.zeros(shape), cr.compile(cr.Exactly(2), shape[1]))
    with pytest.raises(ValueError, match=says):
        _layer()(_hidden(T), routing=elsewhere)


@pytest.mark.parametrize("count", [0, E - 1, E + 1])
def test_the_number_of_experts_must_be_the_routers(count: int) -> None:
    with pytest.raises(ValueError, match=f"there are {count} experts, but the router chooses among {E}: give as many"):
        cr.MoE(cr.ExactKRouter(H, E, 2), [Expert() for _ in range(count)])


def test_a_layer_without_a_router_needs_a_decision() -> None:
    layer = cr.MoE(None, [Expert() for _ in range(E)])
    with pytest.raises(ValueError, match="routing=None: this layer was made without a router, so every call needs"):
        layer(_hidden(T))


def test_a_replay_for_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="replay has shape"):
        _layer()(_hidden(T), replay=torch.zeros(T - 1, E))


# ---------------------------------------------------------------------------------------------- modules and dtypes


def test_parameters_are_those_of_router_and_experts() -> None:
    modules = nn.ModuleList(Expert() for _ in range(E))
    layer = cr.MoE(cr.ExactKRouter(H, E, 2), modules)
    assert layer.experts is modules
    names = {name for name, _ in layer.named_parameters()}
    assert "router.weight" in names
    assert {name.split(".")[1] for name in names if name.startswith("experts")} == set(map(str, range(E)))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(_hidden(T), key=_key())[0], layer(_hidden(T), key=_key())[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_hidden_states(dtype: torch.dtype) -> None:
    layer, hidden = _layer().to(dtype), _hidden(T).to(dtype).requires_grad_()
    output, routing = layer(hidden, key=_key())
    assert output.dtype == dtype
    assert routing.gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(output, dense(layer, hidden, routing), rtol=tolerance, atol=tolerance)
    output.sum().backward()
    assert all(p.grad is None or p.grad.dtype == dtype for p in layer.parameters())


def test_autocast_routes_in_float32_and_keeps_the_dtype_of_the_hidden_states() -> None:
    layer, hidden = _layer(), _hidden(T)
    expected, routing = layer(hidden, key=_key())
    with torch.autocast("cpu", torch.bfloat16):
        output, cast = layer(hidden, key=_key())
    assert output.dtype == torch.float32
    assert torch.equal(cast.gates, routing.gates)
    torch.testing.assert_close(output, expected, rtol=5e-2, atol=2e-2)


def test_inference_mode_gives_the_same_output() -> None:
    layer, hidden = _layer(), _hidden(T)
    expected, _ = layer(hidden, key=_key())
    with torch.inference_mode():
        output, _ = layer(hidden, key=_key())
    assert torch.equal(output, expected)


@pytest.mark.parametrize("constraint", [CONSTRAINTS[name] for name in ("exactly", "atmost", "over")], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("preserve_rng_state", [True, False])
def test_checkpointing_a_keyed_layer_gives_identical_gradients(
    constraint: cr.Constraint, use_reentrant: bool, preserve_rng_state: bool
) -> None:
    layer = _layer(constraint)
    run: Callable[[Tensor], Tensor] = lambda x: layer(x, key=_key())[0]  # noqa: E731 - typed, and used once
    plain = _hidden(T).requires_grad_()
    expected = _backward(layer, plain, run(plain))
    saved = _hidden(T).requires_grad_()
    output = checkpoint(run, saved, use_reentrant=use_reentrant, preserve_rng_state=preserve_rng_state)
    torch.rand(5)  # the recomputation must not depend on the random state
    found = _backward(layer, saved, output)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def _backward(layer: cr.MoE, hidden: Tensor, output: Tensor) -> dict[str, Tensor]:
    layer.zero_grad(set_to_none=True)
    output.square().sum().backward()
    inputs = {"hidden": hidden, **dict(layer.named_parameters())}
    return {name: x.grad for name, x in inputs.items() if x.grad is not None}


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"key": 1}, "key"),
        ({"replay": torch.ones(T, E)}, "replay"),
        ({"temperature": 0.5}, "temperature"),
        ({"key": _key(), "decide": "mode", "price": 0.1}, "key, decide, price"),
        ({"replay": torch.ones(T, E), "bias": None}, "replay, bias"),
    ],
    ids=str,
)
def test_a_decision_that_is_made_takes_nothing_that_would_make_it(extra: dict[str, Any], names: str) -> None:
    """And the error names what was given, all of it and nothing else."""
    layer, hidden = _layer(), _hidden(T)
    _, routing = layer(hidden)
    with pytest.raises(ValueError, match=f"routing was given together with {names}: a decision that is made needs"):
        layer(hidden, routing=routing, **extra)
