"""In torchtitan's mixture-of-experts layers: the contract, the weights, the load counters and the keys.

torchtitan's experts compute in bfloat16; these tests put float32 loops in their place, and leave the router, the
dispatcher and the layer as they are.
"""

from __future__ import annotations

import copy
import pickle
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import circuitroute as cr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip(
        "torchtitan.models.common.moe",
        reason="torchtitan and what it imports: pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3; "
        "pip install tyro",
        exc_type=ImportError,
    )
    from torchtitan.config.override import OverrideConfig, apply_overrides, override
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    from torchtitan.protocols.module import Module, ModuleList

    from circuitroute.integrations import torchtitan

# torchtitan's own router warns on CPUs, whose autocast has no float32.
pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore:In CPU autocast")]

B, L, D, E, HIDDEN = 2, 12, 16, 8, 24


class LoopedExperts(GroupedExperts):
    """The same function in the dtype of its input, expert by expert."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        batches = x_RD.split(num_tokens_per_expert_E.tolist())
        return torch.cat([self.expert(e, batch) for e, batch in enumerate(batches)])

    def expert(self, e: int, x: Tensor) -> Tensor:
        gated = torch.nn.functional.silu(x @ self.w1_EFD[e].T) * (x @ self.w3_EFD[e].T)
        return gated @ self.w2_EDF[e].T


def layer_config(top_k: int = 2, load_balance_coeff: float | None = 1e-3, **router: Any) -> Any:
    gate = Linear.Config(in_features=D, out_features=E)
    return MoE.Config(
        num_experts=E,
        router=TokenChoiceTopKRouter.Config(num_experts=E, gate=gate, top_k=top_k, **router),
        routed_experts=RoutedExperts.Config(
            inner_experts=LoopedExperts.Config(dim=D, hidden_dim=HIDDEN, num_experts=E),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=top_k),
        ),
        load_balance_coeff=load_balance_coeff,
    )


class Stack(Module):
    """Layers one after the other, with residuals: as much of a model as these tests need."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        layers: list[Any]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = ModuleList(layer.build() for layer in config.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def build(config: Any) -> Any:
    layer = config.build()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def build_circuit(constraint: cr.Constraint, seed: int | None = 0, **router: Any) -> Any:
    layer = build(torchtitan.circuit_moe(layer_config(**router), constraint, seed=seed))
    torchtitan.begin_step(layer, 0)
    return layer


def hidden(requires_grad: bool = False) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


def dense(layer: Any, x_BLD: Tensor, gates_TE: Tensor) -> Tensor:
    """All experts on all tokens, weighted by the gates."""
    experts = layer.routed_experts.inner_experts
    outputs = torch.stack([experts.expert(e, x_BLD.flatten(0, 1)) for e in range(E)], 1)
    return (outputs * gates_TE[..., None]).sum(1).view_as(x_BLD)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("route_norm", [False, True])
def test_in_evaluation_exactly_k_is_the_stock_router(score_func: str, route_norm: bool) -> None:
    settings = {"score_func": score_func, "route_norm": route_norm, "route_scale": 2.5}
    stock = build(layer_config(3, **settings)).eval()
    ours = build(torchtitan.circuit_moe(layer_config(3, **settings), cr.Exactly(3))).eval()
    assert set(stock.state_dict()) == set(ours.state_dict())
    x = hidden()
    expected, ids, scores = stock.router(x)
    weights, own_ids, own_scores = ours.router(x)
    torch.testing.assert_close(own_scores, scores)
    dense_of = [torch.zeros(B, L, E).scatter(-1, i, w) for w, i in ((weights, own_ids), (expected, ids))]
    torch.testing.assert_close(*dense_of)
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4), cr.Between(0, 3)], ids=repr)
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_layer_and_gradients_are_those_of_a_dense_layer(constraint: cr.Constraint, score_func: str) -> None:
    layer = build_circuit(constraint, score_func=score_func, route_norm=True)
    x = hidden(requires_grad=True)
    with torchtitan.recorded_routings(layer) as routings:
        output = layer(x)
    (routing,) = routings
    reference = dense(
        layer, x, torch.where(routing.mask, routing.gates, 0.0)
    )  # what no expert computes has no gradient
    torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-5)
    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
    for own, wanted in zip(found, torch.autograd.grad(reference, inputs, upstream), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)
    assert layer.router.gate.weight.grad is None
    assert found[1].abs().sum() > 0


