"""torchtitan's layers without work for unused slots: the same layer, load and gradients, on fewer rows.

Shapes: B sequences, L positions, D dimensions, E experts.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import circuitroute as cr
from tests.integrations.test_torchtitan import B, E, L, Stack, build, hidden, layer_config, torchtitan

token_dispatcher = pytest.importorskip("torchtitan.models.common.token_dispatcher", exc_type=ImportError)

pytestmark = pytest.mark.integrations

RULES = [cr.Between(1, 4), cr.Between(0, 3), cr.AtMost(E), cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Between(1, 4)]


def build_padded(constraint: cr.Constraint, padding: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = torchtitan.circuit_moe(layer_config(route_norm=True), constraint, seed=0, padding=padding, **options)
    layer = build(config).to(dtype)
    torchtitan.begin_step(layer, 0)
    return layer


def rows_of(layer: Any) -> list[int]:
    """Grows by what the experts are handed in each forward pass."""
    rows: list[int] = []
    layer.routed_experts.inner_experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


def step(layer: Any, x: Tensor) -> tuple[cr.Routing, list[Tensor]]:
    """The decision, and the output, its gradients and the load."""
    x = x.detach().requires_grad_()
    with torchtitan.recorded_routings(layer) as routings:
        output = layer(x)
    gradients = torch.autograd.grad(output.square().mean(), [x, *layer.parameters()])
    return routings[0], [output, *gradients, layer.tokens_per_expert_E]


@pytest.mark.parametrize("probes", [0, 1, "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("constraint", RULES, ids=repr)
def test_without_unused_slots_the_layer_is_the_same(constraint: cr.Constraint, dtype: torch.dtype, probes: Any) -> None:
    found = []
    for padding in ("distinct", "ragged"):
        layer = build_padded(constraint, padding, dtype, probes=probes)
        rows = rows_of(layer)
        routing, values = step(layer, hidden().to(dtype))
        found.append(values)
        if padding == "ragged" and not probes:
            assert rows == [int(routing.mask.sum())]
        elif padding == "ragged" and probes == "all":
            assert rows == [B * L * E]
        elif padding == "ragged":
            free = torch.where(routing.mask, 0.0, routing.marginals) > 0
            assert rows == [int(routing.mask.sum()) + int(free.any(-1).sum())]
        assert torch.equal(layer.tokens_per_expert_E, routing.mask.sum(0).to(dtype))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-10}[dtype]
    for padded, ragged in zip(*found, strict=True):
        torch.testing.assert_close(ragged, padded, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("constraint", RULES, ids=repr)
def test_evaluation_runs_what_the_mode_chose(constraint: cr.Constraint) -> None:
    outputs = []
    for padding in ("distinct", "auto"):
        layer = build_padded(constraint, padding).eval()
        rows = rows_of(layer)
        with torchtitan.recorded_routings(layer) as routings, torch.no_grad():
            outputs.append(layer(hidden()))
        if padding == "auto":
            assert rows == [int(routings[0].mask.sum())]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


def test_tokens_without_any_expert_get_nothing() -> None:
    """Also where the whole batch is of such tokens. (Where there is none at all, torchtitan's layer fails.)"""
    layer = build_padded(cr.AtMost(2), "auto").eval()
    rows = rows_of(layer)
    with torch.no_grad():
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[:, 0] = -1.0
    x = hidden().detach()
    x[..., 0] = 1.0
    x[0, 3, 0] = -1.0
    assert [int(count) for count in (layer(x) != 0).any(-1).sum(1)] == [1, 0]
    assert not layer(x[1:]).any()
    assert layer.router(x[:, :0])[0].shape == (B, 0, 2)
    assert rows == [2, 0]
    x = x[1:].requires_grad_()
    layer(x).sum().backward()
    assert not x.grad.any()


def test_rows_without_a_number_are_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is validated, NaN passes through the experts rather than becoming a token that needs none."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    for padding in ("distinct", "ragged"):
        layer = build_padded(cr.Between(0, 4), padding)
        x = hidden().detach()
        x[0, 2, 5] = torch.nan
        x[1, 4, 0] = torch.inf
        with torchtitan.recorded_routings(layer) as routings:
            output = layer(x)
        bad = torch.zeros(B, L, dtype=torch.bool)
        bad[0, 2] = bad[1, 4] = True
        assert torch.equal(output.isnan().any(-1), bad)
        assert torch.equal(layer.tokens_per_expert_E, routings[0].mask.sum(0).float())


def test_compiled_programs_compute_all_slots() -> None:
    """Their shapes are to depend on no value; the layer is the same, and one graph."""
    layer = build_padded(cr.Between(1, 4), "auto")
    plain = step(layer, hidden())[1]
    layer.tokens_per_expert_E.zero_()
    torch._dynamo.reset()
    seen = []
    layer.routed_experts.inner_experts.forward = lambda x, counts: seen.append(x.shape[0]) or x * 2.0
    expected = layer(hidden())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden()), expected)
    assert seen[0] < seen[-1] == B * L * 4
    assert plain[0].shape == expected.shape


