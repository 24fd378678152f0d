"""The baselines of the testbed, each against its paper's definition written out token by token."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")

from routing_testbed.baselines import (
    BalancedStudent,
    DefaultStudent,
    GrinRouter,
    LossFreeStudent,
    MicroBatchStudent,
    ReMoERouter,
    ReMoEStudent,
)
from routing_testbed.baselines import grin as grin_module
from routing_testbed.measures import normalised_error
from routing_testbed.methods import BALANCED, PUBLISHED, methods_of, usual_methods
from routing_testbed.setting import SHAPES, Setting, Shape
from routing_testbed.student import Student
from routing_testbed.task import Batch, Task
from routing_testbed.training import keys, new_student, training_step

import circuitroute as cr

TOKENS, EXPERTS, HIDDEN = 16, 6, 5
TINY = Setting(hidden=8, inner=8, steps=3, batch=32, held_out=256)
SHAPE = Shape(8, 2)


def layer(router: cr.Router) -> cr.MoE:
    torch.manual_seed(0)
    return cr.MoE(router, cr.StackedExperts(EXPERTS, HIDDEN, 4)).double()


def tokens(scale: float = 2.0) -> Tensor:
    return scale * torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expert_of(moe: cr.MoE, expert: int, x: Tensor) -> Tensor:
    experts = moe.experts
    assert isinstance(experts, cr.StackedExperts)
    return torch.nn.functional.gelu(x @ experts.up[expert].T) @ experts.down[expert].T


def assert_same_gradients(moe: cr.MoE, one: Tensor, other: Tensor) -> None:
    """Of the sum of squares, whose derivative differs from output to output; in every parameter."""
    ours, theirs = (torch.autograd.grad(value.square().sum(), list(moe.parameters())) for value in (one, other))
    for name, mine, naive in zip(dict(moe.named_parameters()), ours, theirs, strict=True):
        assert naive.any(), name
        assert torch.allclose(mine, naive, atol=1e-12), name


def batch_of(mask: Tensor, domain: Tensor | None = None) -> Batch:
    """A batch of which losses of a decision see no more than the domains."""
    return Batch(torch.zeros(len(mask), 1), torch.zeros(len(mask), 1), mask, domain)


def top_k_routing(logits: Tensor, k: int) -> cr.Routing:
    return cr.route(logits, cr.compile(cr.Exactly(k), logits.shape[-1]), estimator="none", training=False)


# ---------------------------------------------------------------------------------------------- ReMoE


def remoe(k: float = 1.5, **options: float) -> ReMoEStudent:
    return ReMoEStudent(layer(ReMoERouter(HIDDEN, EXPERTS, cr.AtMost(EXPERTS), bias=True)), k, **options)


def test_remoe_weighs_every_positive_logit_by_itself() -> None:
    student, hidden = remoe(), tokens()
    output, routing = student(hidden, keys(0, 0, TOKENS))
    rows = []
    for x in hidden:  # eq. 1 and 5
        y = torch.zeros(HIDDEN, dtype=torch.float64)
        for e in range(EXPERTS):
            logit = student.router.weight[e] @ x + student.router.bias[e]
            if logit > 0:
                y = y + logit * expert_of(student.moe, e, x)
        rows.append(y)
    assert torch.allclose(output, torch.stack(rows))
    assert len(routing.counts.unique()) > 2
    assert_same_gradients(student.moe, output, torch.stack(rows))
    assert torch.equal(student.eval()(hidden, keys(1, 0, TOKENS))[0], output)


def test_a_token_may_be_left_without_an_expert_by_remoe() -> None:
    student = remoe()
    with torch.no_grad():
        student.router.bias.fill_(-100)
    output, routing = student(tokens(), keys(0, 0, TOKENS))
    assert not output.any()
    assert not routing.mask.any()


def test_remoe_regularises_each_expert_in_proportion_to_its_load() -> None:
    student, hidden, k = remoe(k=1.5, first=0.25), tokens(), 1.5
    _, routing = student(hidden, keys(0, 0, TOKENS))
    logits = hidden @ student.router.weight.T + student.router.bias
    expected = torch.zeros((), dtype=torch.float64)
    for e in range(EXPERTS):  # eq. 10 and 11
        load = EXPERTS / (k * TOKENS) * sum(1 for t in range(TOKENS) if logits[t, e] > 0)
        for t in range(TOKENS):
            expected = expected + load * logits[t, e].relu() / TOKENS
    penalty = student.penalty(routing, batch_of(routing.mask))
    assert isinstance(penalty, Tensor)
    assert torch.allclose(penalty, 0.25 * expected)
    for mine, naive in zip(
        torch.autograd.grad(penalty, [student.router.weight, student.router.bias]),
        torch.autograd.grad(0.25 * expected, [student.router.weight, student.router.bias]),
        strict=True,
    ):
        assert torch.allclose(mine, naive)


def test_remoe_prices_by_the_sign_of_what_sparsity_lacks() -> None:
    student = remoe(k=1.5)
    assert student.coefficient == 1e-8
    circuit = cr.compile(cr.AtMost(EXPERTS), EXPERTS)

    def after(*counts: int) -> float:
        mask = torch.arange(EXPERTS) < torch.tensor(counts)[:, None]
        student.after(cr.Routing(circuit(torch.zeros(len(counts), EXPERTS)), mask, mask.float()))
        return student.coefficient

    assert after(2, 2) == pytest.approx(1e-8 * 1.2)  # sparsity 2/3 below 3/4
    assert after(6, 0) == pytest.approx(1e-8 * 1.2**2)
    assert after(1, 1) == pytest.approx(1e-8 * 1.2)
    assert after(2, 1) == pytest.approx(1e-8 * 1.2)  # just right
    assert after(0, 0) == pytest.approx(1e-8)


# ---------------------------------------------------------------------------------------------- Default MoE


def naive_default(moe: cr.MoE, hidden: Tensor, defaults: Tensor, decay: float, k: int) -> tuple[Tensor, Tensor]:
    """Eq. 10, then eq. 11 with what it gives."""
    router = moe.router
    assert isinstance(router, cr.Router)
    shares = [(router.weight @ x).softmax(-1) for x in hidden]
    chosen = [set(share.topk(k).indices.tolist()) for share in shares]
    moved = []
    for e in range(EXPERTS):
        seen = [expert_of(moe, e, x).detach() for x, experts in zip(hidden, chosen, strict=True) if e in experts]
        moved.append(decay * defaults[e] + (1 - decay) * sum(seen) / len(seen) if seen else defaults[e])
    rows = []
    for x, share, experts in zip(hidden, shares, chosen, strict=True):
        parts = [share[e] * (expert_of(moe, e, x) if e in experts else moved[e]) for e in range(EXPERTS)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows), torch.stack(moved)


@pytest.mark.parametrize("k", [1, 2])
def test_default_moe_stands_in_moving_averages_for_the_unchosen(k: int) -> None:
    student, hidden = DefaultStudent(layer(cr.TopKRouter(HIDDEN, EXPERTS, k))), tokens()
    student.defaults = student.defaults.double()
    expected = student.defaults
    for step in range(3):
        part = hidden[2 * step : 2 * step + 2]  # at most four of six experts get a token
        output, _ = student(part, keys(0, step, 2))
        value, expected = naive_default(student.moe, part, expected, 0.9, k)
        assert torch.allclose(student.defaults, expected)
        assert torch.allclose(output, value)
    assert_same_gradients(student.moe, output, value)


def test_default_moe_keeps_its_averages_in_evaluation_and_still_uses_them() -> None:
    student, hidden = DefaultStudent(layer(cr.TopKRouter(HIDDEN, EXPERTS, 2))), tokens()
    student.defaults = torch.randn(EXPERTS, HIDDEN, dtype=torch.float64)
    before = student.defaults.clone()
    output, routing = student.eval()(hidden, keys(0, 0, TOKENS))
    assert torch.equal(student.defaults, before)
    plain, _ = student.moe(hidden)
    unchosen = routing.logits.softmax(-1) * ~routing.mask
    assert torch.allclose(output, plain + unchosen @ before)
    assert not torch.allclose(output, plain)


# ---------------------------------------------------------------------------------------------- GRIN


def grin(k: int) -> Student:
    return Student(layer(GrinRouter(HIDDEN, EXPERTS, cr.Exactly(k))))


def naive_masked(logits: list[float]) -> list[float]:
    """The masked softmax of the logits that are not -inf."""
    largest = max(logits)
    close = [
        z > -math.inf and (largest - z) / max(abs(z), largest) <= 2 * grin_module.SPREAD if z != largest else True
        for z in logits
    ]
    weights = [math.exp(z - largest) if kept else 0.0 for z, kept in zip(logits, close, strict=True)]
    return [weight / sum(weights) for weight in weights]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spread at which several experts may be drawn, here where logits are far apart."""
    monkeypatch.setattr(grin_module, "SPREAD", 0.3)