def test_ids_are_distinct_experts_and_unused_slots_weigh_nothing() -> None:
    layer = build_circuit(cr.Between(1, 4))
    with torchtitan.recorded_routings(layer) as routings:
        weights, ids, scores = layer.router(hidden())
    assert weights.shape == ids.shape == (B, L, 4)
    assert scores.shape == (B, L, E)
    assert weights.dtype == scores.dtype == torch.float32
    assert ids.min() >= 0
    assert ids.max() < E
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    used = torch.zeros(B, L, E).scatter(-1, ids, (weights > 0).float()).flatten(0, 1)
    assert torch.equal(used.bool(), routings[0].mask)


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4), cr.Between(0, 3)], ids=repr)
def test_the_load_counter_sees_the_sampled_set(constraint: cr.Constraint) -> None:
    """Also where a chosen expert's weight underflows."""
    layer = build_circuit(constraint)
    for scale in (1.0, 300.0):
        layer.tokens_per_expert_E.zero_()
        with torchtitan.recorded_routings(layer) as routings:
            layer(hidden() * scale)
        assert torch.equal(layer.tokens_per_expert_E, routings[0].mask.sum(0).float())
    layer.eval()
    layer(hidden())
    assert torch.equal(layer.tokens_per_expert_E, routings[0].mask.sum(0).float()), "evaluation does not count"


def test_the_expert_bias_shifts_the_choice_and_no_weights() -> None:
    layer = build_circuit(cr.Exactly(2)).eval()
    x = hidden()
    layer.expert_bias_E[5] = 50.0
    weights, ids, scores = layer.router(x, layer.expert_bias_E)
    assert (ids == 5).any(-1).all()
    torch.testing.assert_close(weights, scores.gather(-1, ids))
    layer.train()
    with torchtitan.recorded_routings(layer) as routings:
        layer(x)
    torch.testing.assert_close(routings[0].marginals[:, 5], torch.ones(B * L))


@pytest.mark.parametrize("seed", [0, None])
def test_checkpointing_decides_the_same(seed: int | None) -> None:
    """Without a seed torch's generator has to be restored; the counters count twice, as torchtitan knows."""
    gradients = []
    for recompute in (False, True):
        layer = build_circuit(cr.Between(1, 4), seed=seed)
        torch.manual_seed(3)
        x = hidden(requires_grad=True)
        with torchtitan.recorded_routings(layer) as routings:
            if recompute:
                output = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=seed is None)
            else:
                output = layer(x)
        loss = output.square().mean() + cr.losses.load_balance(routings[0])
        loss.backward()
        gradients.append([x.grad, *[parameter.grad for parameter in layer.parameters()]])
        assert torch.equal(layer.tokens_per_expert_E, (1 + recompute) * routings[0].mask.sum(0).float())
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_keys_are_of_seed_step_layer_and_token() -> None:
    config = Stack.Config(layers=[layer_config(), layer_config()])
    assert torchtitan.convert(config, cr.Between(1, 4), seed=7) == 2
    model = build(config)
    torchtitan.begin_step(model, 5, offset=100)
    with torchtitan.recorded_routings(model) as routings:
        model(hidden())
    for number, routing in enumerate(routings):
        key = cr.random_key(7, 5, number, 100 + torch.arange(B * L))
        again = cr.route(routing.logits, routing.distribution.circuit, key=key)
        assert torch.equal(routing.mask, again.mask)
    torchtitan.begin_step(model, 5, offset=100 + L)
    with torchtitan.recorded_routings(model) as second_half:
        model(hidden()[1:])
    assert torch.equal(second_half[0].mask, routings[0].mask[L:])
    torchtitan.begin_step(model, 6, offset=100)
    with torchtitan.recorded_routings(model) as later:
        model(hidden())
    assert not torch.equal(later[0].mask, routings[0].mask)


