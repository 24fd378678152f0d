"""State that survives every way of building a module, and every way of copying an object.

Modules are made on the meta device, emptied, filled and cast in the ways of PyTorch and of those who build on it, and
must decide as a module that was made in the plain way. Shapes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import circuitroute as cr
from circuitroute import compilation
from circuitroute.engines.layered import NaiveLayered, NumbaLayered, TorchLayered, evaluated
from circuitroute.engines.tables import Tables, lasting
from circuitroute.integrations import serving
from circuitroute.integrations.hosted import Decider

T, H, E, L = 40, 6, 8, 3
VARIABLES = cr.variables(E)
COMPOSED = cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3)
IMPLIED = cr.Logic(VARIABLES[0] >> VARIABLES[1]) & cr.AtMost(4)


@dataclass(frozen=True)
class Even(cr.Constraint):
    """A constraint of a user's own."""

    def leaf(self, var):
        return 0, 1

    def merge(self, left, right):
        return (left + right) % 2

    def accepts(self, state):
        return state == 0


def hidden_of(seed: int = 1) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed), device="cpu")


def keys_of(*indices: int) -> Tensor:
    return cr.random_key(0, *indices, torch.arange(T, device="cpu"))


def budget_router(**options: Any) -> cr.BudgetRouter:
    return cr.BudgetRouter(H, E, L, [cr.Between(1, 3), cr.CountIn({0, 2}), cr.Exactly(1)], cr.Between(2, 5), **options)


def learned(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, device="cpu"))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "budget router": budget_router,
    "budget router, per token": lambda: budget_router(per_token=True, temperature=learned(0.5)),
    "budget": lambda: cr.Budget(E, L, cr.Between(1, 3), cr.AtMost(4)),
    "router": lambda: cr.DynamicKRouter(H, E, 1, 3, bias=True),
    "router, learned temperature": lambda: cr.Router(H, E, cr.Between(1, 3), temperature=learned(0.25)),
    "router, composed": lambda: cr.Router(H, E, COMPOSED),
    "soft router": lambda: cr.SoftTopKRouter(H, E, 2.5, torch.tensor(0.5, device="cpu"), threshold=0.3),
    "soft router, learned alpha": lambda: cr.SoftTopKRouter.softmoe(H, E, 2.5, 1.5, learned(0.7)),
    "stacked experts": lambda: cr.MoE(cr.TopKRouter(H, E, 2), cr.StackedExperts(E, H, 4)),
    "allocation": lambda: cr.LayerAllocation(4, 9.5, maximum=4),
    "served count": lambda: serving.routing_function(cr.Between(1, 3), E, bias=torch.linspace(-1, 1, E, device="cpu")),
    "served sample": lambda: serving.routing_function(IMPLIED, E, sample=True, head=1, temperature=2.0),
    "served sample of a count": lambda: serving.routing_function(cr.Between(1, 3), E, sample=True),
    "served greedily": lambda: serving.greedy_groups(
        E, 2, groups=2, active=1, bias=torch.linspace(-1, 1, E, device="cpu")
    ),
    "served circuit": lambda: serving.routing_function(IMPLIED, E, bias=torch.linspace(-1, 1, E, device="cpu")),
}
by_module = pytest.mark.parametrize("name", MODULES)


def decisions(module: nn.Module) -> list[Tensor]:
    """What a module decides, in training and in evaluation."""
    with torch.no_grad():
        found = []
        for training in (True, False):
            module.train(training)
            found += _decisions(module)
    return found


