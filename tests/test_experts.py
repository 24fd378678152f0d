"""Stacked experts against a list of modules with the same matrices, in value and in every gradient.

Legend: S rows, E experts, H hidden size, I inner size.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import circuitroute as cr
from circuitroute.layers import experts as experts_module

E, H, INNER = 4, 5, 7
LOADS = {
    "even": [3, 3, 3, 3],
    "uneven": [1, 6, 2, 4],
    "empty experts": [0, 5, 0, 2],
    "one": [0, 0, 7, 0],
    "nobody": [0, 0, 0, 0],
}


class SquaredReLU(nn.Module):
    """As Primer (So et al., 2021) defines it: x^2 where x is positive, else 0."""

    def forward(self, inner: Tensor) -> Tensor:
        return torch.where(inner > 0, inner * inner, torch.zeros_like(inner))


ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.GELU(),
    "relu": nn.ReLU(),
    "relu2": SquaredReLU(),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
}


class Perceptron(nn.Module):
    """An expert as anyone would write it."""

    def __init__(self, up: Tensor, down: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(H, INNER, False), nn.Linear(INNER, H, False), activation
        self.up.weight, self.down.weight = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(self.activation(self.up(rows)))


def stacked_of(activation: str = "gelu", dtype: torch.dtype = torch.float64) -> cr.StackedExperts:
    torch.manual_seed(0)
    return cr.StackedExperts(E, H, INNER, torch.tanh if activation == "tanh" else activation, dtype=dtype)


def list_of(stacked: cr.StackedExperts, activation: str = "gelu") -> nn.ModuleList:
    pairs = zip(stacked.up.detach(), stacked.down.detach(), strict=True)
    return nn.ModuleList(Perceptron(up, down, ACTIVATIONS[activation]) for up, down in pairs)


def rows_of(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_every_gradient_are_those_of_modules(loads: list[int], activation: str, dtype: torch.dtype) -> None:
    stacked = stacked_of(activation, dtype)
    modules = list_of(stacked, activation)
    rows = [rows_of(sum(loads), dtype).requires_grad_() for _ in range(2)]
    found = stacked(rows[0], loads)
    expected = torch.cat([module(part) for module, part in zip(modules, rows[1].split(loads), strict=True)])
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    torch.testing.assert_close(rows[0].grad, rows[1].grad)
    torch.testing.assert_close(stacked.up.grad, torch.stack([gradient_of(m.up.weight) for m in modules]))
    torch.testing.assert_close(stacked.down.grad, torch.stack([gradient_of(m.down.weight) for m in modules]))


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("activation", ["gelu", "relu2", "silu", "tanh"])
def test_gradcheck(loads: list[int], activation: str) -> None:
    stacked, rows = stacked_of(activation), rows_of(sum(loads)).requires_grad_()

    def run(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(stacked, {"up": up, "down": down}, (rows, loads))

    assert torch.autograd.gradcheck(run, (rows, stacked.up.detach().requires_grad_(), stacked.down.detach()))
    assert torch.autograd.gradcheck(run, (rows, stacked.up, stacked.down))


@pytest.mark.parametrize("needed", [("rows",), ("up",), ("down",), ("rows", "down"), ("up", "down")], ids=str)
def test_only_what_is_needed_gets_a_gradient(needed: tuple[str, ...]) -> None:
    stacked, rows = stacked_of(), rows_of(8)
    inputs = {"rows": rows, "up": stacked.up, "down": stacked.down}
    for name, value in inputs.items():
        value.requires_grad_(name in needed)
    stacked(rows, [2, 2, 2, 2]).sum().backward()
    assert {name for name, value in inputs.items() if value.grad is not None} == set(needed)


@pytest.mark.parametrize(
    ("needed", "kept"),
    [
        ((), []),
        (("rows",), [("up", E * INNER * H), ("down", E * H * INNER), ("inner", 8 * INNER)]),
        (("up",), [("rows", 8 * H), ("down", E * H * INNER), ("inner", 8 * INNER)]),
        (("down",), [("active", 8 * INNER)]),
        (("rows", "up"), [("rows", 8 * H), ("up", E * INNER * H), ("down", E * H * INNER), ("inner", 8 * INNER)]),
    ],
    ids=str,
)
def test_nothing_is_kept_for_what_is_frozen(needed: tuple[str, ...], kept: list[tuple[str, int]]) -> None:
    stacked, rows, sizes = stacked_of(), rows_of(8), list[int]()
    for name, value in {"rows": rows, "up": stacked.up, "down": stacked.down}.items():
        value.requires_grad_(name in needed)

    def pack(value: Tensor) -> Tensor:
        sizes.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        stacked(rows, [2, 2, 2, 2])
    assert sizes == [size for _, size in kept]


@pytest.mark.parametrize("activation", ["gelu", "relu", "relu2", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_name_has_the_gradient_that_autograd_gives_its_function(activation: str, dtype: torch.dtype) -> None:
    """To the bit, at 0 and far out too; twice, since nothing that is kept may be written over."""
    function = {"gelu": F.gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square(), "silu": F.silu}[activation]
    found = []
    for given in (activation, function):
        torch.manual_seed(0)
        stacked, rows = cr.StackedExperts(E, H, INNER, given, dtype=dtype), rows_of(8, dtype)
        rows[0], rows[1] = 0.0, 1e3 * rows[1]
        output = stacked(rows.requires_grad_(), [2, 2, 2, 2]).square().sum()
        gradients = [torch.autograd.grad(output, (rows, stacked.up, stacked.down), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        found.append(gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_state_dict_names_and_shapes() -> None:
    stacked = stacked_of()
    assert {name: tuple(value.shape) for name, value in stacked.state_dict().items()} == {
        "up": (E, INNER, H),
        "down": (E, H, INNER),
    }
    again = cr.StackedExperts(E, H, INNER, dtype=torch.float64)
    again.load_state_dict(stacked.state_dict())
    assert torch.equal(again(rows_of(4), [1, 1, 1, 1]), stacked(rows_of(4), [1, 1, 1, 1]))
    assert float(stacked.up.detach().abs().max()) <= H**-0.5  # as torch.nn.Linear draws it
    assert float(stacked.down.detach().abs().max()) <= INNER**-0.5
    assert repr(stacked) == "StackedExperts(num_experts=4, hidden_size=5, inner_size=7, activation='gelu')"
    assert copy.deepcopy(stacked)(rows_of(1), [0, 0, 0, 1]).shape == (1, H)


@pytest.mark.parametrize("loads", [LOADS["uneven"], LOADS["empty experts"]], ids=str)
def test_autocast_is_that_of_linear_layers(loads: list[int]) -> None:
    stacked = stacked_of(dtype=torch.float32)
    modules = list_of(stacked)
    rows = [rows_of(sum(loads), torch.float32).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        found = stacked(rows[0], loads)
        expected = torch.cat([module(part) for module, part in zip(modules, rows[1].split(loads), strict=True)])
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.float().square().sum().backward()
    assert rows[0].grad.dtype == stacked.up.grad.dtype == stacked.down.grad.dtype == torch.float32
    rounding = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(rows[0].grad, rows[1].grad, **rounding)
    torch.testing.assert_close(stacked.up.grad, torch.stack([gradient_of(m.up.weight) for m in modules]), **rounding)
    torch.testing.assert_close(
        stacked.down.grad, torch.stack([gradient_of(m.down.weight) for m in modules]), **rounding
    )


def test_float64_stays_float64_under_autocast() -> None:
    """As that of linear layers does."""
    stacked, rows = stacked_of(), rows_of(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = stacked(rows, [1, 1, 1, 1])
    assert torch.equal(found, stacked(rows, [1, 1, 1, 1]))


@pytest.mark.parametrize("constraint", [cr.Exactly(1), cr.Exactly(2), cr.Between(0, 2), cr.Exactly(E)], ids=repr)
@pytest.mark.parametrize("tokens", [13, 1, 0])
@pytest.mark.parametrize("probes", [0, 1, "all"])
def test_a_layer_of_either_kind_is_the_same(constraint: cr.Constraint, tokens: int, probes: Any) -> None:
    stacked = stacked_of()
    layers = [cr.MoE(cr.Router(H, E, constraint).double(), experts, probes) for experts in (stacked, list_of(stacked))]
    layers[1].router.load_state_dict(layers[0].router.state_dict())
    hidden = [rows_of(tokens).requires_grad_() for _ in layers]
    outputs = []
    for layer, x in zip(layers, hidden, strict=True):
        output, routing = layer(x, key=cr.random_key(0, torch.arange(tokens)))
        output.square().sum().backward()
        outputs.append((output, routing.mask))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad)
    torch.testing.assert_close(layers[0].router.weight.grad, layers[1].router.weight.grad)
    for name in ("up", "down"):
        each = torch.stack([gradient_of(getattr(module, name).weight) for module in layers[1].experts])
        torch.testing.assert_close(getattr(stacked, name).grad, each)
    assert sorted(layers[0].state_dict()) == ["experts.down", "experts.up", "router.weight"]


def test_the_number_of_experts_must_be_the_routers() -> None:
    with pytest.raises(ValueError, match="there are 4 experts, but the router chooses among 5"):
        cr.MoE(cr.ExactKRouter(H, 5, 2), stacked_of())


def test_an_activation_may_be_a_function() -> None:
    stacked = cr.StackedExperts(E, H, INNER, F.mish)
    stacked(rows_of(4, torch.float32), [1, 1, 1, 1]).sum().backward()
    assert bool(stacked.up.grad.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, H, INNER), "num_experts=0: must be at least 1"),
        ((E, 0, INNER), "hidden_size=0: must be at least 1"),
        ((E, H, 0), "inner_size=0: must be at least 1"),
        ((E, H, INNER, "swish"), "activation='swish': choose one of gelu, relu, relu2, silu, or give a function"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cr.StackedExperts(*arguments)


@pytest.mark.parametrize("loads", [[1, 1, 1], [1, 1, 1, 2], [4, -1, 0, 1]])
def test_loads_that_do_not_fit_are_refused(loads: list[int]) -> None:
    with pytest.raises(ValueError, match=r"loads=.*: expected 4 numbers of rows that add up to 4"):
        stacked_of()(rows_of(4), loads)


# ---------------------------------------------------------------------------------------------- the kernel of torch

needs_the_kernel = pytest.mark.skipif(experts_module._GROUPED_MM is None, reason="torch has no grouped_mm")


class Counted:
    """torch's kernel, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.kernel: Any = experts_module._GROUPED_MM

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        return self.kernel(*arguments, **options)


