"""Recorded decisions in routers of other libraries' models: a host of the least kind, without any library."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.integrations import hosted
from circuitroute.routing.replay import importance_ratio, mismatch, path_log_prob

T, H, E, LAYERS = 12, 6, 8, 3
RULE = cr.Between(1, 4)


class HostRouter(nn.Module):
    """A linear map and a constraint; tokens come position by position where there are several sequences."""

    def __init__(self, rule: Any = RULE, sequences: int = 1, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))
        self.sequences = sequences
        self.decider = hosted.Decider(rule, E, **options)

    def forward(self, x: Tensor) -> Tensor:
        token = torch.arange(len(x)).view(self.sequences, -1).t().reshape(-1)
        routing = self.decider(x @ self.weight.t(), weights="softmax", token=token, training=self.training)
        return routing.gates


class Layer(nn.Module):
    """Experts are linear maps."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.router = HostRouter(**options)
        self.experts = nn.Parameter(torch.randn(E, H, H) / H)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("te,ehg,tg->th", self.router(x), self.experts, x)


class Model(nn.Module):
    def __init__(self, recompute: str | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(**options) for _ in range(LAYERS))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recompute is None:
                x = layer(x)
            else:
                again = self.recompute == "reentrant"
                x = checkpoint(layer, x, use_reentrant=again, preserve_rng_state=False)
        return x


def hidden(tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed))


def random_record(tokens: int = T, seed: int = 0, temperature: float = 1.0) -> cr.RoutingRecord:
    """Decisions that no model made."""
    circuit = cr.compile(RULE, E)
    logits = torch.randn(LAYERS, tokens, E, generator=torch.Generator().manual_seed(seed))
    masks = [
        circuit(rows).sample(key=cr.random_key(seed, i, torch.arange(tokens))).bool() for i, rows in enumerate(logits)
    ]
    made = cr.RoutingRecord.of(masks)
    return cr.RoutingRecord(made.layers, temperature=temperature)


def routed(model: nn.Module, x: Tensor) -> list[cr.Routing]:
    with hosted.recorded_routings(model) as routings:
        model(x)
    return routings


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimator", ["simple", "none", "dense", "score"])
def test_the_decisions_are_the_recorded_ones_with_their_own_gates_log_prob_and_gradients(
    estimator: str, training: bool
) -> None:
    model, record = Model(estimator=estimator).train(training), random_record()
    hosted.replay(model, record)
    for routing, mask in zip(routed(model, hidden()), record.masks(), strict=True):
        assert torch.equal(routing.mask, mask)
        logits = routing.logits.detach().requires_grad_()
        circuit = routing.distribution.circuit
        wanted = cr.route(logits, circuit, estimator=estimator, replay=mask, training=training)
        torch.testing.assert_close(routing.gates, wanted.gates)
        torch.testing.assert_close(routing.log_prob, wanted.log_prob)
        for values in (lambda r: r.gates * torch.arange(E), lambda r: r.log_prob):
            (found,) = torch.autograd.grad(values(routing).sum(), routing.logits, retain_graph=True)
            (gradient,) = torch.autograd.grad(values(wanted).sum(), logits, retain_graph=True)
            torch.testing.assert_close(found, gradient)
            assert found.abs().sum() > 0


def test_it_holds_until_none_and_needs_no_keys() -> None:
    model, record = Model(seed=3), random_record()
    hosted.replay(model, record)
    for _ in range(2):  # no step has begun
        assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == record
    other = random_record(seed=1)
    hosted.replay(model, other)
    assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == other
    hosted.replay(model, None)
    hosted.begin_step(model, 0)
    fresh = routed(model, hidden())
    hosted.begin_step(model, 0)
    assert cr.RoutingRecord.of(fresh, log_probs=False) != record
    for routing, again in zip(fresh, routed(model, hidden()), strict=True):
        assert torch.equal(routing.mask, again.mask)
    model.eval()
    for routing in routed(model, hidden()):
        assert torch.equal(routing.mask, routing.distribution.mode.bool())
    hosted.replay(model, None)  # once more is no error


def test_decide_mode_and_temperature_give_way_to_the_record() -> None:
    model, record = Model(decide="mode", temperature=0.5), random_record(temperature=0.5)
    hosted.replay(model, record)
    for routing, mask in zip(routed(model, hidden()), record.masks(), strict=True):
        assert torch.equal(routing.mask, mask)
        logits = routing.logits.detach()
        expected = cr.route(logits, routing.distribution.circuit, replay=mask, temperature=0.5)
        torch.testing.assert_close(routing.log_prob, expected.log_prob)