def _decisions(module: Any) -> list[Tensor]:
    hidden = hidden_of()
    if isinstance(module, cr.LayerAllocation):
        return [module()]
    if isinstance(module, serving.ServedFunction):
        logits = torch.randn(T, E, generator=torch.Generator().manual_seed(3), device="cpu")
        keys = {name: torch.arange(T, device="cpu") for name in module.keyed}
        return list(module(hidden, logits, 4, True, **keys))
    if isinstance(module, cr.MoE):
        return [module(hidden, key=keys_of())[0]]
    if isinstance(module, cr.BudgetRouter):
        state, found = module.begin(hidden), []
        for layer in range(L):
            routing, state = module(hidden, state, key=keys_of(layer))
            found += [routing.mask, routing.gates]
        assert int(state.spent.max()) <= 5
        return found
    if isinstance(module, cr.Budget):
        state = module.begin(hidden)
        return [state.messages, module.potential(state), module.feasible, module.counts]
    routing = module(hidden, key=keys_of())
    return [routing.mask, routing.gates]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def changed(module: nn.Module) -> nn.Module:
    """With parameters that initialisation does not give."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator, device="cpu"))
    return module


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        module = MODULES[name]()
    assert all(tensor.is_meta for key, tensor in module.state_dict().items() if key not in ("temperature", "alpha"))
    return module


@torch.no_grad()
def emptied(module: nn.Module, junk: float) -> nn.Module:
    """On the CPU, with memory that holds something else."""
    module.to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.fill_(junk)
    return module


# ---------------------------------------------------------------------------------------------- ways of building


@pytest.mark.parametrize("junk", [0.0, 1.0, math.nan], ids=str)
@by_module
def test_emptied_and_reset(name: str, junk: float) -> None:
    fresh, module = MODULES[name](), emptied(on_meta(name), junk)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    given = fresh.state_dict()
    for key, tensor in module.state_dict().items():
        assert bool(tensor.isfinite().all())
        if not key.endswith(("weight", "up", "down")):
            assert torch.equal(tensor, given[key]), key
    module.load_state_dict(given)
    assert same(decisions(module), decisions(fresh))


@pytest.mark.parametrize("junk", [0.0, 1.0, math.nan], ids=str)
@by_module
def test_emptied_and_loaded(name: str, junk: float) -> None:
    fresh, module = changed(MODULES[name]()), emptied(on_meta(name), junk)
    module.load_state_dict(fresh.state_dict())
    assert same(decisions(module), decisions(fresh))


@by_module
def test_loaded_by_assignment(name: str) -> None:
    """Nothing but the entries of the state dict ever leaves the meta device."""
    fresh, module = changed(MODULES[name]()), on_meta(name)
    module.load_state_dict(fresh.state_dict(), assign=True)
    assert same(decisions(module), decisions(fresh))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (cr.BudgetRouter, (H, E, L, cr.Between(1, 3), cr.AtMost(5))),
        (cr.Budget, (E, L, cr.Between(1, 3), cr.AtMost(5))),
        (cr.Router, (H, E, COMPOSED)),
        (cr.ExactKRouter, (H, E, 2)),
        (cr.DynamicKRouter, (H, E, 1, 3)),
        (cr.TopKRouter, (H, E, 2)),
        (cr.SoftTopKRouter, (H, E, 2.5)),
        (cr.StackedExperts, (E, H, 4)),
        (cr.LayerAllocation, (4, 9.5)),
    ],
)
def test_without_initialisation(kind: Any, arguments: tuple[Any, ...]) -> None:
    module, fresh = nn.utils.skip_init(kind, *arguments), changed(kind(*arguments))
    module.load_state_dict(fresh.state_dict())
    if isinstance(module, cr.StackedExperts):
        assert torch.equal(module(hidden_of()[:E], [1] * E), fresh(hidden_of()[:E], [1] * E))
    else:
        assert same(decisions(module), decisions(fresh))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
@by_module
def test_copies_decide_the_same(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    fresh = changed(MODULES[name]())
    expected = decisions(fresh)
    twin = copied(fresh)
    assert same(decisions(twin), expected)
    assert twin.state_dict().keys() == fresh.state_dict().keys()
    loaded = emptied(copied(on_meta(name)), 1.0)
    loaded.load_state_dict(fresh.state_dict())
    assert same(decisions(loaded), expected)
    emptied(twin, math.nan)
    assert same(decisions(fresh), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["budget", "served count", "served circuit"])
def test_casts_leave_constants_alone(name: str, dtype: torch.dtype) -> None:
    """Parameters start at numbers that bfloat16 holds, and there is nothing else to round."""
    fresh, module = MODULES[name](), nn.ModuleList([MODULES[name]()]).to(dtype)[0]
    if isinstance(fresh, cr.Budget):
        for part in (fresh, module):
            nn.init.zeros_(part.estimates)
    assert same(decisions(module), decisions(fresh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_leave_a_calibrated_threshold_alone(dtype: torch.dtype) -> None:
    router = cr.SoftTopKRouter(H, E, 2.5)
    router.calibrate(hidden_of(), executed=2.5)
    threshold = router.threshold.clone()
    assert not torch.equal(threshold, threshold.to(dtype).float())
    assert torch.equal(nn.ModuleList([router]).to(dtype)[0].threshold, threshold)
    assert router.weight.dtype == dtype
    assert router.double().threshold.dtype == torch.float64
    assert router.half().to("meta").threshold.dtype == torch.float64
    assert cr.SoftTopKRouter(H, E, 2.5, dtype=dtype).threshold.dtype == dtype  # as it was asked for


def test_no_table_is_in_a_state_dict() -> None:
    assert list(budget_router().state_dict())[:2] == ["preferences", "estimates"]
    assert not list(budget_router().buffers())
    assert not MODULES["served circuit"]().state_dict()


def test_tables_of_a_budget_are_copies() -> None:
    budget = MODULES["budget"]()
    before = decisions(budget)
    budget.feasible.fill_(True)
    budget.counts.fill_(True)
    assert same(decisions(budget), before)
    assert budget.feasible.tolist()[-1] == [True] * 5
    assert budget.counts.tolist() == [[False, True, True, True]] * L


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: cr.Router(H, E, cr.Exactly(2), temperature=nn.Parameter(value)), "temperature"),
        (lambda value: budget_router(temperature=nn.Parameter(value)), "temperature"),
        (lambda value: cr.SoftTopKRouter(H, E, 2.5, value), "alpha"),
    ],
)
def test_a_value_that_never_was_cannot_be_reset(make: Callable[[Tensor], nn.Module], name: str) -> None:
    """A tensor that is itself made on the meta device can be loaded, but not reset."""
    with torch.device("meta"):
        module = make(torch.tensor(0.5))
    module.reset_parameters()  # there is nothing to reset yet
    emptied(module, 1.0)
    with pytest.raises(ValueError, match=f"{name} was given as a tensor on the meta device"):
        module.reset_parameters()
    fresh = make(torch.tensor(0.5))
    module.load_state_dict(fresh.state_dict())
    assert same(decisions(module), decisions(fresh))


def test_what_is_served_tells_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="bias is on the meta device"):
        serving.routing_function(cr.Exactly(2), E, bias=torch.zeros(E, device="meta"))
    function = serving.routing_function(cr.Exactly(2), E, device="meta")
    with pytest.raises(ValueError, match="function is on the meta device: move it"):
        serving.export(function, topk=2, renormalize=True)
    program = serving.export(function.to_empty(device="cpu"), topk=2, renormalize=True).module()
    given = {"hidden_states": hidden_of(), "gating_output": torch.randn(T, E), "topk": 2, "renormalize": True}
    assert same(list(program(**given)), list(serving.routing_function(cr.Exactly(2), E)(**given)))


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("engine", ["torch", "naive", None])
@pytest.mark.parametrize("rule", [cr.Between(1, 3), COMPOSED, IMPLIED], ids=repr)
def test_logits_of_the_cpu_under_another_default_device(rule: cr.Constraint, engine: str | None) -> None:
    """As where a model is built on the meta device: all is where the logits are, and so is what is kept of it."""

    def found(circuit: cr.Circuit) -> list[Tensor]:
        logits = hidden_of(2).new_tensor(hidden_of(2)[:, :1].tolist()).expand(T, E) * torch.arange(E, device="cpu") / E
        distribution = circuit(logits.clone().requires_grad_())
        routing = cr.route(logits, circuit, key=keys_of())
        (slope,) = torch.autograd.grad(distribution.marginals.square().sum(), distribution.logits)
        return [distribution.marginals, distribution.mode, distribution.sample(key=keys_of()), slope, routing.gates]

    circuit = cr.compile(rule, E)
    circuit = circuit if engine is None else circuit.with_engine(engine)
    assert bool(found(circuit)[0].isfinite().all())
    again = pickle.loads(pickle.dumps(circuit))
    with torch.device("meta"):
        there = found(again)
    assert all(tensor.device.type == "cpu" for tensor in there)
    assert same(there, found(again))
    assert same(there, found(circuit))


@pytest.mark.parametrize("kind", [TorchLayered, NumbaLayered, NaiveLayered])
def test_what_is_made_in_inference_mode_serves_training(kind: Any) -> None:
    circuit = cr.compile(IMPLIED, E)
    engine = kind(evaluated(circuit.graph), circuit.max_count)
    logits = torch.randn(T, E, dtype=torch.float64)
    with torch.inference_mode():
        first = engine.infer(logits, None).marginals.clone()
    trained = logits.requires_grad_()
    attached = engine.attach(engine.infer(logits.detach(), None), trained, None)
    (slope,) = torch.autograd.grad(attached.log_partition.sum(), trained)
    torch.testing.assert_close(slope, first.clone())


def test_nothing_of_fake_tensors_and_transforms_is_kept() -> None:
    tables = Tables({"x": torch.arange(3).numpy()})
    assert lasting()
    with FakeTensorMode():
        assert not lasting()
        assert type(tables.on(torch.device("cpu"))["x"]) is not Tensor

    def inside(x: Tensor) -> Tensor:
        assert not lasting()
        return (x * tables.on(x.device)["x"]).sum()

    assert torch.func.grad(inside)(torch.ones(3)).tolist() == [0.0, 1.0, 2.0]
    kept = tables.on(torch.device("cpu"))["x"]
    assert type(kept) is Tensor
    assert torch.equal(kept, torch.arange(3))
    assert tables.on(torch.device("cpu"))["x"] is kept
    assert pickle.loads(pickle.dumps(tables)).on(torch.device("cpu"))["x"].tolist() == [0, 1, 2]
    assert copy.copy(tables) is tables


def test_traced_from_the_meta_device() -> None:
    """A budget whose tables were never asked for outside of a trace."""
    fresh = changed(budget_router()).eval()
    module = on_meta("budget router").eval()
    module.load_state_dict(fresh.state_dict(), assign=True)
    messages = torch.compile(module.messages, backend="aot_eager", fullgraph=True)
    assert torch.equal(messages(), fresh.messages())
    assert torch.equal(messages(), module.messages())


# ---------------------------------------------------------------------------------------------- pickles and copies

HIDDEN = torch.randn(T, H, generator=torch.Generator().manual_seed(7))


def routed(router: Any, **options: Any) -> Any:
    return router(HIDDEN, key=cr.random_key(2, torch.arange(T)), **options)


def of_routing(routing: cr.Routing) -> list[Tensor]:
    """What a decision is read for."""
    values = [routing.mask, routing.gates, routing.logits, routing.marginals, routing.counts, *routing.padded()]
    if not isinstance(routing, cr.SoftRouting):
        values += [routing.log_prob, routing.distribution.entropy(), routing.untempered.mode]
    return [value.detach() for value in values]


def of_distribution(distribution: cr.SubsetDistribution) -> list[Tensor]:
    values = [distribution.marginals, distribution.log_partition, distribution.mode, distribution.sample(key=3)]
    return [value.detach() for value in values]


def of_circuit(circuit: cr.Circuit) -> list[Tensor]:
    return of_distribution(circuit(HIDDEN[:, :1] * torch.arange(circuit.n)))


def of_schedule(schedule: Callable[[float], float]) -> list[Tensor]:
    return [torch.tensor([schedule(step) for step in range(12)])]


def of_constraint(constraint: cr.Constraint) -> list[Tensor]:
    return of_circuit(cr.compile(constraint, E))


def of_decider(decider: Decider) -> list[Tensor]:
    logits = HIDDEN[:, :1] * torch.arange(E)
    routing = decider(logits, weights="sigmoid", token=torch.arange(T), training=True)
    return [routing.mask, routing.gates]


def begun(decider: Decider) -> Decider:
    decider.begin(3, 1, 0, torch.device("cpu"))
    return decider


def budgeted() -> cr.Routing:
    router = budget_router()
    return router(HIDDEN, router.begin(HIDDEN), key=5)[0]


MADE: dict[str, tuple[Callable[[], Any], Callable[[Any], list[Tensor]]]] = {
    **{name: (lambda make=make: changed(make()), decisions) for name, make in MODULES.items()},
    "routing": (lambda: routed(cr.DynamicKRouter(H, E, 1, 3)), of_routing),
    "routing, tempered": (lambda: routed(cr.Router(H, E, cr.Exactly(2), temperature=learned(0.5))), of_routing),
    "routing, priced": (lambda: routed(cr.DynamicKRouter(H, E, 1, 3), price=0.5), of_routing),
    "routing, biased": (lambda: routed(cr.DynamicKRouter(H, E, 1, 3), bias=torch.linspace(-1, 1, E)), of_routing),
    "routing, mode": (lambda: routed(cr.TopKRouter(H, E, 2)), of_routing),
    "routing, composed": (lambda: routed(cr.Router(H, E, COMPOSED, combine="marginal")), of_routing),
    "routing, score": (lambda: routed(cr.Router(H, E, cr.Exactly(2), estimator="score")), of_routing),
    "routing, budget": (budgeted, of_routing),
    "soft routing": (lambda: routed(cr.SoftTopKRouter(H, E, 2.5)), of_routing),
    "record": (
        lambda: cr.RoutingRecord.of(routed(cr.ExactKRouter(H, E, 2))),
        lambda record: [*record.masks(), record.log_probs],
    ),
    "distribution": (lambda: cr.compile(cr.Exactly(2), H)(HIDDEN), of_distribution),
    "distribution, composed": (lambda: cr.compile(IMPLIED, E)(HIDDEN[:, :1] * torch.arange(E)), of_distribution),
    "circuit": (lambda: cr.compile(cr.Exactly(2), E), of_circuit),
    "circuit, composed": (lambda: cr.compile(COMPOSED, E), of_circuit),
    "circuit, forced": (lambda: cr.compile(COMPOSED, E).with_engine("naive"), of_circuit),
    "constraint of one's own": (Even, of_constraint),
    "constraint": (lambda: ~COMPOSED | cr.Exactly(1).over([0, 3]), of_constraint),
    "cost": (lambda: cr.Cost([1, 2, 3, 4, 1, 2, 3, 4], at_most=7), of_constraint),
    "groups": (lambda: cr.EachGroup(cr.Groups([[0, 1, 7], [2, 3, 4, 5, 6]]), cr.AtMost(1)), of_constraint),
    "layer budget": (lambda: cr.LayerBudget(2, 4, cr.Between(1, 2), cr.AtMost(3)), of_constraint),
    "logic": (lambda: IMPLIED, of_constraint),
    "constant": (lambda: cr.schedules.constant(0.5), of_schedule),
    "geometric": (lambda: cr.schedules.geometric(1.0, 0.1, 10), of_schedule),
    "cosine": (lambda: cr.schedules.cosine(1.0, 0.1, 10), of_schedule),
    "controller": (
        lambda: cr.CountController(2.5, gain=0.1),
        lambda controller: [
            controller.update(
                controller.init(), cr.route(torch.ones(4, E), cr.compile(cr.Between(1, 4), E), training=False)
            ).price
        ],
    ),
    "controller's state": (lambda: cr.CountController(2.5).init(), lambda state: [state.price]),
    "decider": (lambda: begun(Decider(cr.Between(1, 3), E, seed=4)), of_decider),
}


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "oldest pickle": lambda value: pickle.loads(pickle.dumps(value, protocol=2)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MADE)
def test_copies_are_of_the_same_values(name: str, way: str) -> None:
    make, read = MADE[name]
    value = make()
    twin = WAYS[way](value)
    assert repr(twin) == repr(value) or " at 0x" in repr(value)
    for found, expected in zip(read(twin), read(value), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert value == twin or not isinstance(value, cr.Constraint)


def test_a_copied_decision_is_without_its_graph() -> None:
    """As detach() gives it; a shallow copy is the same decision."""
    routing = routed(cr.DynamicKRouter(H, E, 1, 3))
    assert routing.gates.requires_grad
    assert not any(copy.deepcopy(routing).gates.requires_grad for _ in range(2))
    twin = copy.copy(routing)
    assert twin.gates is routing.gates
    assert type(twin) is type(routing)


# ---------------------------------------------------------------------------------------------- other processes


def answer(given: Any, results: Any) -> None:
    """In a process that has compiled nothing yet."""
    module, schedule, routing = given
    results.put([x.numpy() for x in (*decisions(module), *of_schedule(schedule), routing.gates)])


@pytest.mark.parametrize("name", ["budget router", "router, composed", "served circuit"])
def test_another_process_decides_the_same(name: str) -> None:
    module = changed(MODULES[name]()).requires_grad_(False)
    routing = routed(cr.DynamicKRouter(H, E, 1, 3))
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=answer, args=((module, cr.schedules.cosine(1, 0.1, 9), routing), results))
    process.start()
    found = [torch.from_numpy(x) for x in results.get()]
    process.join()
    assert process.exitcode == 0
    assert same(found, [*decisions(module), *of_schedule(cr.schedules.cosine(1, 0.1, 9)), routing.gates.detach()])


# ---------------------------------------------------------------------------------------------- circuits


def circuits(tmp_path: Any) -> dict[str, cr.Circuit]:
    """Over E variables, from everywhere."""
    own = cr.compile(Even() & cr.Between(1, 4), E)
    own.save(tmp_path / "own.circuit")
    (tmp_path / "two.nnf").write_text("nnf 7 6 2\nL 1\nL -2\nA 2 0 1\nL -1\nL 2\nA 2 3 4\nO 1 2 2 5\n")
    return {
        "compiled": cr.compile(COMPOSED, E),
        "count": cr.compile(cr.Between(1, 3), E),
        "own": own,
        "loaded": cr.load(tmp_path / "own.circuit"),
        "read": cr.read_nnf(tmp_path / "two.nnf", n=E),
        "forced": cr.compile(COMPOSED, E).with_engine("naive"),
    }


@pytest.mark.parametrize("name", ["compiled", "count", "own", "loaded", "read", "forced"])
def test_a_circuit_goes_where_a_constraint_goes(tmp_path: Any, name: str) -> None:
    circuit = circuits(tmp_path)[name]
    assert cr.compile(circuit, E) is circuit
    assert compilation.predict(circuit, E) is None
    assert cr.Router(H, E, circuit).circuit is circuit
    assert Decider(circuit, E).circuit is circuit
    assert bool(circuit.satisfies(routed(cr.Router(H, E, circuit)).mask).all())
    weights, ids = serving.routing_function(circuit, E)(
        HIDDEN, HIDDEN[:, :1] * torch.arange(E), circuit.max_count, True
    )
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter(1, ids.long(), weights > 0)
    assert bool(circuit.satisfies(chosen).all())


def test_a_budget_of_circuits() -> None:
    layers, total = [cr.compile(cr.Between(1, 3), E), cr.CountIn({0, 2})], cr.compile(cr.AtMost(4), 2 * E)
    given, plain = cr.Budget(E, 2, layers, total), cr.Budget(E, 2, [cr.Between(1, 3), cr.CountIn({0, 2})], cr.AtMost(4))
    assert torch.equal(given.messages(), plain.messages())
    router = cr.BudgetRouter(H, E, 2, layers[0], total)
    assert router.router(1).circuit is layers[0]
    assert router.without_routers().per_layer == (layers[0],) * 2
    assert int(sum(r.counts.max() for r in walked(router))) <= 6
    assert "per_layer=Circuit(Between(1, 3), n=8" in repr(router)


def walked(router: cr.BudgetRouter) -> list[cr.Routing]:
    state, found = router.begin(HIDDEN), []
    for layer in range(router.layers):
        routing, state = router(HIDDEN, state, key=layer)
        found.append(routing)
    assert int(state.spent.max()) <= 4
    return found


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c: cr.compile(c, 9), ValueError, "it is over 8 variables, and there are to be n=9"),
        (lambda c: compilation.predict(c, 9), ValueError, "it is over 8 variables, and there are to be n=9"),
        (lambda c: cr.Router(H, 9, c), ValueError, "it is over 8 variables, and there are to be n=9"),
        (lambda c: Decider(c, 9), ValueError, "it is over 8 variables, and there are to be n=9"),
        (lambda c: serving.routing_function(c, 9), ValueError, "it is over 8 variables, and there are to be n=9"),
        (lambda c: cr.Budget(9, 2, c, cr.AtMost(4)), ValueError, "it is over 8 variables, and there are to be n=9"),
        (lambda c: cr.Budget(E, 2, cr.Exactly(1), c), ValueError, "it is over 8 variables, and there are to be n=16"),
        (lambda c: cr.Budget(E, 2, c, cr.AtMost(4)), TypeError, r"per_layer\[0\]=.*cr.CountIn"),
        (lambda c: cr.compile(c, E, max_nodes=5), cr.CircuitTooLargeError, "more than max_nodes=5"),
        (lambda c: cr.LayerBudget(2, E, c, cr.AtMost(4)), TypeError, "per_layer=Circuit"),
        (lambda c: cr.EachGroup(cr.Groups(2), c), TypeError, "expected a circuitroute Constraint"),
    ],
)
def test_circuits_that_do_not_fit(make: Callable[[cr.Circuit], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(cr.compile(COMPOSED, E))