@pytest.mark.parametrize("spread", [0.01, 0.3])
@pytest.mark.parametrize("shift", [0.0, -5.0])  # -5: where all logits are negative
def test_the_masked_softmax_is_over_what_is_close_to_the_largest(
    spread: float, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grin_module, "SPREAD", spread)
    logits = torch.randn(200, EXPERTS, dtype=torch.float64) + shift
    logits[::2] = logits[::2, :1] + 0.01 * logits[::2]
    taken = torch.zeros_like(logits, dtype=torch.bool)
    taken[50:, 2] = True
    found = grin_module.masked_softmax(logits, taken)
    expected = [naive_masked(row) for row in logits.masked_fill(taken, -torch.inf).tolist()]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))
    sizes = (found > 0).sum(-1)
    assert (sizes.min(), sizes.max() > 2) == (1, True)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.usefixtures("wide")
def test_grin_is_the_masked_softmax_scaled_in_value_alone(k: int) -> None:
    """Algorithms 1 and 3, for what was drawn; the experts see the scaled weight, as in the authors' code."""
    student, hidden = grin(k), tokens().repeat(8, 1)
    torch.manual_seed(3)
    output, routing = student(hidden, keys(0, 0, len(hidden)))
    assert routing.counts.eq(k).all()
    weight, rows, scales = student.router.weight, [], []
    for t, x in enumerate(hidden):
        logits = weight @ x
        y, left = torch.zeros(HIDDEN, dtype=torch.float64), logits
        for expert in order_of(routing, t, logits.detach()):
            share = close_softmax(left)
            scale = float((routing.gates[t, expert] / share[expert]).detach())
            scales.append((scale, expert == int(share.argmax())))
            y = y + (share[expert] + (scale - 1) * share[expert].detach()) * expert_of(student.moe, expert, x)
            left = torch.where(torch.arange(EXPERTS) == expert, -torch.inf, left)
        rows.append(y)
    assert torch.allclose(output, torch.stack(rows))
    assert_same_gradients(student.moe, output, torch.stack(rows))
    assert all(scale == pytest.approx(1) for scale, best in scales if best)
    others = [scale for scale, best in scales if not best]
    assert all(min(abs(scale - 1), abs(scale - 1 / 3)) < 1e-6 for scale in others)
    full = sum(scale > 0.5 for scale in others)
    # A quarter of them, within four standard deviations: 6e-5.
    assert abs(full - len(others) / 4) < 4 * math.sqrt(len(others) * 3 / 16)
    assert len(others) > 20


