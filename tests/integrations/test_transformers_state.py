"""Patched models as they are pickled, copied, sent to other processes, saved and loaded; and models of one's own.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import circuitroute as cr

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from circuitroute.integrations import serving  # noqa: E402
from circuitroute.integrations import transformers as adapter  # noqa: E402
from tests.integrations.models import EXPERTS, HIDDEN, LAYERS, tiny, tokens, ungrouped  # noqa: E402
from tests.integrations.support import logits_of, router_of  # noqa: E402

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore::FutureWarning")]
SEED = 3


@dataclass(frozen=True)
class Even(cr.Constraint):
    """A constraint of a user's own."""

    def leaf(self, var):
        return 0, 1

    def merge(self, left, right):
        return (left + right) % 2

    def accepts(self, state):
        return state == 0


@dataclass(frozen=True, repr=False)
class Exactly(cr.Constraint):
    """Another one, whose text looks like a built-in one's: exactly twice as many."""

    k: int

    def leaf(self, var):
        return 0, 1

    def merge(self, left, right):
        return left + right if left + right <= 2 * self.k else None

    def accepts(self, state):
        return state == 2 * self.k

    def __repr__(self):
        return f"Exactly({self.k})"


def budget() -> cr.Budget:
    made = cr.Budget(EXPERTS, LAYERS, cr.Between(1, 3), cr.AtMost(4))
    with torch.no_grad():
        made.preferences.copy_(torch.linspace(-1, 1, made.preferences.numel()).view_as(made.preferences))
    return made


def decided(model: Any, training: bool = True) -> list[Tensor]:
    """Outputs and decisions of a step."""
    handle = adapter.get_handle(model)
    handle.set_step(5)
    model.train(training)
    with torch.no_grad():
        output = model(tokens(), use_cache=False).logits
    found = [output, *(routing.mask for routing in handle.routings)]
    handle.release()
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}
CONSTRAINTS: dict[str, Callable[[], Any]] = {
    "range": lambda: cr.Between(1, 3),
    "one layer": lambda: {1: cr.Exactly(3)},
    "circuit": lambda: cr.compile(Even() & cr.Between(1, 4), EXPERTS),
    "budget": budget,
}
by_way = pytest.mark.parametrize("way", WAYS)


# ---------------------------------------------------------------------------------------------- pickles and copies


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3", "GPT-OSS"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@by_way
def test_a_copied_model_is_a_patched_model(family: str, constraint: str, way: str) -> None:
    model, stock = ungrouped(family), logits_of(ungrouped(family))
    handle = adapter.patch(model, CONSTRAINTS[constraint](), seed=SEED)
    expected = decided(model)
    twin, its_handle = WAYS[way]((model, handle))
    assert its_handle.model is twin
    assert adapter.get_handle(twin)._session is its_handle._session is not handle._session
    assert its_handle.budget is getattr(twin, "circuitroute_budget", None)
    assert its_handle.routings == ()
    assert same(decided(twin), expected)
    its_handle.temperature = 0.5
    assert handle.temperature == 1.0
    assert not same(decided(twin), expected)
    adapter.get_handle(WAYS[way](twin)).unpatch()  # of a copy of the copy
    adapter.get_handle(twin).unpatch()
    assert torch.equal(logits_of(twin), stock)
    assert twin.state_dict().keys() == ungrouped(family).state_dict().keys()
    assert same(decided(model), expected)
    assert vars(twin).keys() == vars(ungrouped(family)).keys()


@by_way
def test_a_handle_brings_its_model(way: str) -> None:
    handle = adapter.patch(ungrouped("OLMoE"), cr.Between(1, 3), seed=SEED)
    expected = decided(handle.model)
    twin = WAYS[way](handle)
    assert twin.model is not handle.model
    assert same(decided(twin.model), expected)
    assert repr(twin) == repr(handle)
    callback = WAYS[way](handle.trainer_callback())
    assert type(callback).__name__ == "StepSetter"


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_router_is_pickled_without_its_model(way: str) -> None:
    model = ungrouped("OLMoE")
    adapter.patch(model, cr.Between(1, 3), seed=SEED)
    router, hidden = router_of(model).train(), torch.randn(5, HIDDEN)
    twin = WAYS[way](router)
    assert type(twin) is type(router)
    assert twin.circuitroute_plan.session.model() is None
    assert same(list(twin(hidden)), list(router(hidden)))
    assert same(list(twin.eval()(hidden)), list(router.eval()(hidden)))
    assert len(pickle.dumps(router)) < len(pickle.dumps(model)) / 2