def test_models_are_built_on_the_meta_device_first() -> None:
    config = Stack.Config(layers=[layer_config(), layer_config()])
    rules = [cr.Between(1, 3), cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3)]
    torchtitan.convert(config, rules, seed=0)
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for layer in model.layers:
        layer._init_self_buffers()
        layer.expert_bias_E.zero_()
    torchtitan.begin_step(model, 0)
    with torchtitan.recorded_routings(model) as routings:
        model(hidden()).sum().backward()
    for routing, rule in zip(routings, rules, strict=True):
        assert cr.compile(rule, E).satisfies(routing.mask).all()
    assert [layer.router.decider.fixed_count for layer in model.layers] == [False, True]
    for layer, routing in zip(model.layers, routings, strict=True):
        assert torch.equal(layer.tokens_per_expert_E, routing.mask.sum(0).float())


def test_a_model_of_torchtitan_converts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchtitan.models.qwen3 import qwen3_configs
    config = qwen3_configs["debugmodel_moe"](attn_backend="flex", moe_comm_backend="standard")
    config.layers = config.layers[:2]
    stock = set(self_names(config))
    assert torchtitan.convert(config, cr.Between(2, 8), seed=0) == 2
    with torch.device("meta"):
        model = config.build()
    assert set(model.state_dict()) == stock
    routers = [module for module in model.modules() if isinstance(module, torchtitan.CircuitRouter)]
    assert [router.top_k for router in routers] == [8, 8]


def self_names(config: Any) -> list[str]:
    with torch.device("meta"):
        return list(config.build().state_dict())


@override(target=MoE.Config)
def between_one_and_four(config: Any) -> Any:
    """What a user names in ``--override.imports``."""
    return torchtitan.circuit_moe(config, cr.Between(1, 4), seed=0)


def test_an_override_may_do_it() -> None:
    config = Stack.Config(layers=[layer_config()])
    apply_overrides(OverrideConfig(imports=[f"{__name__}.between_one_and_four"]), config)
    assert isinstance(config.layers[0].build().router, torchtitan.CircuitRouter)


def test_autocast_leaves_the_decision_in_float32() -> None:
    layer = build_circuit(cr.Between(1, 4))
    with torch.autocast("cpu", torch.bfloat16), torchtitan.recorded_routings(layer) as inside:
        layer.router(hidden())
    with torchtitan.recorded_routings(layer) as outside:
        layer.router(hidden())
    assert torch.equal(inside[0].mask, outside[0].mask)
    assert torch.equal(inside[0].gates, outside[0].gates)


# ------------------------------------------------------------------------------------------------ refusals


def test_a_seed_wants_steps() -> None:
    layer = build(torchtitan.circuit_moe(layer_config(), cr.Between(1, 4), seed=0))
    with pytest.raises(RuntimeError, match=r"seed=0 was given, but no step has begun.*begin_step"):
        layer(hidden())
    layer.eval()
    layer(hidden())
    with pytest.raises(ValueError, match=r"has no router of circuitroute.integrations"):
        torchtitan.begin_step(build(layer_config()), 0)
    with pytest.raises(TypeError, match=r"offset=0.5"):
        torchtitan.begin_step(layer, 0, offset=0.5)  # type: ignore[arg-type]