def close_softmax(left: Tensor) -> Tensor:
    """The masked softmax of one token, differentiable."""
    kept = torch.tensor(naive_masked(left.tolist())) > 0
    return left.masked_fill(~kept, -torch.inf).softmax(-1)


def order_of(routing: cr.Routing, token: int, logits: Tensor) -> list[int]:
    """The order in which a token's experts were drawn: the one in which every gate is the share, or a third of it."""
    chosen = routing.mask[token].nonzero()[:, 0].tolist()
    for order in (chosen, chosen[::-1]):
        left, right = logits, True
        for expert in order:
            share = close_softmax(left)[expert]
            ratio = float(routing.gates[token, expert].detach() / share) if share > 0 else math.inf
            right = right and min(abs(ratio - 1), abs(ratio - 1 / 3)) < 1e-6
            left = torch.where(torch.arange(EXPERTS) == expert, -torch.inf, left)
        if right:
            return list(order)
    raise AssertionError(f"no order of {chosen} explains the gates of token {token}")


@pytest.mark.usefixtures("wide")
def test_grin_draws_by_the_masked_softmax_and_takes_its_mode_in_evaluation() -> None:
    student = grin(1)
    shares = torch.tensor([naive_masked((student.router.weight @ x).tolist()) for x in tokens()], dtype=torch.float64)
    token = int((shares > 0.05).sum(-1).argmax())
    share = shares[token]
    assert (share > 0.05).sum() > 2
    torch.manual_seed(0)
    drawn = student.router(tokens()[token].repeat(20_000, 1)).mask.double().mean(0)
    assert (drawn - share).abs().max() < 4 * 0.5 / math.sqrt(20_000)  # per expert 6e-5
    for k in (1, 2):
        student = grin(k).eval()
        routing = student.router(tokens())
        for t, x in enumerate(tokens()):
            left = (student.router.weight @ x).tolist()
            for _ in range(k):
                best = left.index(max(left))
                assert float(routing.gates[t, best].detach()) == pytest.approx(naive_masked(left)[best])
                left[best] = -math.inf
        assert routing.counts.eq(k).all()


# ---------------------------------------------------------------------------------------------- balance


