"""Recorded decisions in Megatron-core's mixture-of-experts layers, by our records and by Megatron's RouterReplay."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.routing.replay import importance_ratio, mismatch, path_log_prob

pytest.importorskip(
    "tests.integrations.megatron_support",
    reason="megatron-core: pip install --no-deps megatron-core==0.16.1",
    exc_type=ImportError,
)
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from circuitroute.integrations import megatron
from tests.integrations import megatron_support as support
from tests.integrations.megatron_support import B, E, S, T, build, build_circuit, configuration, hidden

pytestmark = support.MARKS

RULE = cr.Between(1, 4)
# Number of each row's token: rows come position by position, and tokens are numbered sequence by sequence.
TOKEN = (torch.arange(B)[None, :] * S + torch.arange(S)[:, None]).view(-1)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with support.one_process():
        yield


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    support.no_gpu(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def no_replay_left() -> Iterator[None]:
    yield
    RouterReplay.clear_global_router_replay_instances()


class Stack(nn.Module):
    """Two layers in a row, as in a part of a model."""

    def __init__(self, constraint: cr.Constraint = RULE, **settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build_circuit(constraint, seed=None, **settings) for _ in range(2))
        for number, layer in enumerate(self.layers):
            layer.set_layer_number(number + 1)
            layer.router.decider.seed = 0
            layer.router.weight.data += 0.1 * number

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def sampled(model: nn.Module, step: int, x: Tensor) -> list[cr.Routing]:
    megatron.begin_step(model, step)
    return run(model, x)


def run(model: nn.Module, x: Tensor) -> list[cr.Routing]:
    with megatron.recorded_routings(model) as routings:
        model(x)
    return routings


@pytest.mark.parametrize("training", [True, False])
def test_what_was_recorded_is_replayed(training: bool) -> None:
    """In every pass until it ends, whatever the mode and the step."""
    model = Stack()
    rollout = sampled(model, 0, hidden())
    record = cr.RoutingRecord.of(rollout)
    megatron.replay(model, record)
    model.train(training)
    for step in (1, 2):
        again = sampled(model, step, hidden())
        for routing, before in zip(again, rollout, strict=True):
            assert torch.equal(routing.mask, before.mask)
            torch.testing.assert_close(routing.log_prob, before.log_prob)
            torch.testing.assert_close(routing.gates, before.gates)
    assert cr.RoutingRecord.of(again, log_probs=False) == cr.RoutingRecord(record.layers)
    megatron.replay(model, None)
    assert mismatch(sampled(model, 1, hidden()), rollout).tokens > 0


def test_records_are_sequence_by_sequence() -> None:
    """A rollout of each sequence alone, joined, is what training replays on both; and its parts are the sequences'."""
    model = Stack()
    record = cr.RoutingRecord.of(sampled(model, 0, hidden()))
    alone = []
    for sequence in range(B):
        megatron.begin_step(model, 0, offset=sequence * S)
        alone.append(cr.RoutingRecord.of(run(model, hidden()[:, sequence : sequence + 1].contiguous())))
    joined = cr.RoutingRecord.cat(alone)
    assert cr.RoutingRecord(joined.layers) == cr.RoutingRecord(record.layers)
    torch.testing.assert_close(joined.log_probs, record.log_probs)
    megatron.replay(model, joined)
    for routing, mask in zip(run(model, hidden()), joined.masks(), strict=True):
        assert torch.equal(routing.mask, mask[TOKEN])
    for sequence, part in enumerate(joined.split([S] * B)):
        megatron.replay(model, part)
        found = run(model, hidden()[:, sequence : sequence + 1].contiguous())
        assert cr.RoutingRecord(cr.RoutingRecord.of(found).layers) == cr.RoutingRecord(part.layers)


def test_importance_ratios_are_of_the_same_tokens() -> None:
    """By the tokens' numbers on both sides: 1 under the same policy, and the quotient of both under another."""
    model = Stack()
    record = cr.RoutingRecord.of(sampled(model, 0, hidden()))
    megatron.replay(model, record)
    torch.testing.assert_close(
        importance_ratio(path_log_prob(run(model, hidden())), record.path_log_prob), torch.ones(T)
    )
    for layer in model.layers:
        layer.router.weight.data *= 1.1
    routings = run(model, hidden())
    new = path_log_prob(routings)
    by_hand = torch.zeros(T, dtype=torch.float64)
    by_hand[TOKEN] = sum(routing.log_prob.detach().double() for routing in routings)
    torch.testing.assert_close(new.detach(), by_hand)
    ratio = importance_ratio(new, record.path_log_prob)
    torch.testing.assert_close(ratio, (by_hand - record.path_log_prob).exp().float())
    (new.exp() * torch.arange(T)).sum().backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.layers)


