"""In DeepSpeed's mixture-of-experts layers, on one process on a CPU: contract, values, rows, losses, keys, records."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import circuitroute as cr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip(
        "deepspeed.moe.layer",
        reason="deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation --no-deps deepspeed==0.19.8; "
        "pip install hjson ninja py-cpuinfo msgpack einops",
        exc_type=ImportError,
    )
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.sharded_moe import TopKGate
    from deepspeed.utils import groups

    from circuitroute.integrations import deepspeed

pytestmark = pytest.mark.integrations

B, L, H, E = 2, 12, 16, 8
T = B * L
RULES = [cr.Exactly(1), cr.Exactly(2), cr.Between(1, 4), cr.Between(0, 3)]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 24), nn.Linear(24, H)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return out


def build(k: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    defaults = {"num_experts": E, "drop_tokens": False, "top2_2nd_expert_sampling": False}
    layer = MoE(H, Expert(), k=k, **{**defaults, **settings})
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype)


def build_circuit(constraint: cr.Constraint, seed: int | None = 0, dtype: torch.dtype = torch.float32, **o: Any) -> Any:
    layer = build(max(1, cr.compile(constraint, E).max_count), dtype)
    assert deepspeed.convert(layer, constraint, seed=seed, **o) == 1
    deepspeed.begin_step(layer, 0)
    return layer


def hidden(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(B, L, H, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_(requires_grad)


def gate_of(layer: Any) -> Any:
    return layer.deepspeed_moe.gate


def dense(layer: Any, x: Tensor, gates_TE: Tensor) -> Tensor:
    """All experts on all tokens, weighted by the gates."""
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    outputs = torch.stack([expert(x.flatten(0, 1)) for expert in experts], 1)
    return (outputs * gates_TE[..., None]).sum(1).view_as(x)


# ------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("k", [1, 2, 3])
def test_in_evaluation_exactly_k_is_the_stock_gate(k: int) -> None:
    stock, ours = build(k).eval(), build(k).eval()
    keys = list(ours.state_dict())
    deepspeed.convert(ours, cr.Exactly(k))
    assert list(ours.state_dict()) == keys
    ours.load_state_dict(stock.state_dict())
    x = hidden()
    output, balance, counts = ours(x)
    expected, _, load = stock(x)
    torch.testing.assert_close(output, expected)
    assert torch.equal(counts, load)
    assert balance.shape == ()
    flat = x.flatten(0, 1)
    for found, wanted in zip(gate_of(ours)(flat, None, True), gate_of(stock)(flat, None, True), strict=True):
        assert type(found) is type(wanted)
        if isinstance(found, Tensor):
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    _, weights, dispatch, _ = gate_of(ours)(flat)
    _, stock_weights, stock_dispatch, _ = gate_of(stock)(flat)
    torch.testing.assert_close(weights.sum(-1), stock_weights.sum(-1))
    assert weights.shape == stock_weights.shape
    assert torch.equal(dispatch.any(-1), stock_dispatch.any(-1))


@pytest.mark.parametrize("constraint", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_and_gradients_are_those_of_a_dense_layer(constraint: cr.Constraint, dtype: torch.dtype) -> None:
    layer, x = build_circuit(constraint, dtype=dtype), hidden(requires_grad=True, dtype=dtype)
    with deepspeed.recorded_routings(layer) as routings:
        output, _, counts = layer(x)
    (routing,) = routings
    assert torch.equal(counts, routing.mask.sum(0))
    reference = dense(layer, x, torch.where(routing.mask, routing.gates, 0.0))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(output, reference, atol=tolerance, rtol=tolerance)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
    wanted = torch.autograd.grad(reference, inputs, upstream)
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, expected, atol=10 * tolerance, rtol=10 * tolerance)
    assert found[1].any()


@pytest.mark.parametrize("constraint", RULES, ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_weights_are_those_of_route(constraint: cr.Constraint, training: bool) -> None:
    layer = build_circuit(constraint).train(training)
    logits = hidden().flatten(0, 1) @ gate_of(layer).wg.weight.t()
    combine = "softmax" if gate_of(layer).k == 1 else "normalized"
    key = cr.random_key(0, 0, 0, torch.arange(T))
    wanted = cr.route(logits, cr.compile(constraint, E), combine=combine, key=key, training=training)
    _, _, _, ids, _, weights, _ = gate_of(layer)(hidden().flatten(0, 1), None, True)
    found = torch.zeros(T, E + 1).scatter(1, ids.t().long() % (E + 1), weights.t())[:, :E]
    torch.testing.assert_close(found, torch.where(wanted.mask, wanted.gates, 0.0))


@pytest.mark.parametrize("constraint", RULES, ids=repr)
def test_both_forms_of_routes_are_the_same_layer(constraint: cr.Constraint) -> None:
    """The dense one goes through einsums over rows, as older layers of DeepSpeed do."""
    layer, x = build_circuit(constraint), hidden(requires_grad=True)
    output, balance, counts = layer(x)
    flat = x.flatten(0, 1)
    same, weights, dispatch, load = gate_of(layer)(flat)
    torch.testing.assert_close(same, balance)
    assert torch.equal(load, counts)
    assert torch.equal(dispatch, weights != 0)
    assert dispatch.sum() == counts.sum()
    assert (dispatch.sum(0) <= 1).all()
    assert weights.shape == (T, E, int(counts.max()))
    rows = torch.einsum("tec,th->ech", dispatch.float(), flat)
    experts = layer.deepspeed_moe.experts(rows.unsqueeze(0)).squeeze(0)
    combined = torch.einsum("tec,ech->th", weights, experts).view_as(x)
    torch.testing.assert_close(combined, output, atol=1e-5, rtol=1e-5)
    inputs = [x, *layer.parameters()]
    for own, other in zip(
        torch.autograd.grad(combined.square().sum(), inputs),
        torch.autograd.grad(output.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("constraint", RULES, ids=repr)
def test_unused_routes_are_dropped(constraint: cr.Constraint) -> None:
    layer = build_circuit(constraint)
    with deepspeed.recorded_routings(layer) as routings:
        _, room, experts, ids, rows, weights, load = gate_of(layer)(hidden().flatten(0, 1), None, True)
    mask = routings[0].mask
    assert experts == E
    assert int(room) == int(mask.sum(0).max())
    assert torch.equal(ids.ge(0).sum(0), mask.sum(1))
    assert not weights[ids < 0].any()
    assert weights[ids >= 0].all()
    taken = ids[ids >= 0] * int(room) + rows[ids >= 0]
    assert len(taken.unique()) == len(taken) == int(mask.sum()) == int(load.sum())
    assert (rows < room).all() or not mask.any()


def test_tokens_without_any_expert_get_nothing() -> None:
    layer = build_circuit(cr.AtMost(2), seed=None).eval()
    with torch.no_grad():
        gate_of(layer).wg.weight.zero_()
        gate_of(layer).wg.weight[:, 0] = -1.0
    x = hidden()
    x[..., 0] = 1.0
    x[0, 3, 0] = -1.0
    output, _, counts = layer(x)
    assert output.ne(0).any(-1).sum() == 1
    assert int(counts.sum()) == 2
    x[0, 3, 0] = 1.0
    output, balance, counts = layer(x.requires_grad_())
    assert not output.any()
    assert not counts.any()
    assert balance == 0
    output.sum().backward()
    assert not x.grad.any()
    assert gate_of(layer)(x.flatten(0, 1))[1].shape == (T, E, 0)


def test_rows_without_a_number_are_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is validated, NaN comes out rather than nothing."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    layer, x = build_circuit(cr.Between(0, 3)), hidden()
    x[1, 2, 3] = torch.nan
    bad = torch.zeros(B, L, dtype=torch.bool)
    bad[1, 2] = True
    with deepspeed.recorded_routings(layer) as routings:
        output, _, counts = layer(x)
    assert torch.equal(output.isnan().any(-1), bad)
    assert torch.equal(counts, routings[0].mask.sum(0))
    _, weights, dispatch, _ = gate_of(layer)(x.flatten(0, 1))
    assert torch.equal(weights.isnan().any(-1).any(-1), bad.flatten())
    assert torch.equal(dispatch.any(-1), routings[0].mask)


def test_padding_has_no_expert_and_counts_nowhere() -> None:
    for rule in (cr.Exactly(1), cr.Between(1, 4)):
        layer, x = build_circuit(rule), hidden()
        used = (torch.arange(T) % 3 != 0).float()
        with deepspeed.recorded_routings(layer) as routings:
            output, balance, counts = layer(x, used)
        real = used.bool()
        chosen, mass = routings[0].mask[real].float(), routings[0].marginals[real]
        assert not output.flatten(0, 1)[~real].any()
        assert output.flatten(0, 1)[real].any(-1).all()
        assert torch.equal(counts, chosen.sum(0).long())
        expected = E * (chosen.sum(0) / chosen.sum() * mass.sum(0) / mass.sum()).sum()
        torch.testing.assert_close(balance, expected)


@pytest.mark.parametrize("constraint", RULES[1:], ids=repr)
def test_the_balance_loss_is_of_the_decision(constraint: cr.Constraint) -> None:
    layer = build_circuit(constraint)
    with deepspeed.recorded_routings(layer) as routings:
        _, balance, _ = layer(hidden())
    expected = cr.losses.load_balance(routings[0])
    torch.testing.assert_close(balance, expected)
    torch.testing.assert_close(layer.deepspeed_moe.l_aux, expected)
    weight = gate_of(layer).wg.weight
    (found,) = torch.autograd.grad(balance, weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(found, wanted)


def test_half_precision_decides_in_float32() -> None:
    layer, exact = build_circuit(cr.Between(1, 4)).bfloat16(), build_circuit(cr.Between(1, 4))
    with torch.no_grad():
        gate_of(exact).wg.weight.copy_(gate_of(layer).wg.weight)
    x = hidden().bfloat16()
    with deepspeed.recorded_routings(layer) as routings, torch.autocast("cpu", torch.bfloat16):
        output, balance, _ = layer(x)
    with deepspeed.recorded_routings(exact) as expected:
        exact(x.float())
    assert torch.equal(routings[0].mask, expected[0].mask)
    torch.testing.assert_close(routings[0].gates, expected[0].gates)
    assert (output.dtype, balance.dtype) == (torch.bfloat16, torch.float32)


def test_a_residual_layer_works() -> None:
    layer = build(4, use_residual=True)
    deepspeed.convert(layer, cr.Between(1, 4), seed=None)
    output, balance, _ = layer(hidden())
    (output.square().mean() + balance).backward()
    assert gate_of(layer).wg.weight.grad.any()


class Shares:
    """What DeepSpeed asks of Megatron's bookkeeping of tensor parallelism."""

    def get_tensor_model_parallel_world_size(self) -> int:
        return 5