def test_traced_programs_and_tensors_without_numbers_have_all_slots() -> None:
    layer, x = build_padded(cr.Between(1, 4), "auto"), hidden()
    # The experts' loop reads counts; here they are one map.
    layer.routed_experts.inner_experts.forward = lambda x, counts: x * 2.0
    rows = rows_of(layer)
    recorded = make_fx(layer)(x)
    assert rows == [B * L * 4]
    torch.testing.assert_close(recorded(x + 1.0), layer(x + 1.0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == x.shape
    assert layer.to("meta")(x.to("meta")).shape == x.shape
    assert rows[2:] == [B * L * 4] * 2
    assert rows[1] < rows[0]


def test_dispatchers_are_kept_where_nothing_can_be_left_out() -> None:
    local = token_dispatcher.LocalTokenDispatcher
    for constraint, options, kept in (
        (cr.Exactly(2), {}, True),
        (cr.Exactly(2), {"probes": 1}, False),
        (cr.Between(1, 2), {}, False),
        (cr.Between(1, 2), {"padding": "distinct"}, True),
    ):
        dispatcher = build_padded(constraint, **{"padding": "auto", **options}).routed_experts.token_dispatcher
        assert (type(dispatcher) is local) == kept
        assert isinstance(dispatcher, local)


class OwnDispatcher(token_dispatcher.LocalTokenDispatcher):
    """One that gathers rows in its own way."""

    @dataclass(kw_only=True, slots=True)
    class Config(token_dispatcher.LocalTokenDispatcher.Config):
        pass

    def dispatch(self, x_TD: Tensor, scores_TK: Tensor, ids_TK: Tensor, counts_E: Tensor) -> Any:
        order = ids_TK.flatten().argsort(stable=True)
        token = order // scores_TK.shape[-1]
        metadata = token_dispatcher.LocalDispatchMetadata(
            token_indices_experts_sorted_N=token, topk_scores_experts_sorted_N=scores_TK.flatten()[order]
        )
        return x_TD[token], counts_E, metadata


class NamedDispatcher(token_dispatcher.AllToAllTokenDispatcher):
    """One that dispatches as torchtitan's does."""

    @dataclass(kw_only=True, slots=True)
    class Config(token_dispatcher.AllToAllTokenDispatcher.Config):
        pass


def test_dispatchers_that_nobody_knows_compute_all_slots() -> None:
    config = layer_config()
    config.routed_experts.token_dispatcher = OwnDispatcher.Config(num_experts=E, top_k=2)
    layer = build(torchtitan.circuit_moe(config, cr.Between(1, 4), seed=0))
    assert type(layer.routed_experts.token_dispatcher) is OwnDispatcher
    torchtitan.begin_step(layer, 0)
    rows = rows_of(layer)
    known = build_padded(cr.Between(1, 4), "ragged")
    known.router.route_norm = False
    torch.testing.assert_close(layer(hidden()), known(hidden()))
    assert rows == [B * L * 4]
    with pytest.raises(ValueError, match=r"padding='ragged': OwnDispatcher dispatches in its own way.*'distinct'"):
        torchtitan.circuit_moe(config, cr.Between(1, 4), padding="ragged")
    config.routed_experts.token_dispatcher = NamedDispatcher.Config(num_experts=E, top_k=2)
    layer = build(torchtitan.circuit_moe(config, cr.Between(1, 4), padding="ragged"))
    assert type(layer.routed_experts.token_dispatcher).__name__ == "RaggedNamedDispatcher"
    rows = rows_of(layer)
    with torchtitan.recorded_routings(layer) as routings:
        layer(hidden())
    assert rows == [int(routings[0].mask.sum())]


@pytest.mark.parametrize("padding", ["auto", "distinct", "ragged"])
def test_a_config_may_be_converted_again(padding: Any) -> None:
    """It becomes what converting the stock config makes of it, whatever it was before."""
    first = torchtitan.circuit_moe(layer_config(), cr.Between(1, 3), seed=9, probes=1, temperature=0.5, decide="mode")
    again = torchtitan.circuit_moe(first, cr.Between(1, 4), padding=padding)
    direct = torchtitan.circuit_moe(layer_config(), cr.Between(1, 4), padding=padding)
    assert again == direct
    assert type(again) is type(direct)
    layer = build(again)
    rows = rows_of(layer)
    with torchtitan.recorded_routings(layer) as routings:
        layer(hidden())
    assert torch.equal(layer.tokens_per_expert_E, routings[0].mask.sum(0).float())
    assert rows == [B * L * 4 if padding == "distinct" else int(routings[0].mask.sum())]


@pytest.mark.parametrize("padding", ["sentinel", None, 1])
def test_unknown_paddings_are_refused(padding: Any) -> None:
    with pytest.raises(ValueError, match=f"padding={padding!r}: choose one of 'auto', 'distinct', 'ragged'"):
        torchtitan.circuit_moe(layer_config(), cr.Between(1, 2), padding=padding)
    config = Stack.Config(layers=[layer_config()])
    with pytest.raises(ValueError, match="padding="):
        torchtitan.convert(config, cr.Between(1, 2), padding=padding)
    assert type(config.layers[0]) is type(layer_config())


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_dispatchers_and_their_configs_are_copied(way: Any) -> None:
    config = way(torchtitan.circuit_moe(layer_config(), cr.Between(1, 4), padding="ragged"))
    dispatcher = way(config.routed_experts.token_dispatcher.build())
    assert (dispatcher.num_experts, dispatcher.top_k) == (E, 4)
    scores = torch.tensor([[0.5, -0.0], [0.25, 0.75]])
    rows, counts, metadata = dispatcher.dispatch(
        torch.eye(2), scores, torch.tensor([[3, 1], [0, 3]]), torch.tensor([1, 1, 0, 2, 0, 0, 0, 0])
    )
    assert counts.tolist() == [1, 0, 0, 2, 0, 0, 0, 0]
    assert metadata.token_indices_experts_sorted_N.tolist() == [1, 0, 1]
    assert metadata.topk_scores_experts_sorted_N.tolist() == [0.25, 0.5, 0.75]
    assert torch.equal(rows, torch.eye(2)[[1, 0, 1]])