def parts_of(stacked: cr.StackedExperts, rows: Tensor, loads: list[int], upstream: Tensor) -> list[Tensor]:
    leaf = rows.clone().requires_grad_()
    output = stacked(leaf, loads)
    return [output, *torch.autograd.grad(output, (leaf, stacked.up, stacked.down), upstream)]


@needs_the_kernel
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
@pytest.mark.parametrize("expanded", [False, True])
def test_one_call_gives_what_a_product_per_expert_gives(
    loads: list[int], dtype: torch.dtype, activation: str, expanded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    stacked = cr.StackedExperts(E, 16, 8, torch.tanh if activation == "tanh" else activation, dtype=dtype)
    rows = torch.randn(sum(loads), 16, dtype=dtype)
    upstream = torch.ones(1, 1, dtype=dtype).expand(rows.shape) if expanded else torch.randn(rows.shape, dtype=dtype)
    counted = Counted()
    monkeypatch.setattr(experts_module, "_GROUPED_MM", counted)
    found = parts_of(stacked, rows, loads, upstream)
    assert counted.calls == (6 if sum(loads) else 0), "two forward, two for rows, two for matrices"
    monkeypatch.setattr(experts_module, "_GROUPED_MM", None)
    for ours, wanted in zip(found, parts_of(stacked, rows, loads, upstream), strict=True):
        torch.testing.assert_close(ours, wanted)


@needs_the_kernel
@pytest.mark.parametrize(
    ("hidden", "inner", "dtype", "calls"),
    [
        (16, 8, torch.float32, 5),
        (16, 8, torch.float64, 0),  # a dtype that it does not have
        (16, 4, torch.float32, 5),
        (16, 4, torch.bfloat16, 0),  # rows of 8 bytes
        (6, 8, torch.float32, 0),
    ],
)
def test_the_kernel_is_used_where_it_can(
    hidden: int, inner: int, dtype: torch.dtype, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted()
    monkeypatch.setattr(experts_module, "_GROUPED_MM", counted)
    stacked, rows = cr.StackedExperts(E, hidden, inner, dtype=dtype), torch.randn(8, hidden, dtype=dtype)
    stacked(rows, [2, 2, 2, 2]).sum().backward()
    assert counted.calls == calls  # forward, for the matrices and for what is between them
    with torch.autocast("cpu", torch.bfloat16):  # which decides by the dtype that is computed in
        assert stacked(rows, [2, 2, 2, 2]).dtype == (dtype if dtype == torch.float64 else torch.bfloat16)


@needs_the_kernel
def test_parameters_that_start_anywhere_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that are mapped from a file do."""
    stacked, rows = cr.StackedExperts(E, 16, 8), torch.randn(8, 16)
    expected = stacked(rows, [2, 2, 2, 2])
    moved = torch.empty(stacked.up.numel() + 1)[1:].view_as(stacked.up).copy_(stacked.up.detach())
    assert moved.data_ptr() % experts_module.ALIGNMENT
    stacked.up = nn.Parameter(moved)
    counted = Counted()
    monkeypatch.setattr(experts_module, "_GROUPED_MM", counted)
    torch.testing.assert_close(stacked(rows, [2, 2, 2, 2]), expected)
    assert counted.calls == 1, "only the second layer's matrices are where the kernel wants them"


def test_shapes_alone_go_through() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        stacked, rows = cr.StackedExperts(E, 16, 8), torch.randn(8, 16, requires_grad=True)
        assert stacked(rows, [2, 2, 2, 2]).shape == (8, 16)
    meta = cr.StackedExperts(E, 16, 8, device="meta")
    assert meta(torch.empty(8, 16, device="meta"), [2, 2, 2, 2]).shape == (8, 16)


# Of the compiler: about where it breaks the graph, and about itself.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_compiled_layers_are_those_of_eager_ones(dtype: torch.dtype) -> None:
    """With sizes that the kernel takes, which traced programs may not know it with."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = cr.MoE(cr.ExactKRouter(16, E, 2), cr.StackedExperts(E, 16, 8, dtype=dtype))
    compiled = torch.compile(layer, backend="aot_eager")
    key, rows = cr.random_key(0, torch.arange(8)), torch.randn(8, 16, dtype=dtype)
    results = []
    for run in (layer, compiled):
        leaf = rows.clone().requires_grad_()
        output, _ = run(leaf, key=key)
        output.square().sum().backward()
        results.append([output, leaf.grad])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)
    torch.compiler.reset()
