"""In Megatron-core's mixture-of-experts layers, on one process on a CPU: allgather dispatch, experts one by one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import circuitroute as cr

pytest.importorskip(
    "tests.integrations.megatron_support",
    reason="megatron-core: pip install --no-deps megatron-core==0.16.1",
    exc_type=ImportError,
)
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    get_default_pg_collection,
    get_moe_layer_wise_logging_tracker,
)

from circuitroute.integrations import megatron
from tests.integrations import megatron_support as support
from tests.integrations.megatron_support import B, E, H, S, T, build, build_circuit, configuration, dense, hidden

pytestmark = support.MARKS


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with support.one_process():
        yield


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    support.no_gpu(monkeypatch.setattr)


RULES = {
    "softmax over the chosen": {},
    "softmax over all": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
}


@pytest.mark.parametrize("rule", RULES)
def test_in_evaluation_exactly_k_is_the_stock_router(rule: str) -> None:
    stock, ours = build(**RULES[rule]), build(megatron.router(cr.Exactly(4)), **RULES[rule])
    assert set(stock.state_dict()) == set(ours.state_dict())
    logits = torch.randn(S, B, E)
    probs, routing_map = ours.eval().router.routing(logits)
    expected, expected_map = stock.eval().router.routing(logits)
    assert torch.equal(routing_map, expected_map)
    torch.testing.assert_close(probs, expected)


@pytest.mark.parametrize("constraint", [cr.Exactly(4), cr.Between(1, 4), cr.Between(0, 4)], ids=repr)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_layer_and_gradients_are_those_of_a_dense_layer(dispatcher: str, constraint: cr.Constraint, rule: str) -> None:
    layer = build_circuit(constraint, moe_token_dispatcher_type=dispatcher, **RULES[rule])
    x = hidden(requires_grad=True)
    with megatron.recorded_routings(layer) as routings:
        output, bias = layer(x)
    assert bias is None
    (routing,) = routings
    reference = dense(layer, x, torch.where(routing.mask, routing.gates, 0.0))
    torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-5)
    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
    for own, wanted in zip(found, torch.autograd.grad(reference, inputs, upstream), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)
    assert found[1].abs().sum() > 0


def test_the_contract() -> None:
    layer = build_circuit(cr.Between(1, 4))
    probs, routing_map = layer.router(hidden())
    assert probs.shape == routing_map.shape == (T, E)
    assert routing_map.dtype == torch.bool
    assert torch.equal(probs > 0, routing_map)
    assert cr.compile(cr.Between(1, 4), E).satisfies(routing_map).all()


LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_balance_losses_are_of_the_sampled_set_and_the_marginals(kind: str) -> None:
    """Attached to the output's backward and logged, both as Megatron does it."""
    layer = build_circuit(cr.Between(1, 4), moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.5)
    clear_aux_losses_tracker()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(3.0))
    x = hidden()
    with megatron.recorded_routings(layer) as routings:
        probs, _ = layer.router(x)
    (gradient,) = torch.autograd.grad(probs.sum() * 0.0, layer.router.weight, retain_graph=True)
    (routing,) = routings
    if kind == "seq_aux_loss":
        load, mass = (v.view(S, B, E).sum(0) for v in (routing.mask.float(), routing.marginals))
        loss = cr.losses.balance(load, mass).mean()
    else:
        loss = cr.losses.load_balance(routing)
    (wanted,) = torch.autograd.grad(3.0 * 0.5 * loss, layer.router.weight)
    torch.testing.assert_close(gradient, wanted)
    assert gradient.abs().sum() > 0
    logged = get_moe_layer_wise_logging_tracker()[LOSSES[kind]]["values"]
    torch.testing.assert_close(logged, torch.tensor([loss.item(), 0.0]))
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def test_the_global_loss_averages_the_load_over_micro_batches() -> None:
    layer = build_circuit(cr.Between(1, 4), moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.5)
    with megatron.recorded_routings(layer) as routings:
        layer.router(hidden())
        layer.router(-hidden())
    both = sum(routing.mask.sum(0).float() for routing in routings)
    assert torch.equal(layer.router.global_tokens_per_expert, both)
    assert layer.router.ga_steps == 2
    layer.router.reset_global_aux_loss_tracker()
    assert not layer.router.global_tokens_per_expert.any()