def test_ratios_of_the_same_policy_are_one() -> None:
    model = Model(seed=0)
    hosted.begin_step(model, 0)
    record = cr.RoutingRecord.of(routed(model, hidden()))
    hosted.replay(model, record)
    new = path_log_prob(routed(model, hidden()))
    ratio = importance_ratio(new, record.path_log_prob)
    torch.testing.assert_close(ratio, torch.ones(T))
    ratio.sum().backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.layers)


@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
def test_recomputed_layers_decide_the_same(recompute: str) -> None:
    gradients = []
    for way in (None, recompute):
        model = Model(recompute=way)
        hosted.replay(model, random_record())
        x = hidden().requires_grad_()
        model(x).square().mean().backward()
        gradients.append([x.grad, *[parameter.grad for parameter in model.parameters()]])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
def test_a_record_is_set_again_for_a_recomputation_that_comes_later(recompute: str) -> None:
    """Two forward passes before the first backward pass."""
    records, gradients = [random_record(seed=0), random_record(seed=1)], []
    for way in (None, recompute):
        model, outputs = Model(recompute=way), []
        for seed, record in enumerate(records):
            hosted.replay(model, record)
            outputs.append(model(hidden(seed=seed).requires_grad_()))
        for output, record in zip(outputs, records, strict=True):
            hosted.replay(model, record)
            output.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


WRAPPED: dict[str, Callable[[Model], Any]] = {
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "parts": lambda model: list(model.layers),
    "a part twice": lambda model: [model, model.layers[0]],
    "compiled layers": lambda model: nn.ModuleList(
        torch.compile(layer.router, backend="eager") for layer in model.layers
    ),
}


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo")
@pytest.mark.parametrize("way", WRAPPED)
@pytest.mark.usefixtures("one_process")
def test_models_may_be_wrapped_or_in_parts(way: str) -> None:
    """torch.compile's wrapper lends the router's attributes, and is no layer of its own."""
    model, record = Model(seed=0), random_record()
    given = WRAPPED[way](model)
    hosted.replay(given, record)
    assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == record
    hosted.replay(given, None)
    hosted.begin_step(given, 0)
    assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) != record


def test_a_compiled_model_replays_in_one_graph() -> None:
    model, plain = Model(seed=0), Model(seed=0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in range(3):
        for each in (compiled, plain):
            hosted.replay(each, random_record(seed=seed))
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(hidden()), plain(hidden()))


def saved(model: Model) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: Model = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_copies_replay_nothing(copied: Callable[[Model], Model]) -> None:
    model, record = Model().eval(), random_record()
    keys = set(model.state_dict())
    hosted.replay(model, record)
    assert set(model.state_dict()) == keys
    for routing in routed(copied(model), hidden()):
        assert torch.equal(routing.mask, routing.distribution.mode.bool())
    assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == record


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    model, record = Model(), random_record(tokens)
    hosted.replay(model, record)
    assert cr.RoutingRecord.of(routed(model, hidden(tokens)), log_probs=False) == record


def test_tokens_of_a_record_are_numbered_as_their_keys_are() -> None:
    """A host that holds two sequences position by position."""
    model, record = Model(sequences=2), random_record()
    hosted.replay(model, record)
    order = torch.arange(T).view(2, -1).t().reshape(-1)
    for routing, mask in zip(routed(model, hidden()), record.masks(), strict=True):
        assert torch.equal(routing.mask, mask[order])


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_what_a_host_records_it_replays(sequences: int) -> None:
    """Whatever the order in which it holds its tokens; copies of the decisions make the same record."""
    model = Model(seed=0, sequences=sequences)
    hosted.begin_step(model, 0)
    rollout = routed(model, hidden())
    record = cr.RoutingRecord.of(rollout)
    order = torch.arange(T).view(sequences, -1).t().reshape(-1)
    for routing, mask, known in zip(rollout, record.masks(), record.log_probs.unbind(1), strict=True):
        assert torch.equal(mask[order], routing.mask)
        torch.testing.assert_close(known[order], routing.log_prob.detach())
    for copied in (copy.copy, copy.deepcopy, lambda routing: pickle.loads(pickle.dumps(routing))):
        again = cr.RoutingRecord.of([copied(routing) for routing in rollout])
        assert cr.RoutingRecord(again.layers) == cr.RoutingRecord(record.layers)
        torch.testing.assert_close(again.log_probs, record.log_probs)
    doubled = cr.RoutingRecord.of([routing.weighed(2 * routing.gates) for routing in rollout])
    assert cr.RoutingRecord(doubled.layers) == cr.RoutingRecord(record.layers)
    hosted.replay(model, record)
    replayed = routed(model, hidden())
    assert mismatch(replayed, record).tokens == mismatch(replayed, rollout).tokens == 0
    torch.testing.assert_close(path_log_prob(replayed).detach(), record.path_log_prob)
    by_position = cr.RoutingRecord.of([routing.mask for routing in rollout])
    assert (mismatch(replayed, by_position).tokens > 0) == (sequences > 1)