def test_what_the_constraint_replaces_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_expert_groups=4.*cr.ActiveGroups"):
        torchtitan.circuit_moe(layer_config(num_expert_groups=4, num_limited_groups=2), cr.Exactly(2))
    with pytest.raises(ValueError, match="_debug_force_load_balance=True"):
        torchtitan.circuit_moe(layer_config(_debug_force_load_balance=True), cr.Exactly(2))


def test_bad_arguments_are_refused_before_anything_is_built() -> None:
    with pytest.raises(TypeError, match=r"config is a .*Linear.Config"):
        torchtitan.circuit_moe(Linear.Config(in_features=1, out_features=1), cr.Exactly(2))
    with pytest.raises(TypeError, match=r"constraint=2: int is not a constraint"):
        torchtitan.circuit_moe(layer_config(), 2)  # type: ignore[arg-type]
    with pytest.raises(cr.InfeasibleError):
        torchtitan.circuit_moe(layer_config(), cr.Exactly(E + 1))
    with pytest.raises(ValueError, match="constraint has 1 entries, but the model has 2 mixture-of-experts layers"):
        torchtitan.convert(Stack.Config(layers=[layer_config(), layer_config()]), [cr.Exactly(2)])
    with pytest.raises(ValueError, match="no mixture-of-experts layer"):
        torchtitan.convert(Stack.Config(layers=[]), cr.Exactly(2))
    with pytest.raises(ValueError, match=r"is the layer '' itself: use circuit_moe"):
        torchtitan.convert(layer_config(), cr.Exactly(2))


def test_sharded_logits_are_refused() -> None:
    layer = build_circuit(cr.Between(1, 4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        layer.router.gate.register_forward_hook(lambda gate, args, logits: DTensor.from_local(logits, mesh, [Shard(1)]))
        with pytest.raises(TypeError, match=r"the gate returned a DTensor .*Shard\(dim=1\).*not supported"):
            layer(hidden())
    finally:
        dist.destroy_process_group()


def test_a_width_that_does_not_fit_is_refused() -> None:
    config = torchtitan.circuit_moe(layer_config(), cr.Between(1, 4))
    config.router.top_k = 2
    with pytest.raises(ValueError, match=r"top_k=2: Between\(1, 4\) with probes=0 needs 4 slots"):
        config.build()


def test_the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "torchtitan.md"
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```py\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    scope: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(textwrap.dedent(block), str(page), "exec", dont_inherit=True), scope)


@pytest.mark.parametrize("decide", ["mode", 0.5, None])
def test_temperature_and_decide_are_those_of_route(decide: Any) -> None:
    layer = build(torchtitan.circuit_moe(layer_config(), cr.Between(1, 4), seed=0, decide=decide, temperature=0.25))
    torchtitan.begin_step(layer, 0)
    with torchtitan.recorded_routings(layer) as routings:
        layer(hidden())
    (found,) = routings
    key = cr.random_key(0, 0, 0, torch.arange(B * L))
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
        torchtitan.circuit_moe(layer_config(), cr.Exactly(2), **options)


@pytest.mark.parametrize("probes", [0, 1])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_configs_and_layers_of_circuits_are_copied(way: Any, probes: int) -> None:
    """Their classes have no names, and their hooks belong to the layer; a circuit stands for its constraint."""
    circuit = cr.compile(cr.ActiveGroups(cr.Groups(4), at_most=1) & cr.Between(1, 2), E)
    config = way(torchtitan.circuit_moe(layer_config(), circuit, seed=1, probes=probes))
    layer = config.build().train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert layer.router.decider.circuit.counts is None
    torchtitan.begin_step(layer, 3)
    twin, x = way(layer), torch.randn(B, L, D)
    assert torch.equal(twin(x), layer(x))
    assert all(hook.__self__ is twin for hook in twin.router._forward_hooks.values())
    with pytest.raises(ValueError, match="it is over 8 variables, and there are to be n=4"):
        torchtitan.CircuitRouter.Config(num_experts=4, gate=config.router.gate, top_k=2, constraint=circuit).build()