def test_decisions_may_be_compared_with_records() -> None:
    model = Stack()
    rollout = sampled(model, 0, hidden())
    assert mismatch(rollout, cr.RoutingRecord.of(rollout)).tokens == 0
    assert mismatch(rollout, [routing.mask for routing in rollout]).tokens > 0, "masks are in the host's order"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_replays_too(use_reentrant: bool) -> None:
    settings = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
    record = cr.RoutingRecord.of(sampled(Stack(), 3, hidden()))
    gradients = []
    for recompute in (False, True):
        model = Stack(**settings)
        megatron.replay(model, record)
        x = hidden(requires_grad=True)
        again = checkpoint(model, x, use_reentrant=use_reentrant, preserve_rng_state=False) if recompute else model(x)
        again.square().mean().backward()
        gradients.append([x.grad, *[parameter.grad for parameter in model.parameters()]])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_micro_batches_have_a_record_each() -> None:
    model = Stack()
    batches = [hidden(), -hidden()]
    records = [cr.RoutingRecord.of(sampled(model, step, x)) for step, x in enumerate(batches)]
    for x, record in zip(batches, records, strict=True):
        megatron.replay(model, record)
        assert cr.RoutingRecord.of(run(model, x)).path_log_prob.equal(record.path_log_prob)


def test_wrapped_models_and_parts_replay() -> None:
    model = Stack()
    record = cr.RoutingRecord.of(sampled(model, 0, hidden()))
    for given in (DistributedDataParallel(model), list(model.layers)):
        megatron.replay(given, record)
        assert mismatch(run(model, hidden()), record).tokens == 0
        megatron.replay(given, None)
        assert mismatch(sampled(model, 1, hidden()), record).tokens > 0


def test_the_expert_bias_moves_the_log_prob_of_a_replayed_decision() -> None:
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    layer = build_circuit(RULE, **settings)
    record = cr.RoutingRecord.of(run(layer, hidden()))
    megatron.replay(layer, record)
    layer.router.expert_bias[5] = 3.0
    (routing,) = run(layer, hidden())
    shifted = layer.router.gating(hidden()).view(T, E) + layer.router.expert_bias
    expected = cr.route(shifted, routing.distribution.circuit, replay=record.masks()[0][TOKEN])
    torch.testing.assert_close(routing.log_prob, expected.log_prob)
    assert torch.equal(routing.mask, expected.mask)


def test_another_number_of_tokens_is_refused() -> None:
    model = Stack()
    record = cr.RoutingRecord.of(sampled(model, 0, hidden()))
    megatron.replay(model, record[:5])
    with pytest.raises(ValueError, match=rf"this forward pass routes {T} tokens, and the record is of 5"):
        model(hidden())


def test_records_of_other_models_are_refused() -> None:
    model = Stack()
    record = cr.RoutingRecord.of(sampled(model, 0, hidden()))
    with pytest.raises(ValueError, match=r"record has layers of \[8, 8\] experts, and the model's routers \[8\]"):
        megatron.replay(model.layers[0], record)
    exact = Stack(cr.Exactly(4))
    with pytest.raises(ValueError, match=r"layer 0 has subsets that Exactly\(4\) forbids"):
        megatron.replay(exact, record)


def test_the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "megatron.md"
    blocks = re.findall(r"^ *```py\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(textwrap.dedent(block), str(page), "exec", dont_inherit=True), scope)
    model = Stack()
    megatron.begin_step(model, 0)
    record = scope["rollout"](model, hidden())
    loss = scope["train"](model, hidden(), record, torch.ones(T))
    assert loss.item() == pytest.approx(-1.0, abs=1e-5)
    loss.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.layers)


# ------------------------------------------------------------------------------------------------ Megatron's own


def with_replay(constraint: cr.Constraint = RULE) -> Stack:
    return Stack(constraint, moe_enable_routing_replay=True)


def act(action: RouterReplayAction | None) -> None:
    if action is None:
        RouterReplay.clear_global_router_replay_action()
    else:
        RouterReplay.set_global_router_replay_action(action)