def test_a_host_may_replay_a_record_of_its_own_but_not_two() -> None:
    decider = hosted.Decider(RULE, E, seed=0)
    mask = random_record().masks()[0]
    logits = hidden() @ torch.randn(H, E, generator=torch.Generator().manual_seed(0))
    given = {"weights": "softmax", "token": torch.arange(T), "training": True}
    assert torch.equal(decider(logits, **given, replay=mask).mask, mask)
    decider.replay(mask)
    with pytest.raises(ValueError, match=r"there are two records, .* such as by replay\(model, None\)"):
        decider(logits, **given, replay=mask)


def forbidden() -> cr.RoutingRecord:
    masks = random_record().masks()
    masks[1][[4, 7]] = True
    return cr.RoutingRecord.of(masks)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "masks": (torch.ones(T, E, dtype=torch.bool), TypeError, "record is a Tensor: expected a RoutingRecord"),
    "layers": (
        cr.RoutingRecord(random_record().layers[:2]),
        ValueError,
        r"record has layers of \[8, 8\] experts, and the model's routers \[8, 8, 8\]",
    ),
    "experts": (
        cr.RoutingRecord.of([torch.ones(T, n, dtype=torch.bool) for n in (8, 9, 8)]),
        ValueError,
        r"record has layers of \[8, 9, 8\] experts",
    ),
    "temperature": (random_record(temperature=0.5), ValueError, "temperature 0.5, and layer 0 decides at 1"),
    "constraint": (
        cr.RoutingRecord(random_record().layers, constraints=[RULE, RULE, cr.Between(1, 5)]),
        ValueError,
        r"layer 2 was decided under Between\(1, 5\), and is to be replayed under Between\(1, 4\)",
    ),
    "subsets": (forbidden(), ValueError, r"layer 1 has subsets that Between\(1, 4\) forbids, in rows 4, 7"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_changes_nothing(what: str) -> None:
    record, error, message = REFUSED[what]
    model, before = Model(), random_record()
    hosted.replay(model, before)
    with pytest.raises(error, match=message):
        hosted.replay(model, record)
    assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == before


def test_another_number_of_tokens_is_found_in_the_forward_pass() -> None:
    model = Model()
    hosted.replay(model, random_record(5))
    with pytest.raises(
        ValueError, match=r"routes 12 tokens, and the record is of 5: .*record.split.*replay\(model, None"
    ):
        model(hidden())
    hosted.replay(model, random_record(5))
    model(hidden(5))


def test_a_temperature_that_moves_on_is_found_in_the_forward_pass() -> None:
    model = Model()
    hosted.replay(model, random_record())
    model.layers[1].router.decider.temperature = 0.25
    with pytest.raises(ValueError, match=r"made at temperature 1, and the router now decides at 0.25"):
        model(hidden())


def test_evidence_that_excludes_a_recorded_subset_is_found_in_the_forward_pass() -> None:
    decider = hosted.Decider(RULE, E)
    mask = torch.zeros(2, E, dtype=torch.bool)
    mask[:, 3] = True
    decider.replay(mask)
    logits = torch.zeros(2, E)
    logits[1, 3] = -torch.inf
    with pytest.raises(ValueError, match=r"replay holds a subset that .* exclude, in row 1"):
        decider(logits, weights="softmax", token=torch.arange(2), training=False)


def test_a_model_without_routers_replays_nothing() -> None:
    for record in (random_record(), None):
        with pytest.raises(ValueError, match=r"model \(Linear\) has no router of circuitroute.integrations"):
            hosted.replay(nn.Linear(1, 1), record)
