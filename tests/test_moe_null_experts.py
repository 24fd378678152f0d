"""Null experts of the sparse layer: against a dense layer that runs every expert and every null expert on every token.

Legend: T tokens, H hidden size, E experts, Z null experts.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import circuitroute as cr

H, E, Z, T = 4, 5, 3, 19
KINDS = ("identity", "zero")
CONSTRAINTS = {
    "exactly": cr.Exactly(3),
    "range": cr.Between(1, 4),
    "between of the experts": cr.Exactly(4) & cr.Between(1, 3).over(range(E)),
    "cost": cr.Cost([1] * E + [0] * Z, at_most=2) & cr.Exactly(4),
    "cost alone": cr.Cost([1] * E + [0] * Z, at_most=2),
    "null experts only": cr.Exactly(2).over(range(E, E + Z)) & cr.Exactly(0).over(range(E)),
    "none": cr.Exactly(0),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Expert(nn.Module):
    """A small nonlinear expert that remembers how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 8, False), nn.Linear(8, H, False)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.down(torch.tanh(self.up(x)))


def layer_of(
    constraint: cr.Constraint,
    kind: Any,
    *,
    stacked: bool = False,
    probes: Any = 0,
    weights: Any = "importance",
    **o: Any,
) -> cr.MoE:
    torch.manual_seed(0)
    router = cr.Router(H, E + Z, constraint, **o)
    nn.init.normal_(router.weight)
    experts = cr.StackedExperts(E, H, 8, torch.tanh) if stacked else [Expert() for _ in range(E)]
    return cr.MoE(router, experts, probes, weights, null_experts=kind)