@by_way
def test_checkpointed_layers_of_a_copy_keep_their_own_turns(way: str) -> None:
    model = ungrouped("OLMoE")
    adapter.patch(model, budget(), seed=SEED)
    model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))

    def gradients(of: Any) -> list[Tensor]:
        of.train().zero_grad()
        adapter.get_handle(of).set_step(1)
        of(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return [p.grad.clone() for p in of.parameters() if p.grad is not None]

    expected = gradients(model)
    twin = WAYS[way](model)
    assert same(gradients(twin), expected)
    adapter.get_handle(twin).unpatch()
    assert same(gradients(model), expected)


def test_nothing_keeps_a_patched_model_alive() -> None:
    model = ungrouped("OLMoE")
    adapter.patch(model, budget())
    for twin in (model, pickle.loads(pickle.dumps(model))):
        alive = weakref.ref(twin)
    del twin
    assert alive() is None


@by_way
def test_a_copy_of_a_model_wrapped_by_peft(way: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(tiny("OLMoE"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.patch(wrapped, cr.Between(1, 3), seed=SEED)
    twin = WAYS[way](wrapped)
    assert same(decided(twin), decided(wrapped))
    adapter.get_handle(twin).unpatch()


def answer(model: Any, results: Any) -> None:
    """In a process that has patched nothing yet."""
    results.put([x.numpy() for x in decided(model)])


def test_another_process_routes_the_same() -> None:
    model = ungrouped("OLMoE").requires_grad_(False)
    adapter.patch(model, cr.Between(1, 3), seed=SEED)
    assert model.config._experts_implementation == "circuitroute"
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=answer, args=(model, results))
    process.start()
    found = [torch.from_numpy(x) for x in results.get()]
    process.join()
    assert process.exitcode == 0
    assert same(found, decided(model))


# ---------------------------------------------------------------------------------------------- saved configurations


def settings_in(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["circuitroute"]


RULES: dict[str, Callable[[], Any]] = {
    "built-in": lambda: cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3),
    "own": lambda: Even() & cr.Between(1, 4),
    "looks built-in": lambda: Exactly(1),
    "compiled": lambda: cr.compile(cr.Exactly(3), EXPERTS),
    "own, compiled": lambda: cr.compile(Even() & cr.Between(1, 4), EXPERTS),
    "sequence": lambda: [cr.compile(Exactly(1), EXPERTS), cr.Between(1, 3)],
    "mapping": lambda: {1: cr.compile(Even() & cr.Between(1, 4), EXPERTS)},
    "numbers of NumPy": lambda: {np.int64(1): cr.Between(np.int32(1), np.int64(3))},
    "costs": lambda: cr.Cost(np.arange(1, 9), at_most=np.int64(6)) & cr.AtLeast(1),
    "budget": lambda: cr.Budget(
        EXPERTS, 2, [cr.compile(cr.Between(1, 3), EXPERTS), cr.Exactly(1)], cr.compile(cr.AtMost(3), 2 * EXPERTS)
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    model = ungrouped("OLMoE")
    adapter.patch(model, RULES[name](), seed=SEED)
    model.save_pretrained(tmp_path / "one")
    loaded = adapter.load(tmp_path / "one")
    assert same(decided(loaded), decided(model))
    assert same(decided(loaded, training=False), decided(model, training=False))
    assert adapter.get_handle(loaded).layers == adapter.get_handle(model).layers
    loaded.save_pretrained(tmp_path / "two")
    first, second = (settings_in(tmp_path / part) for part in ("one", "two"))
    # A class that files do not hold is known by its text from then on.
    assert len(first.pop("circuits", [])) == len(second.pop("circuits", []))
    assert first == second


@pytest.mark.parametrize("source", ["saved", "nnf"])
def test_a_circuit_from_a_file_is_part_of_a_saved_model(tmp_path: Path, source: str) -> None:
    cr.compile(Even() & cr.Between(1, 4), EXPERTS).save(tmp_path / "rule.circuit")
    (tmp_path / "rule.nnf").write_text("nnf 7 6 2\nL 1\nL -2\nA 2 0 1\nL -1\nL 2\nA 2 3 4\nO 1 2 2 5\n")
    circuit = cr.load(tmp_path / "rule.circuit") if source == "saved" else cr.read_nnf(tmp_path / "rule.nnf", n=EXPERTS)
    model = ungrouped("OLMoE")
    adapter.patch(model, circuit, seed=SEED)
    model.save_pretrained(tmp_path)
    assert len(settings_in(tmp_path)["circuits"]) == 1  # once for all layers
    assert settings_in(tmp_path)["constraints"] == [{"circuit": 0}] * LAYERS
    loaded = adapter.load(tmp_path)
    assert router_of(loaded).circuitroute_plan.circuit.constraint == circuit.constraint
    assert same(decided(loaded), decided(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"circuits": []}, "a layer has the constraint {'circuit': 0}, and there are 0 circuits"),
        ({"circuits": ["circuitroute circuit 1\n"]}, "circuit 0 is damaged"),
        ({"circuits": "none"}, "circuits must be texts"),
        ({"constraints": [{"circuit": "0"}, None]}, "a layer has the constraint {'circuit': '0'}"),
    ],
)
def test_damaged_circuits_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = ungrouped("OLMoE")
    adapter.patch(model, cr.compile(cr.Exactly(2), EXPERTS))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["circuitroute"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="call patch") as caught:
        adapter.load(tmp_path)
    assert message in str(caught.value)


def test_a_circuit_over_other_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it is over 7 variables, and there are to be n=8"):
        adapter.patch(ungrouped("OLMoE"), cr.compile(cr.Exactly(2), 7))


def own_estimator(mask: Tensor, distribution: cr.SubsetDistribution) -> Tensor:
    return mask


class OwnEstimator:
    def __call__(self, mask: Tensor, distribution: cr.SubsetDistribution) -> Tensor:
        return mask


class NearlySimple(cr.estimators.Simple):
    pass


@pytest.mark.parametrize(
    ("estimator", "name"),
    [
        (own_estimator, f"{__name__}.own_estimator"),
        (functools.partial(own_estimator), f"{__name__}.own_estimator"),
        (OwnEstimator(), f"{__name__}.OwnEstimator"),
        (NearlySimple(), f"{__name__}.NearlySimple"),
        (lambda mask, distribution: mask, f"{__name__}.<lambda>"),
    ],
)
def test_an_estimator_of_ones_own_is_asked_for(tmp_path: Path, estimator: Any, name: str) -> None:
    model = ungrouped("OLMoE")
    adapter.patch(model, cr.Exactly(2), seed=SEED, estimator=estimator)
    model.save_pretrained(tmp_path)
    assert settings_in(tmp_path)["estimator"] == {"own": name}  # and no address, which is another in every process
    with pytest.raises(ValueError, match=r"hand it over, load\(path, estimator=\.\.\.\)") as caught:
        adapter.load(tmp_path)
    assert name in str(caught.value)
    loaded = adapter.load(tmp_path, estimator=estimator)
    assert router_of(loaded).circuitroute_plan.session.options.estimator is estimator
    assert same(decided(loaded), decided(model))
    assert router_of(adapter.load(tmp_path, estimator="score")).circuitroute_plan.session.options.estimator == "score"


@pytest.mark.parametrize("name", ["simple", "score", "none", "dense"])
def test_estimators_of_ours_are_saved_by_name(tmp_path: Path, name: str) -> None:
    model = ungrouped("OLMoE")
    adapter.patch(model, cr.Exactly(2), estimator=type(cr.estimators.as_estimator(name))())
    model.save_pretrained(tmp_path)
    assert settings_in(tmp_path)["estimator"] == name
    assert router_of(adapter.load(tmp_path)).circuitroute_plan.session.options.estimator == name


def test_numbers_of_any_kind_are_saved_as_plain_ones(tmp_path: Path) -> None:
    model = ungrouped("OLMoE")
    options: dict[str, Any] = {
        "seed": np.int64(3),
        "decide": np.float32(0.5),
        "temperature": torch.tensor(0.5),
        "probes": np.int32(1),
        "probe_weights": np.float64(2.0),
    }
    handle = adapter.patch(model, cr.Exactly(2), **options)
    handle.temperature = np.float64(0.25)
    model.save_pretrained(tmp_path)
    kept = {name: settings_in(tmp_path)[name] for name in options}
    assert kept == {"seed": 3, "decide": 0.5, "temperature": 0.25, "probes": 1, "probe_weights": 2.0}
    assert same(decided(adapter.load(tmp_path)), decided(model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": nn.Parameter(torch.tensor(1.0))}, TypeError, "a tensor that requires a gradient"),
        ({"temperature": cr.schedules.constant(0.5)}, TypeError, "temperature=.*expected a number"),
        ({"combine": lambda gates: gates}, ValueError, "combine=.*choose one of"),
        ({"padding": lambda gates: gates}, ValueError, "padding=.*choose one of"),
    ],
)
def test_what_no_configuration_can_hold_is_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapter.patch(ungrouped("OLMoE"), cr.Exactly(2), **options)


# ---------------------------------------------------------------------------------------------- models of one's own


class OwnConfig(transformers.PretrainedConfig):
    model_type = "circuitroute_state"


class OwnModel(transformers.PreTrainedModel):
    """Routers inside of a model that transformers builds on the meta device when it loads it."""

    config_class = OwnConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.budget = cr.BudgetRouter(6, 8, 2, cr.Between(1, 3), cr.AtMost(4), per_token=True)
        self.soft = cr.SoftTopKRouter(6, 8, 2.5, 0.5)
        self.composed = cr.Router(6, 8, cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3))
        x = cr.variables(8)
        self.served = serving.routing_function(cr.Logic(x[0] >> x[1]) & cr.Between(1, 4), 8)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, hidden: Tensor) -> list[Tensor]:
        state, found = self.budget.begin(hidden), []
        for layer in range(2):
            routing, state = self.budget(hidden, state, key=cr.random_key(0, layer, torch.arange(len(hidden))))
            found += [routing.mask, routing.gates]
        found += [self.soft(hidden).gates, self.composed(hidden, key=cr.random_key(1, torch.arange(len(hidden)))).gates]
        return [*found, *self.served(hidden, self.composed.logits(hidden), 4, True)]


def own_model() -> Any:
    torch.manual_seed(0)
    model, hidden = OwnModel(OwnConfig()), torch.randn(30, 6)
    model.soft.calibrate(hidden, executed=2.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model, hidden


def test_from_pretrained_gives_the_same_model(tmp_path: Path) -> None:
    model, hidden = own_model()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.train()(hidden)
        assert same(OwnModel.from_pretrained(tmp_path).train()(hidden), expected)
        cast = OwnModel.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
        assert torch.equal(cast.budget.feasible, model.budget.feasible)
        assert int(sum(mask.sum(-1).max() for mask in cast(hidden.bfloat16())[:4:2])) <= 6


def test_accelerate_gives_the_same_model(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, hidden = own_model()
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    with torch.no_grad():
        expected = model.train()(hidden)
        for include_buffers in (False, True):
            with accelerate.init_empty_weights(include_buffers=include_buffers):
                empty = OwnModel(OwnConfig())
            accelerate.load_checkpoint_in_model(empty, str(tmp_path / "weights.bin"), device_map={"": "cpu"})
            assert same(empty.train()(hidden), expected)