def test_several_losses_at_once_and_the_z_loss() -> None:
    kinds = ["aux_loss", "seq_aux_loss"]
    settings = {"moe_router_load_balancing_type": kinds, "moe_aux_loss_coeff": [0.5, 0.25], "moe_z_loss_coeff": 0.1}
    layer = build_circuit(cr.Between(1, 4), **settings)
    with megatron.recorded_routings(layer) as routings:
        probs, _ = layer.router(hidden())
    (gradient,) = torch.autograd.grad(probs.sum() * 0.0, layer.router.weight)
    # On logits of their own: backward through the router's would run the attached losses once more.
    (routing,) = routings
    again = cr.route(layer.router.gating(hidden()), routing.distribution.circuit, replay=routing.mask)
    load, mass = (v.view(S, B, E).sum(0) for v in (again.mask.float(), again.marginals))
    total = 0.5 * cr.losses.load_balance(again) + 0.25 * cr.losses.balance(load, mass).mean()
    total = total + 0.1 * cr.losses.z_loss(again)
    (wanted,) = torch.autograd.grad(total, layer.router.weight)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_padding_counts_nowhere() -> None:
    settings = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
    settings |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    layer = build_circuit(cr.Between(1, 4), **settings)
    clear_aux_losses_tracker()
    padding = torch.zeros(S, B, dtype=torch.bool)
    padding[-2:] = True
    with megatron.recorded_routings(layer) as routings:
        layer.router(hidden(), padding)
    (routing,) = routings
    kept = ~padding.view(-1)
    assert torch.equal(layer.router.local_tokens_per_expert, routing.mask[kept].sum(0).float())
    wanted = cr.losses.balance(routing.mask[kept].float().sum(0), routing.marginals[kept].sum(0))
    logged = get_moe_layer_wise_logging_tracker()["load_balancing_loss"]["values"]
    torch.testing.assert_close(logged[0], wanted.detach())


def test_the_expert_bias_shifts_the_choice_and_no_weights() -> None:
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    layer = build_circuit(cr.Exactly(4), **settings)
    layer.router.expert_bias[5] = 50.0
    with megatron.recorded_routings(layer) as routings:
        probs, routing_map = layer.router(hidden())
    assert routing_map[:, 5].all()
    scores = torch.where(routing_map, layer.router.gating(hidden()).view(T, E).sigmoid(), 0.0)
    torch.testing.assert_close(probs, scores / scores.sum(-1, keepdim=True))
    torch.testing.assert_close(routings[0].marginals[:, 5], torch.ones(T))
    assert torch.equal(layer.router.local_tokens_per_expert, routing_map.sum(0).float())
    layer.eval()
    layer.router(hidden())
    assert torch.equal(layer.router.local_tokens_per_expert, routing_map.sum(0).float()), "evaluation does not count"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_decides_the_same(use_reentrant: bool) -> None:
    """Reentrant is how Megatron recomputes: first without gradients, then with them, which counts the load once."""
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    settings |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
    gradients, counts = [], []
    for recompute in (False, True):
        layer = build_circuit(cr.Between(1, 4), **settings)
        x = hidden(requires_grad=True)
        if recompute:
            output, _ = checkpoint(layer, x, use_reentrant=use_reentrant, preserve_rng_state=False)
        else:
            output, _ = layer(x)
        output.square().mean().backward()
        gradients.append([x.grad, *[parameter.grad for parameter in layer.parameters()]])
        counts.append(layer.router.local_tokens_per_expert)
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    assert torch.equal(counts[1], counts[0] * (1 if use_reentrant else 2))


def test_keys_are_of_seed_step_layer_and_token() -> None:
    """Tokens are numbered sequence by sequence, so that they keep their keys when sequences are spread."""
    layer = build_circuit(cr.Between(1, 4), seed=7)
    megatron.begin_step(layer, 5, offset=100)
    with megatron.recorded_routings(layer) as routings:
        layer(hidden())
    token = 100 + torch.arange(B)[None, :] * S + torch.arange(S)[:, None]
    key = cr.random_key(7, 5, 1, token.view(-1))
    again = cr.route(routings[0].logits, routings[0].distribution.circuit, key=key)
    assert torch.equal(routings[0].mask, again.mask)
    megatron.begin_step(layer, 5, offset=100 + S)
    with megatron.recorded_routings(layer) as second:
        layer(hidden()[:, 1:].contiguous())
    assert torch.equal(second[0].mask, routings[0].mask.view(S, B, E)[:, 1])