@pytest.mark.parametrize("constraint", [RULE, cr.Exactly(4), cr.Between(0, 4)], ids=repr)
def test_router_replay_records_and_replays(constraint: cr.Constraint) -> None:
    model = with_replay(constraint)
    act(RouterReplayAction.RECORD)
    rollout = sampled(model, 0, hidden())
    indices = RouterReplay.get_recorded_data()
    made = cr.RoutingRecord.of_indices(indices, E)
    for routing, mask, rows in zip(rollout, made.masks(), indices, strict=True):
        assert rows.shape == (T, 4)
        assert torch.equal(routing.mask, mask)
        probable = torch.where(rows < 0, -torch.inf, routing.logits.gather(1, rows.clamp(min=0)))
        assert (probable.diff(dim=1).nan_to_num(0.0) <= 0).all(), "as a top-k has them"
    act(RouterReplayAction.REPLAY_FORWARD)
    RouterReplay.set_replay_data(indices)
    for routing, before in zip(sampled(model, 1, hidden()), rollout, strict=True):
        assert torch.equal(routing.mask, before.mask)
        torch.testing.assert_close(routing.log_prob, before.log_prob)
        torch.testing.assert_close(routing.gates, before.gates)
    act(None)
    assert mismatch(sampled(model, 1, hidden()), rollout).tokens > 0


def test_stock_routers_record_what_ours_replay() -> None:
    logits = torch.randn(S, B, E, generator=torch.Generator().manual_seed(2))
    stock = build(moe_enable_routing_replay=True)
    act(RouterReplayAction.RECORD)
    probs, routing_map = stock.router.routing(logits)
    indices = RouterReplay.get_recorded_data()
    RouterReplay.clear_global_router_replay_instances()
    layer = build_circuit(cr.Exactly(4), moe_enable_routing_replay=True)
    act(RouterReplayAction.REPLAY_FORWARD)
    RouterReplay.set_replay_data(indices)
    for training in (True, False):
        found, replayed = layer.train(training).router.routing(logits)
        assert torch.equal(replayed, routing_map)
        torch.testing.assert_close(found, probs)


def test_passes_that_wait_for_their_recomputation_replay_what_they_did() -> None:
    """Two forward passes before the first backward pass, as pipeline schedules run them."""
    batches = [hidden(), -hidden()]
    data = []
    for step, x in enumerate(batches):
        RouterReplay.clear_global_router_replay_instances()
        recording = with_replay()
        act(RouterReplayAction.RECORD)
        sampled(recording, step, x)
        data.append(RouterReplay.get_recorded_data())
    gradients = []
    for recompute in (False, True):
        RouterReplay.clear_global_router_replay_instances()
        model = with_replay()
        act(RouterReplayAction.REPLAY_FORWARD)
        outputs = []
        for x, indices in zip(batches, data, strict=True):
            RouterReplay.set_replay_data(indices)
            given = x.detach().requires_grad_()
            outputs.append(checkpoint(model, given, use_reentrant=True) if recompute else model(given))
        act(RouterReplayAction.REPLAY_BACKWARD)
        for output in outputs:
            output.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_what_router_replay_lacks_is_refused() -> None:
    model = with_replay()
    act(RouterReplayAction.REPLAY_FORWARD)
    with pytest.raises(
        ValueError, match=r"RouterReplay is to replay_forward and has no indices left: .*set_replay_data"
    ):
        model(hidden())
    act(RouterReplayAction.REPLAY_BACKWARD)
    with pytest.raises(ValueError, match=r"RouterReplay is to replay_backward and has no indices left"):
        model(hidden())
    act(RouterReplayAction.REPLAY_FORWARD)
    RouterReplay.set_replay_data([torch.zeros(5, 1, dtype=torch.int64)] * 2)
    with pytest.raises(ValueError, match=rf"RouterReplay has indices of 5 tokens, and this forward pass routes {T}"):
        model(hidden())
    RouterReplay.set_replay_data([torch.full((T, 1), -1)] * 2)
    with pytest.raises(ValueError, match=r"replay holds a subset that Between\(1, 4\)"):
        model(hidden())
    RouterReplay.set_replay_data([torch.zeros(T, 2, dtype=torch.int64)] * 2)
    with pytest.raises(ValueError, match=r"names an expert twice"):
        model(hidden())


def test_one_record_at_a_time() -> None:
    model = with_replay()
    act(RouterReplayAction.RECORD)
    record = cr.RoutingRecord.of(sampled(model, 0, hidden()))
    megatron.replay(model, record)
    model(hidden())
    assert torch.equal(
        cr.RoutingRecord.of_indices(RouterReplay.get_recorded_data(), E).masks()[0], record.masks()[0][TOKEN]
    )
    act(RouterReplayAction.REPLAY_FORWARD)
    RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
    with pytest.raises(ValueError, match=r"there are two records, .* such as by replay\(model, None\)"):
        model(hidden())
    megatron.replay(model, None)
    assert mismatch(run(model, hidden()), record).tokens == 0


def test_without_the_setting_there_is_no_router_replay() -> None:
    megatron.router(RULE)(config=configuration(), pg_collection=get_default_pg_collection())
    assert RouterReplay.global_router_replay_instances == []