def test_room_is_a_multiple_of_the_shares_of_tensor_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build_circuit(cr.Between(1, 4))
    flat = hidden().flatten(0, 1)
    _, room, *_, load = gate_of(layer)(flat, None, True)
    assert int(room) == int(load.max())
    monkeypatch.setattr(groups, "mpu", Shares())
    assert int(gate_of(layer)(flat, None, True)[1]) == -(-int(load.max()) // 5) * 5


def test_time_of_the_gate_is_taken_where_it_is_asked_for() -> None:
    layer = build_circuit(cr.Between(1, 4))
    assert gate_of(layer).gate_time == 0.0
    gate_of(layer).wall_clock_breakdown = True
    gate_of(layer)(hidden().flatten(0, 1), None, True)
    assert gate_of(layer).gate_time > 0.0


# ------------------------------------------------------------------------------------------------ models, keys, records


class Model(nn.Module):
    def __init__(self, k: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build(k) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def build_model(rule: Any = RULES[2], **options: Any) -> Model:
    model = Model()
    deepspeed.convert(model, rule, **{"seed": 0, **options})
    return model


def routed(model: Any, x: Tensor) -> list[cr.Routing]:
    with deepspeed.recorded_routings(model) as routings:
        model(x)
    return list(routings)


def test_all_layers_of_a_model_are_converted() -> None:
    model, seen = Model(), []
    gates = [gate_of(layer) for layer in model.layers]
    gates[0].register_forward_hook(lambda *_: seen.append(1))
    weights = [gate.wg.weight for gate in gates]
    rules = [cr.Between(1, 4), cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(4)]
    assert deepspeed.convert(model, rules, seed=0) == 2
    deepspeed.begin_step(model, 0)
    for routing, rule in zip(routed(model, hidden()), rules, strict=True):
        assert cr.compile(rule, E).satisfies(routing.mask).all()
    assert seen == [1]
    assert [gate_of(layer) for layer in model.layers] == gates
    assert all(
        isinstance(gate, TopKGate) and gate.wg.weight is weight for gate, weight in zip(gates, weights, strict=True)
    )
    assert deepspeed.convert(model, cr.Exactly(4), seed=0) == 2
    assert all((routing.counts == 4).all() for routing in routed(model.eval(), hidden()))


def test_keys_are_of_seed_step_layer_and_token() -> None:
    model = build_model(seed=7, temperature=0.5)
    deepspeed.begin_step(model, 5, offset=100)
    routings = routed(model, hidden())
    for number, routing in enumerate(routings):
        key = cr.random_key(7, 5, number, 100 + torch.arange(T))
        again = cr.route(routing.logits, routing.distribution.circuit, key=key, temperature=0.5)
        assert torch.equal(routing.mask, again.mask)
    deepspeed.begin_step(model, 5, offset=100 + L)
    assert torch.equal(routed(model, hidden()[1:])[0].mask, routings[0].mask[L:])
    with pytest.raises(RuntimeError, match="seed=0 was given, but no step has begun"):
        build_model()(hidden())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_layers_decide_the_same(use_reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model, x = build_model(), hidden(requires_grad=True)
        deepspeed.begin_step(model, 0)
        output = checkpoint(model, x, use_reentrant=use_reentrant, preserve_rng_state=False) if recompute else model(x)
        output.square().mean().backward()
        gradients.append([output.detach(), x.grad, *[parameter.grad for parameter in model.parameters()]])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(recomputed, plain)


@pytest.mark.parametrize("training", [True, False])
def test_a_record_comes_back(training: bool) -> None:
    model = build_model().train(training)
    deepspeed.begin_step(model, 3)
    with deepspeed.recorded_routings(model) as routings:
        output = model(hidden())
    record = cr.RoutingRecord.of(routings)
    for mode in (True, False):
        again = build_model(seed=None).train(mode)
        deepspeed.replay(again, record)
        with deepspeed.recorded_routings(again) as replayed:
            torch.testing.assert_close(again(hidden()), output)
        ratio = cr.replay.importance_ratio(cr.replay.path_log_prob(replayed), record.path_log_prob)
        torch.testing.assert_close(ratio, torch.ones(T))
        deepspeed.replay(again, None)
        assert cr.RoutingRecord.of(routed(again.train(), hidden())) != record


def test_replayed_layers_have_the_gradients_of_the_recorded_decision() -> None:
    layer, x = build_circuit(cr.Between(1, 4), seed=None), hidden(requires_grad=True)
    mask = cr.compile(cr.Between(1, 4), E)(torch.zeros(T, E)).sample(key=cr.random_key(1, torch.arange(T))).bool()
    deepspeed.replay(layer, cr.RoutingRecord.of(mask))
    with deepspeed.recorded_routings(layer) as routings:
        output, _, counts = layer(x)
    assert torch.equal(routings[0].mask, mask)
    assert torch.equal(counts, mask.sum(0))
    logits = x.flatten(0, 1) @ gate_of(layer).wg.weight.t()
    alone = cr.route(logits, cr.compile(cr.Between(1, 4), E), replay=mask, combine="normalized")
    reference = dense(layer, x, torch.where(mask, alone.gates, 0.0))
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(output.square().sum(), inputs)
    wanted = torch.autograd.grad(reference.square().sum(), inputs)
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_wrong_records_are_refused_and_nothing_changes() -> None:
    model = build_model()
    deepspeed.begin_step(model, 0)
    record = cr.RoutingRecord.of(routed(model, hidden()), log_probs=False)
    deepspeed.replay(model, record)
    masks = record.masks()
    masks[1][3] = True
    for wrong, message in (
        (cr.RoutingRecord.of(masks), r"layer 1 has subsets that Between\(1, 4\) forbids, in row 3"),
        (cr.RoutingRecord.of(masks[:1]), r"record has layers of \[8\] experts.*routers \[8, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            deepspeed.replay(model, wrong)
        assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == record


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_layers_are_copied(way: Any) -> None:
    """Before they have run: DeepSpeed's layers hold their last loss, which torch does not copy."""
    layer = build_circuit(cr.Between(1, 4))
    twin = way(layer)
    assert torch.equal(twin(hidden())[0], layer(hidden())[0])


def test_training_lowers_the_loss() -> None:
    model, x, target = build_model(), hidden(), torch.randn(B, L, H, generator=torch.Generator().manual_seed(8))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for step in range(30):
        deepspeed.begin_step(model, step)
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.5 * found[0]


# ------------------------------------------------------------------------------------------------ refusals


class OwnGate(TopKGate):
    """One that may decide in its own way."""


def own_gate() -> Any:
    layer = build(2)
    gate_of(layer).__class__ = OwnGate
    return layer


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "capacity": (lambda: build(2, drop_tokens=True), cr.Exactly(2), ValueError, "drop_tokens=True .*drop_tokens=False"),
    "noise": (lambda: build(2, noisy_gate_policy="RSample"), cr.Exactly(2), ValueError, "noisy_gate_policy='RSample'"),
    "jitter": (lambda: build(3, noisy_gate_policy="Jitter"), cr.Exactly(3), ValueError, "noisy_gate_policy='Jitter'"),
    "second": (
        lambda: build(2, top2_2nd_expert_sampling=True),
        cr.Between(1, 2),
        ValueError,
        "top2_2nd_expert_sampling=True .*set it to False",
    ),
    "k": (lambda: build(2), cr.Between(1, 4), ValueError, r"k=2: Between\(1, 4\) allows up to 4 .*build .* with k=4"),
    "constraint": (lambda: build(2), 2, TypeError, "constraint=2: int is not a constraint"),
    "infeasible": (lambda: build(9), cr.Exactly(9), cr.InfeasibleError, r"Exactly\(9\)"),
    "gate": (own_gate, cr.Exactly(2), TypeError, "gate '0.deepspeed_moe.gate' is a OwnGate"),
    "number": (lambda: build(2), [cr.Exactly(2)] * 3, ValueError, "constraint has 3 entries, but the model has 2"),
    "options": (lambda: build(2), cr.Exactly(2), TypeError, "unexpected keyword argument 'probes'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_changes_nothing(what: str) -> None:
    make, rule, error, message = REFUSED[what]
    model = nn.Sequential(make(), make())
    kinds = [type(gate_of(layer)) for layer in model]
    with pytest.raises(error, match=message):
        deepspeed.convert(model, rule, **({"probes": 1} if what == "options" else {}))
    assert [type(gate_of(layer)) for layer in model] == kinds
    assert not any(hasattr(gate_of(layer), "decider") for layer in model)


def test_one_wrong_layer_leaves_all_as_they_were() -> None:
    model = nn.Sequential(build(2), build(3))
    with pytest.raises(ValueError, match="k=3: Exactly"):
        deepspeed.convert(model, cr.Exactly(2))
    assert [type(gate_of(layer)) for layer in model] == [TopKGate, TopKGate]
    with pytest.raises(ValueError, match=r"model \(Linear\) has no mixture-of-experts layer of deepspeed.moe"):
        deepspeed.convert(nn.Linear(2, 2), cr.Exactly(2))


def test_layers_with_routers_of_another_kind_are_not_passed_over() -> None:
    """AutoEP marks its layers so."""
    model = nn.Sequential(build(2), nn.Linear(H, H))
    model[1]._is_autoep_layer = True
    with pytest.raises(ValueError, match=r"layers that AutoEP made \(1\): their router is a top-k of its own"):
        deepspeed.convert(model, cr.Exactly(2))
    assert type(gate_of(model[0])) is TopKGate
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    assert AutoEPMoELayer._is_autoep_layer


def test_settings_that_do_nothing_are_not_refused() -> None:
    """Of a single expert nothing is a second; "None" is no noise; random tokens are chosen under a capacity only."""
    layer = build(1, top2_2nd_expert_sampling=True, noisy_gate_policy="None", use_rts=True)
    assert deepspeed.convert(layer, cr.Exactly(1)) == 1


def test_the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "deepspeed.md"
    blocks = re.findall(r"^ *```py\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    scope: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(textwrap.dedent(block), str(page), "exec", dont_inherit=True), scope)
    assert "deepspeed" in sys.modules