def test_the_loss_over_the_batch_is_that_of_synchronised_micro_batches() -> None:
    """Qiu et al., eq. 4 to 6; and each of 8 micro-batches by itself, eq. 3; and buffered, algorithm 1."""
    torch.manual_seed(0)
    logits = (torch.randn(32, EXPERTS, dtype=torch.float64) + torch.arange(EXPERTS)).requires_grad_()
    routing, domain = top_k_routing(logits, 2), torch.randint(3, (32,))
    mask, batch = routing.mask, batch_of(routing.mask, domain)
    by_domain = sorted(range(32), key=lambda t: int(domain[t]))  # stable
    parts = [by_domain[4 * j : 4 * j + 4] for j in range(8)]

    def share(tokens: list[int], e: int) -> float:
        return sum(int(mask[t, e]) for t in tokens) / (2 * len(tokens))

    def probability(tokens: list[int], e: int) -> Tensor:
        return torch.stack([logits[t].softmax(-1)[e] for t in tokens]).mean()

    def loss(seen: list[list[int]]) -> Tensor:
        each = [
            EXPERTS * sum(share(tokens, e) * probability(part, e) for e in range(EXPERTS))
            for tokens, part in zip(seen, parts, strict=True)
        ]
        return 0.01 * torch.stack([torch.as_tensor(value) for value in each]).mean()

    moe = layer(cr.TopKRouter(HIDDEN, EXPERTS, 2))
    so_far = [[t for part in parts[: j + 1] for t in part] for j in range(8)]
    found = []
    for student, expected in (
        (BalancedStudent(moe), loss([by_domain] * 8)),
        (MicroBatchStudent(moe), loss(parts)),
        (MicroBatchStudent(moe, buffered=True), loss(so_far)),
    ):
        penalty = student.penalty(routing, batch)
        assert isinstance(penalty, Tensor)
        assert torch.allclose(penalty, expected)
        ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (penalty, expected))
        assert torch.allclose(ours, theirs)
        found.append(float(penalty.detach()))
    assert len(set(found)) == 3


def test_micro_batches_are_of_neighbours_where_there_are_no_domains() -> None:
    logits = torch.randn(32, EXPERTS, dtype=torch.float64)
    routing = top_k_routing(logits, 2)
    each = [cr.losses.load_balance(top_k_routing(part, 2), "softmax") for part in logits.split(4)]
    penalty = MicroBatchStudent(layer(cr.TopKRouter(HIDDEN, EXPERTS, 2))).penalty(routing, batch_of(routing.mask))
    assert float(penalty) == pytest.approx(0.01 * float(torch.stack(each).mean()))


def test_balance_of_probes_is_of_their_exact_tempered_marginals() -> None:
    task = Task(SHAPE, TINY, 0)
    batch = next(task.batches())
    student = new_student(task, "probe-balance")
    _, routing = student(batch.hidden, keys(0, 0, 32))
    share = routing.mask.float().mean(0) / 2
    marginals = student.router.circuit(routing.logits / 0.25).marginals
    expected = 0.01 * 8 * (share * marginals.mean(0) / 2).sum()
    penalty = student.penalty(routing, batch)
    assert isinstance(penalty, Tensor)
    assert float(penalty.detach()) == pytest.approx(float(expected.detach()))


def test_a_training_step_takes_the_penalty_along() -> None:
    task = Task(SHAPE, replace(TINY, batch=64), 0)
    batch, key = next(task.batches()), keys(0, 0, 64)
    student, other = (new_student(task, "balance") for _ in range(2))
    output, routing = other(batch.hidden, key)
    (normalised_error(output, batch.target) + other.penalty(routing, batch)).backward()
    training_step(student, torch.optim.SGD(student.parameters(), lr=1.0), batch, key)
    for moved, start in zip(student.parameters(), other.parameters(), strict=True):
        assert start.grad is not None
        assert torch.allclose(moved, start - start.grad)
    assert Student.penalty(student, routing, batch) == 0


@pytest.mark.parametrize("name", ["probe-bias", "probes-all-bias", "densemixer-bias"])
def test_probes_under_a_bias_choose_by_it_and_weigh_without(name: str) -> None:
    task = Task(SHAPE, TINY, 0)
    batch = next(task.batches())
    student = new_student(task, name)
    assert isinstance(student, LossFreeStudent)
    student._bias = torch.tensor([5.0] + [0.0] * 7)
    _, routing = student(batch.hidden, keys(0, 0, 32))
    assert routing.mask[:, 0].all()
    assert torch.allclose(routing.gates.detach(), routing.logits.softmax(-1) * routing.mask)
    shifted = student.router.circuit((routing.logits + student._bias) / 0.25)
    assert torch.allclose(routing.marginals, shifted.marginals, atol=1e-6)


def test_further_methods_are_run_on_request_alone() -> None:
    for shape in SHAPES.values():
        assert not {*PUBLISHED, *BALANCED} & set(usual_methods(shape))
        assert set(usual_methods(shape)) <= set(methods_of(shape))
    assert {*PUBLISHED, *BALANCED} < set(methods_of(SHAPES["64x4"]))
    assert "gumbel" in usual_methods(SHAPES["16x1"])