def test_training_lowers_the_loss() -> None:
    layer = build_circuit(cr.Between(1, 4), moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    x, target = hidden(), torch.randn(S, B, H, generator=torch.Generator().manual_seed(2))
    losses = []
    for step in range(40):
        megatron.begin_step(layer, step)
        loss = (layer(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, r"moe_router_num_groups=4 .*cr.ActiveGroups"),
        ({"moe_expert_capacity_factor": 1.0}, r"moe_expert_capacity_factor=1.0 .*would drop experts"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, r"moe_router_load_balancing_type='sinkhorn'"),
        ({"moe_router_topk": 2}, r"moe_router_topk=2: .*Between\(1, 4\) allows up to 4; set it to 4"),
        ({"moe_token_dispatcher_type": "flex"}, r"'flex' sends exactly moe_router_topk=4 .*: use 'alltoall'"),
        (
            {"moe_token_dispatcher_type": "alltoall", "moe_permute_fusion": True},
            r"moe_permute_fusion=True with .*'alltoall' makes room for exactly .* set it to False",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_constraint_replaces_is_refused(settings: dict[str, Any], message: str) -> None:
    config = configuration()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        megatron.router(cr.Between(1, 4))(config=config, pg_collection=get_default_pg_collection())


@pytest.mark.parametrize(
    "name",
    ["moe_router_fusion", "moe_router_force_load_balancing", "moe_router_group_topk"],
)
def test_settings_without_a_meaning_are_refused(name: str) -> None:
    config = configuration()
    setattr(config, name, 1)
    with pytest.raises(ValueError, match=f"{name}=1 has no meaning under a constraint"):
        megatron.router(cr.Between(1, 4))(config=config, pg_collection=get_default_pg_collection())


def test_group_limits_of_one_count_suit_any_dispatcher() -> None:
    config = configuration(moe_token_dispatcher_type="flex")
    config.moe_permute_fusion = True  # which needs Transformer Engine
    rule = cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(4)
    router = megatron.router(rule)(config=config, pg_collection=get_default_pg_collection())
    router.set_layer_number(1)
    _, routing_map = router(hidden())
    assert (routing_map.view(T, 4, 2).any(-1).sum(-1) <= 2).all()
    assert (routing_map.sum(-1) == 4).all()


def test_a_seed_wants_steps() -> None:
    layer = build(megatron.router(cr.Between(1, 4), seed=0))
    with pytest.raises(RuntimeError, match=r"seed=0 was given, but no step has begun"):
        layer(hidden())


@pytest.mark.parametrize("decide", ["mode", 0.5, None])
def test_temperature_and_decide_are_those_of_route(decide: Any) -> None:
    layer = build(megatron.router(cr.Between(1, 4), seed=0, decide=decide, temperature=0.25))
    megatron.begin_step(layer, 0)
    with megatron.recorded_routings(layer) as routings:
        layer(hidden())
    (found,) = routings
    token = torch.arange(B)[None, :] * S + torch.arange(S)[:, None]
    key = cr.random_key(0, 0, 1, token.view(-1))
    expected = cr.route(found.logits, found.distribution.circuit, key=key, decide=decide, temperature=0.25)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.log_prob, expected.log_prob)
    assert found.temperature == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"decide": 2.0}, "decide=2.0: a share"),
        ({"decide": "mode", "estimator": "score"}, "decide='mode' with estimator='score'"),
    ],
)
def test_temperatures_and_shares_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(megatron.router(cr.Exactly(4), **options))


def test_a_circuit_stands_for_its_constraint_and_what_can_be_pickled_is() -> None:
    circuit = cr.compile(cr.ActiveGroups(cr.Groups(4), at_most=1) & cr.Exactly(2), 8)
    make = pickle.loads(pickle.dumps(megatron.router(circuit, seed=0)))
    layer = build(make, moe_router_topk=2, num_moe_experts=8)
    assert layer.router.decider.circuit.constraint == circuit.constraint
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"holds process groups .* save its state_dict\(\)"):
            copied(layer.router)