def hidden_of(*lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*lead, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def key_of(tokens: int = T) -> Tensor:
    return cr.random_key(0, torch.arange(tokens))


def outputs_of(layer: cr.MoE, rows: Tensor) -> Tensor:
    """[T, E + Z, H] what every expert and null expert gives for every token."""
    if isinstance(layer.experts, cr.StackedExperts):
        real = layer.experts(rows.repeat(E, 1), [len(rows)] * E).view(E, len(rows), H).transpose(0, 1)
    else:
        real = torch.stack([expert(rows) for expert in layer.experts], 1)
    null = rows if layer.null_experts == "identity" else torch.zeros_like(rows)
    return torch.cat([real, null[:, None].expand(-1, Z, -1)], 1)


def dense(layer: cr.MoE, hidden: Tensor, routing: cr.Routing) -> Tensor:
    rows = hidden.reshape(-1, H)
    gates = torch.where(routing.mask, routing.gates, 0.0)
    return torch.einsum("te,teh->th", gates.to(rows), outputs_of(layer, rows)).reshape(hidden.shape)


def parts(layer: cr.MoE, hidden: Tensor, output: Tensor) -> dict[str, Tensor]:
    """The output and every gradient of a random projection of it."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(output)
    inputs = {"hidden": hidden, **dict(layer.named_parameters())}
    found = torch.autograd.grad((output * upstream).sum(), list(inputs.values()), allow_unused=True)
    pairs = zip(inputs.items(), found, strict=True)
    return {"output": output, **{name: torch.zeros_like(x) if g is None else g for (name, x), g in pairs}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# Every constraint in one way, and two of them in every way.
WAYS = [(name, False, "softmax", True) for name in CONSTRAINTS]
WAYS += [
    (name, stacked, combine, training)
    for name in ("range", "between of the experts")
    for stacked, combine, training in ((True, "softmax", True), (False, "normalized", True), (True, "marginal", False))
]


@every_kind
@pytest.mark.parametrize(("name", "stacked", "combine", "training"), WAYS)
def test_output_and_every_gradient_are_the_dense_layers(
    name: str, kind: Any, stacked: bool, combine: Any, training: bool
) -> None:
    layer = layer_of(CONSTRAINTS[name], kind, stacked=stacked, combine=combine).double().train(training)
    hidden = hidden_of(T).requires_grad_()
    output, routing = layer(hidden, key=key_of())
    assert routing.mask.shape == (T, E + Z)
    expected = parts(layer, hidden, dense(layer, hidden, layer.router(hidden, key=key_of())))
    assert_same(parts(layer, hidden, output), expected)


@every_constraint
def test_null_experts_run_nothing(constraint: cr.Constraint) -> None:
    layer = layer_of(constraint, "identity").double()
    _, routing = layer(hidden_of(T), key=key_of())
    loads = routing.mask[:, :E].sum(0).tolist()
    assert [expert.rows for expert in layer.experts] == [[load] if load else [] for load in loads]
    executed = layer.executed_counts(routing)
    assert executed.dtype == torch.int64
    assert torch.equal(executed, routing.mask[:, :E].sum(-1))
    assert int(executed.sum()) == sum(loads)
    assert torch.equal(executed + routing.mask[:, E:].sum(-1), routing.counts)
    assert cr.metrics.active_experts(routing.mask[:, :E]) == pytest.approx(float(executed.double().mean()))


def test_a_budget_of_real_experts_is_kept_by_every_token() -> None:
    constraint = cr.Exactly(4) & cr.Between(2, 3).over(range(E))
    layer = layer_of(constraint, "identity").double()
    hidden = hidden_of(500)
    for training in (True, False):
        layer.train(training)
        _, routing = layer(hidden, key=key_of(500))
        assert set(routing.counts.tolist()) == {4}
        assert set(layer.executed_counts(routing).tolist()) == {2, 3}


def test_decisions_are_those_of_enumeration() -> None:
    """The exact marginals of a count over all and a range over the real ones."""
    circuit = cr.compile(CONSTRAINTS["between of the experts"], E + Z)
    logits = torch.randn(6, E + Z, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    allowed = [s for s in itertools.product([0.0, 1.0], repeat=E + Z) if sum(s) == 4 and 1 <= sum(s[:E]) <= 3]
    subsets = torch.tensor(allowed, dtype=torch.float64)
    assert circuit.model_count() == len(subsets)
    expected = torch.softmax(logits @ subsets.T, -1) @ subsets
    torch.testing.assert_close(circuit(logits).marginals, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("real", [1, 2, 3, 4])
def test_a_price_on_null_experts_steers_how_many_real_ones_run(real: int) -> None:
    """With identical null experts, exactly k takes the real ones whose logit exceeds theirs."""
    layer = layer_of(cr.Exactly(3), "zero").double().eval()
    price = torch.zeros(E + Z, dtype=torch.float64)
    price[E:] = {1: 50.0, 2: 1.0, 3: -1.0, 4: -50.0}[real]
    with torch.no_grad():
        layer.router.weight[E:] = 0.0
    hidden = hidden_of(T)
    _, routing = layer(hidden, bias=price)
    above = (layer.router.logits(hidden)[:, :E] > price[E]).sum(-1).clamp(max=3)
    assert torch.equal(layer.executed_counts(routing), above)


# ---------------------------------------------------------------------------------------------- probes


@every_kind
@pytest.mark.parametrize(("name", "stacked"), [("exactly", True), ("range", False), ("between of the experts", False)])
def test_all_probes_give_the_gates_the_whole_gradient(kind: Any, stacked: bool, name: str) -> None:
    """The router learns as if every expert and null expert had been run; the experts as if only the chosen had."""
    layer = layer_of(CONSTRAINTS[name], kind, stacked=stacked, probes="all").double()
    hidden = hidden_of(T)
    output, routing = layer(hidden, key=key_of())
    plain = layer_of(CONSTRAINTS[name], kind, stacked=stacked).double()
    without, _ = plain(hidden, key=key_of())
    assert torch.equal(output, without)
    every = torch.einsum("te,teh->th", routing.gates, outputs_of(layer, hidden).detach())
    upstream = torch.randn(T, H, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (wanted,) = torch.autograd.grad((every * upstream).sum(), layer.router.weight, retain_graph=True)
    (output * upstream).sum().backward()
    (without * upstream).sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, wanted, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(layer.experts.parameters(), plain.experts.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@every_kind
def test_one_probe_is_right_in_expectation(kind: Any) -> None:
    """Over many keys, within five standard errors: the mean gradient of the router's weight with the mode decided."""
    layer = layer_of(cr.Exactly(2), kind, probes=1, decide="mode").double()
    whole = layer_of(cr.Exactly(2), kind, probes="all", decide="mode").double()
    hidden = hidden_of(3)
    upstream = torch.randn(3, H, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    draws = 800

    def gradient(layer: cr.MoE, hidden: Tensor, key: Tensor) -> Tensor:
        logits: list[Tensor] = []
        handle = layer.router.register_forward_hook(lambda *a: logits.append(a[2].gates))
        output, _ = layer(hidden, key=key)
        handle.remove()
        (found,) = torch.autograd.grad((output * upstream.repeat(len(hidden) // 3, 1)).sum(), logits[0])
        return found

    wanted = gradient(whole, hidden, key_of(3))
    found = gradient(layer, hidden.repeat(draws, 1), key_of(3 * draws)).view(draws, 3, E + Z)
    error = found.std(0) / draws**0.5
    assert bool(((found.mean(0) - wanted).abs() <= 5 * error + 1e-9).all())
    null = found[..., E:].abs().sum()
    assert bool(null > 0) == (kind == "identity")


def test_probes_of_null_experts_run_nothing() -> None:
    layer = layer_of(cr.Exactly(E) & cr.Exactly(E).over(range(E)), "identity", probes=2).double()
    _, routing = layer(hidden_of(T), key=key_of())
    assert set(layer.executed_counts(routing).tolist()) == {E}
    # Null experts are forbidden here: nothing is feasible besides, and no expert is called twice.
    assert [expert.rows for expert in layer.experts] == [[T]] * E
    layer = layer_of(cr.Exactly(E) | cr.Exactly(E + 1), "identity", probes="all").double()
    replay = torch.zeros(T, E + Z)
    replay[:, :E] = 1.0
    output, _ = layer(hidden_of(T), replay=replay)
    assert [expert.rows for expert in layer.experts] == [[T]] * E + []
    output.sum().backward()
    assert bool((layer.router.weight.grad.abs().sum(-1) > 0).all())


# ---------------------------------------------------------------------------------------------- edges


@every_kind
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions_are_kept(kind: Any, lead: tuple[int, ...]) -> None:
    layer, hidden = layer_of(CONSTRAINTS["exactly"], kind).double(), hidden_of(*lead).requires_grad_()
    output, routing = layer(hidden, key=key_of(hidden.numel() // H).reshape(lead))
    assert output.shape == hidden.shape
    torch.testing.assert_close(output, dense(layer, hidden, routing))
    output.sum().backward()
    assert hidden.grad.shape == hidden.shape


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_has_the_dtype_of_the_hidden_states(kind: Any, dtype: torch.dtype) -> None:
    layer, hidden = layer_of(CONSTRAINTS["range"], kind).to(dtype), hidden_of(T, dtype=dtype).requires_grad_()
    output, routing = layer(hidden, key=key_of())
    assert output.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}[dtype]
    torch.testing.assert_close(output, dense(layer, hidden, routing), rtol=tolerance, atol=tolerance)
    output.sum().backward()
    assert hidden.grad.dtype == dtype


@every_kind
def test_autocast_keeps_the_dtype_of_the_hidden_states(kind: Any) -> None:
    layer, hidden = layer_of(CONSTRAINTS["range"], kind), hidden_of(T, dtype=torch.float32)
    expected, _ = layer(hidden, key=key_of())
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(hidden, key=key_of())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=5e-2, atol=3e-2)


@every_kind
def test_infinite_logits_force_and_forbid_null_experts(kind: Any) -> None:
    layer = layer_of(cr.Exactly(3), kind).double()
    for value, expected in ((torch.inf, 0), (-torch.inf, 3)):
        bias = torch.zeros(E + Z)
        bias[E:] = value
        _, routing = layer(hidden_of(T), key=key_of(), bias=bias)
        assert set(layer.executed_counts(routing).tolist()) == {expected}


@every_kind
def test_a_decision_that_could_not_be_made_does_not_pass_for_zero(kind: Any) -> None:
    """Under a transform a row of NaN stays NaN."""
    layer = layer_of(cr.Exactly(3), kind).double()
    logits = torch.zeros(T, E + Z, dtype=torch.float64)
    logits[1] = torch.nan
    routing = cr.route(logits, layer.router.circuit, validate_args=False, key=key_of())
    output = torch.func.vmap(lambda x: layer(x, routing=routing)[0])(hidden_of(1, T))[0]
    assert bool(output[1].isnan().all())
    assert not bool(output[0].isnan().any())


@every_kind
def test_vmap_is_a_loop(kind: Any) -> None:
    layer, hidden = layer_of(CONSTRAINTS["range"], kind).double().eval(), hidden_of(3, T)
    found = torch.func.vmap(lambda x: layer(x)[0])(hidden)
    torch.testing.assert_close(found, torch.stack([layer(x)[0] for x in hidden]))


@every_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_identical_gradients(kind: Any, use_reentrant: bool) -> None:
    layer = layer_of(CONSTRAINTS["range"], kind, probes=1).double()

    def gradients(run: Any) -> list[Tensor]:
        layer.zero_grad()
        hidden = hidden_of(T).requires_grad_()
        run(hidden).square().sum().backward()
        return [hidden.grad, layer.router.weight.grad.clone()]

    plain = gradients(lambda x: layer(x, key=key_of())[0])
    again = gradients(lambda x: checkpoint(lambda y: layer(y, key=key_of())[0], x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_shapes_alone_go_through() -> None:
    for kind in KINDS:
        torch.manual_seed(0)
        router = cr.Router(H, E + Z, cr.Between(1, 4), device="meta")
        layer = cr.MoE(router, cr.StackedExperts(E, H, 8, device="meta"), probes=1, null_experts=kind)
        output, _ = layer(torch.empty(T, H, device="meta"))
        assert output.shape == (T, H)
        assert output.is_meta


@every_kind
def test_state_and_copies(kind: Any) -> None:
    layer = layer_of(CONSTRAINTS["exactly"], kind, stacked=True)
    assert sorted(layer.state_dict()) == ["experts.down", "experts.up", "router.weight"]
    expected = layer(hidden_of(T, dtype=torch.float32), key=key_of())[0]
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(hidden_of(T, dtype=torch.float32), key=key_of())[0], expected)
    plain = cr.MoE(cr.Router(H, E, cr.Exactly(2)), [nn.Linear(H, H) for _ in range(E)])
    assert plain.null_experts is None
    assert pickle.loads(pickle.dumps(plain)).null_experts is None


# ---------------------------------------------------------------------------------------------- other decisions


@every_kind
def test_a_layer_without_a_router_takes_any_number_of_null_experts(kind: Any) -> None:
    experts = [Expert().double() for _ in range(E)]
    layer = cr.MoE(None, experts, null_experts=kind)
    hidden = hidden_of(T)
    for null in (0, 1, 4):
        logits = torch.randn(T, E + null, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        routing = cr.route(logits, cr.compile(cr.Exactly(3), E + null), key=key_of())
        output, _ = layer(hidden, routing=routing)
        real = torch.stack([expert(hidden) for expert in experts], 1)
        gates = torch.where(routing.mask, routing.gates, 0.0)
        expected = torch.einsum("te,teh->th", gates[:, :E], real)
        if kind == "identity":
            expected = expected + gates[:, E:].sum(-1, keepdim=True) * hidden
        torch.testing.assert_close(output, expected)
        assert torch.equal(layer.executed_counts(routing), routing.mask[:, :E].sum(-1))


def test_a_budget_over_layers_spends_on_null_experts_too() -> None:
    budget = cr.BudgetRouter(H, E + Z, layers=2, per_layer=cr.Exactly(3), total=cr.AtMost(6))
    layers = [cr.MoE(None, cr.StackedExperts(E, H, 8), null_experts="identity") for _ in range(2)]
    hidden = hidden_of(T, dtype=torch.float32)
    state = budget.begin(hidden)
    for layer in layers:
        routing, state = budget(hidden, state, key=key_of())
        output, _ = layer(hidden, routing=routing)
        assert output.shape == hidden.shape
    assert int(state.spent.max()) == 6


@pytest.mark.parametrize(
    ("choices", "kind", "message"),
    [
        (E, "identity", r"null_experts='identity': there are 5 experts and the router chooses among 5, so none"),
        (E - 1, "zero", r"null_experts='zero': there are 5 experts and the router chooses among 4, .* above 5"),
        (E + 2, None, r"there are 5 experts, but the router chooses among 7: give as many, or a router with "
                      r"num_experts=5, or null_experts='identity' or 'zero' for the last 2"),
        (E - 1, None, r"the router chooses among 4: give as many, or a router with num_experts=5$"),
        (E + 2, "copy", r"null_experts='copy': choose one of 'identity', 'zero'"),
        (E + 2, 3, r"null_experts=3: choose one of 'identity', 'zero'"),
        (E + 2, True, r"null_experts=True: choose one of"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(choices: int, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cr.MoE(cr.ExactKRouter(H, choices, 2), [Expert() for _ in range(E)], null_experts=kind)


@pytest.mark.parametrize(
    ("router", "choices", "message"),
    [
        (True, E, "routing is for 19 tokens and 5 experts, but there are 19 and 5, and 3 null experts"),
        (True, E + Z + 1, "9 experts, but there are 19 and 5, and 3 null experts"),
        (False, E - 1, "routing is for 19 tokens and 4 experts, but there are 19 and 5, and null experts"),
    ],
)
def test_a_decision_over_other_experts_is_refused(router: bool, choices: int, message: str) -> None:
    layer = layer_of(cr.Exactly(3), "identity").double()
    if not router:
        layer = cr.MoE(None, layer.experts, null_experts="identity")
    routing = cr.route(torch.zeros(T, choices), cr.compile(cr.Exactly(2), choices))
    with pytest.raises(ValueError, match=message):
        layer(hidden_of(T), routing=routing)
    with pytest.raises(ValueError, match=f"for 19 tokens and {choices} experts, but there are 19"):
        layer.executed_counts(routing)
