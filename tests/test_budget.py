"""BudgetRouter: budgets over layers that every token keeps, and the joint distribution they come from.

Legend: T tokens, L layers, E experts, J counts, M paths (all subsets of all layers).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.layers.budget import BudgetState, log_count_polynomial
from circuitroute.layers.budget_router import BudgetRouter

H = 6


def _walk(
    budget: BudgetRouter,
    hidden_LTH: Tensor,
    seed: int = 0,
    replay: Sequence[Tensor] | None = None,
    estimates: Tensor | None = None,
) -> list[cr.Routing]:
    state, routings = budget.begin(hidden_LTH[0], estimates), []
    for layer, hidden in enumerate(hidden_LTH):
        key = cr.random_key(seed, layer, torch.arange(len(hidden)))
        routing, state = budget(hidden, state, key=key, replay=None if replay is None else replay[layer], layer=layer)
        routings.append(routing)
    assert torch.equal(state.spent, torch.stack([r.counts for r in routings]).sum(0))
    return routings


def _random(budget: BudgetRouter, seed: int = 0, scale: float = 1.0) -> BudgetRouter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in budget.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return budget


def _hidden(layers: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(layers, tokens, H, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------- the joint distribution

CASES = [
    (2, 3, cr.Between(0, 3), cr.AtMost(3)),
    (3, 3, cr.Between(0, 2), cr.Between(2, 4)),
    (3, 2, cr.Between(1, 2), cr.Exactly(4)),
    (2, 4, cr.CountIn({0, 2, 3}), cr.CountIn({2, 5})),
]


def _paths(layers: int, experts: int) -> Tensor:
    """[M, L, E] bool, every choice of a subset in every layer."""
    worlds = list(itertools.product([False, True], repeat=layers * experts))
    return torch.tensor(worlds).reshape(-1, layers, experts)


@pytest.mark.parametrize("preferring", [False, True], ids=["plain", "with preferences"])
@pytest.mark.parametrize(("layers", "experts", "per_layer", "total"), CASES)
def test_layer_by_layer_is_the_joint_distribution(
    layers: int, experts: int, per_layer: cr.Constraint, total: cr.Constraint, preferring: bool
) -> None:
    """Given the true polynomials of later layers, by enumeration of every path: it is LayerBudget's circuit."""
    budget = BudgetRouter(H, experts, layers, per_layer, total, dtype=torch.float64).double()
    if preferring:
        _random(budget)
    hidden_LTH = _hidden(layers, 1)
    logits_LE = torch.cat([r.logits(h) for r, h in zip(budget.routers, hidden_LTH, strict=True)])
    paths_MLE = _paths(layers, experts)
    J = budget.preferences.shape[1]
    counts_ML = paths_MLE.sum(-1)
    counts = cr.compile(per_layer, experts).counts
    totals = cr.compile(total, layers * experts).counts
    assert counts is not None
    assert totals is not None
    allowed_M = torch.tensor(
        [all(c in counts for c in row) and sum(row) in totals for row in counts_ML.tolist()], dtype=torch.bool
    )
    preference_M = budget.preferences[torch.arange(layers), counts_ML.clamp(max=J - 1)].sum(-1)
    scores_M = (paths_MLE * logits_LE).sum((-1, -2)) + preference_M
    truth_M = torch.where(allowed_M, scores_M, -math.inf).log_softmax(0)

    polynomials = log_count_polynomial(logits_LE, J - 1)[None].expand(int(allowed_M.sum()), -1, -1)
    tried_MLE = paths_MLE[allowed_M]
    routings = _walk(
        budget,
        hidden_LTH.expand(-1, len(tried_MLE), -1),
        replay=list(tried_MLE.unbind(1)),
        estimates=polynomials,
    )
    torch.testing.assert_close(budget.log_prob(routings), truth_M[allowed_M], atol=1e-10, rtol=1e-10)
    if not preferring and isinstance(per_layer, cr.Between):
        circuit = cr.compile(cr.LayerBudget(layers, experts, per_layer, total), layers * experts)
        joint = circuit(logits_LE.reshape(-1)).log_prob(tried_MLE.reshape(len(tried_MLE), -1))
        torch.testing.assert_close(budget.log_prob(routings), joint, atol=1e-10, rtol=1e-10)


def test_samples_follow_the_joint_distribution() -> None:
    """40,000 sampled paths against the exact probabilities: chi-squared, false alarm below 1e-4."""
    torch.manual_seed(0)
    budget = _random(BudgetRouter(H, 2, 2, cr.Between(0, 2), cr.Between(1, 3), dtype=torch.float64).double())
    hidden_LTH = _hidden(2, 1)
    logits_LE = torch.cat([r.logits(h) for r, h in zip(budget.routers, hidden_LTH, strict=True)])
    estimates = log_count_polynomial(logits_LE, 2)
    T = 40_000
    routings = _walk(budget, hidden_LTH.expand(-1, T, -1), seed=5, estimates=estimates)
    codes = sum(routing.mask[:, e] * 2 ** (2 * layer + e) for layer, routing in enumerate(routings) for e in range(2))
    assert isinstance(codes, Tensor)
    seen = codes.bincount(minlength=16)
    exact = torch.zeros(16, dtype=torch.float64)
    exact[codes] = budget.log_prob(routings).exp().detach()
    assert abs(float(exact.sum()) - 1) < 1e-9  # every allowed path was seen
    expected = T * exact
    used = expected > 0
    assert int(used.sum()) == 14
    chi_squared = float(((seen[used] - expected[used]).square() / expected[used]).sum())
    assert chi_squared < 42.0  # 13 degrees of freedom: exceeded with probability 6e-5


def test_count_polynomials_by_enumeration() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0], [500.0, -500.0, 1.0, -math.inf]])
    found = log_count_polynomial(logits, 5)
    for row, exact in zip(logits.double(), found, strict=True):
        for j in range(6):
            subsets = [torch.stack([row[i] for i in s]).sum() for s in itertools.combinations(range(4), j) if s]
            sums = torch.stack(subsets) if subsets else torch.tensor([0.0 if j == 0 else -math.inf]).double()
            torch.testing.assert_close(exact[j], sums.logsumexp(0), atol=1e-9, rtol=1e-12)
    leaf = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_count_polynomial(leaf, 3)[:, 2].sum(), leaf)
    torch.testing.assert_close(gradient, cr.compile(cr.Exactly(2), 5)(leaf).marginals.detach())


# ---------------------------------------------------------------------------------------------- every token, always


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_token_keeps_the_budget(data: st.DataObject) -> None:
    """Whatever the parameters, in training and in evaluation: each layer's rule, and the total."""
    layers, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    counts = st.sets(st.integers(0, experts), min_size=1)
    per_layer = [cr.CountIn(data.draw(counts)) for _ in range(layers)]
    totals = data.draw(st.sets(st.integers(0, layers * experts), min_size=1))
    scale = data.draw(st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
    try:
        budget = BudgetRouter(H, experts, layers, per_layer, cr.CountIn(totals), per_token=data.draw(st.booleans()))
    except cr.InfeasibleError:
        allowed = [sorted(c.counts) for c in per_layer]
        assert not any(sum(path) in totals for path in itertools.product(*allowed))
        return
    _random(budget, seed=layers, scale=scale).train(data.draw(st.booleans()))
    routings = _walk(budget, _hidden(layers, 50, dtype=torch.float32), seed=data.draw(st.integers(0, 99)))
    for rule, routing in zip(per_layer, routings, strict=True):
        assert set(routing.counts.tolist()) <= set(rule.counts)
    assert set(torch.stack([r.counts for r in routings]).sum(0).tolist()) <= totals
    assert bool((budget.log_prob(routings) <= 1e-5).all())


def test_none_of_many_tokens_is_over_budget() -> None:
    budget = _random(BudgetRouter(H, 16, 8, cr.Between(1, 8), cr.Between(20, 32)), scale=0.5)
    with torch.no_grad():
        routings = _walk(budget, _hidden(8, 100_000, dtype=torch.float32))
    total = torch.stack([r.counts for r in routings]).sum(0)
    assert int((total > 32).sum()) == 0
    assert int((total < 20).sum()) == 0
    assert total.unique().numel() > 5  # the budget leaves room, and it is used


def test_evaluation_takes_the_likeliest_count_and_its_best_subset() -> None:
    budget = _random(BudgetRouter(H, 8, 3, cr.Between(1, 6), cr.AtMost(9))).eval()
    routings = _walk(budget, _hidden(3, 200, dtype=torch.float32))
    for routing in routings:
        assert torch.equal(routing.counts, routing.distribution.count_probs.argmax(-1))
        top = routing.logits.argsort(-1, descending=True)
        rank = torch.arange(8) < routing.counts[:, None]
        assert torch.equal(torch.zeros_like(routing.mask).scatter(1, top, rank), routing.mask)
    again = _walk(budget, _hidden(3, 200, dtype=torch.float32), seed=1)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(routings, again, strict=True))


def test_evaluation_spends_evenly_where_nothing_is_preferred() -> None:
    """Zero logits in all layers: the early ones get no less than the late ones (the plain mode would starve them)."""
    budget = BudgetRouter(H, 16, 4, cr.Between(1, 12), cr.AtMost(16)).eval()
    with torch.no_grad():
        for layer in range(4):
            budget.router(layer).weight.zero_()
    counts = [r.counts[0].item() for r in _walk(budget, _hidden(4, 1, dtype=torch.float32))]
    assert sum(counts) == 16
    assert max(counts) - min(counts) <= 1


# ---------------------------------------------------------------------------------------------- learning


def test_gradients_reach_all_that_is_learned() -> None:
    budget = _random(BudgetRouter(H, 4, 3, cr.Between(0, 3), cr.Between(2, 6), per_token=True, dtype=torch.float64))
    budget = budget.double()
    hidden_LTH = _hidden(3, 5).requires_grad_()
    replay = [r.mask for r in _walk(budget, hidden_LTH, seed=3)]

    def loss(*values: Tensor) -> Tensor:
        names = [name for name, _ in budget.named_parameters()]
        hidden, *rest = values
        state = dict(zip(names, rest, strict=True))
        named = {f"budget.{name}": value for name, value in state.items()}
        return torch.func.functional_call(_Path(budget, replay), named, (hidden,))

    values = [hidden_LTH, *budget.parameters()]
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(loss(*values), values)
    for value, gradient in zip(values, gradients, strict=True):
        assert float(gradient.abs().max()) > 0, value.shape


class _Path(nn.Module):
    """The log-probability of a recorded path, summed over tokens."""

    def __init__(self, budget: BudgetRouter, replay: Sequence[Tensor]) -> None:
        super().__init__()
        self.budget, self.replay = budget, replay

    def forward(self, hidden_LTH: Tensor) -> Tensor:
        return self.budget.log_prob(_walk(self.budget, hidden_LTH, replay=self.replay)).sum()


def test_estimates_learn_the_true_polynomials() -> None:
    """The loss vanishes at the truth, and its gradient leads there."""
    budget = BudgetRouter(H, 6, 3, cr.Between(0, 4), cr.AtMost(8)).double()
    hidden_LTH = _hidden(3, 1).expand(-1, 300, -1) * 2
    logits_LE = torch.cat([r.logits(h[:1]) for r, h in zip(budget.routers, hidden_LTH, strict=True)])
    truth_LJ = log_count_polynomial(logits_LE, 4).detach()
    with torch.no_grad():
        before = float(budget.estimation_loss(_walk(budget, hidden_LTH)))
        start = budget.estimates.clone()
        budget.estimates.copy_(truth_LJ + 3.0)  # a constant makes no difference
        assert float(budget.estimation_loss(_walk(budget, hidden_LTH))) < 1e-12
        budget.estimates.copy_(start)
    optimizer = torch.optim.Adam([budget.estimates], lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        budget.estimation_loss(_walk(budget, hidden_LTH, seed=step)).backward()
        optimizer.step()
    with torch.no_grad():
        after = float(budget.estimation_loss(_walk(budget, hidden_LTH, seed=999)))
    assert before > 1e-3
    assert after < 0.02 * before


def test_the_estimation_loss_teaches_the_estimates_alone() -> None:
    budget = _random(BudgetRouter(H, 4, 3, cr.Between(0, 3), cr.AtMost(6), per_token=True).double())
    budget.estimation_loss(_walk(budget, _hidden(3, 20))).backward()
    taught = {name for name, p in budget.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert taught == {"estimates"}


def test_the_expected_count_can_be_moved_inside_the_range() -> None:
    budget = BudgetRouter(H, 8, 3, cr.Between(0, 8), cr.AtMost(20))
    hidden = _hidden(3, 256, dtype=torch.float32)
    optimizer = torch.optim.Adam(budget.parameters(), lr=0.05)
    for step in range(120):
        routings = _walk(budget, hidden, seed=step)
        expected = torch.stack([cr.losses.expected_count(r) for r in routings]).sum()
        optimizer.zero_grad()
        (expected - 6).square().backward()
        optimizer.step()
    with torch.no_grad():
        totals = torch.stack([r.counts for r in _walk(budget, hidden, seed=999)]).sum(0).double()
    assert abs(float(totals.mean()) - 6) < 0.5


def test_a_layer_that_is_worth_more_learns_to_take_more() -> None:
    """With an exact total, a reward for the experts of the last layer moves the budget there through the messages."""
    budget = BudgetRouter(H, 8, 3, cr.Between(1, 8), cr.Exactly(9))
    hidden = _hidden(3, 256, dtype=torch.float32)
    optimizer = torch.optim.Adam([budget.preferences], lr=0.1)
    for step in range(60):
        routings = _walk(budget, hidden, seed=step)
        optimizer.zero_grad()
        reward = routings[2].counts.double()
        (-((reward - reward.mean()) * budget.log_prob(routings)).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        first, _, last = (r.counts.double().mean() for r in _walk(budget, hidden, seed=999))
    assert float(last) > 5.5
    assert float(first) < 2.5


# ---------------------------------------------------------------------------------------------- inside a model


class _Model(nn.Module):
    """Layers of which only some route, with or without recomputation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.budget = BudgetRouter(H, 4, 2, cr.Between(1, 3), cr.AtMost(4))
        self.dense = nn.ModuleList(nn.Linear(H, H) for _ in range(4))
        self.sparse = nn.ModuleList(cr.MoE(None, [nn.Linear(H, H) for _ in range(4)]) for _ in range(2))

    def forward(self, hidden: Tensor, seed: int) -> tuple[Tensor, BudgetState]:
        state = self.budget.begin(hidden)
        for number, dense in enumerate(self.dense):
            hidden = hidden + dense(hidden).tanh()
            if number % 2:
                hidden, state = self._run(hidden, state, number // 2, cr.random_key(seed, number, torch.arange(12)))
        return hidden, state

    def _run(self, hidden: Tensor, state: BudgetState, layer: int, key: Tensor) -> tuple[Tensor, BudgetState]:
        def routed(hidden: Tensor, spent: Tensor, messages: Tensor) -> tuple[Tensor, Tensor]:
            routing, after = self.budget(hidden, BudgetState(layer, spent, messages), key=key)
            return self.sparse[layer](hidden, routing=routing)[0], after.spent

        if self.how == "plain":
            output, spent = routed(hidden, state.spent, state.messages)
        else:
            output, spent = checkpoint(
                routed, hidden, state.spent, state.messages, use_reentrant=self.how == "reentrant"
            )
        return output, BudgetState(layer + 1, spent, state.messages)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_recomputed_layers_give_the_same_gradients(how: str) -> None:
    torch.manual_seed(0)
    plain, other = _Model("plain"), _Model(how)
    other.load_state_dict(plain.state_dict())
    hidden = torch.randn(3, 4, H)
    results = []
    for model in (plain, other):
        output, state = model(hidden, 7)
        assert int(state.spent.max()) <= 4
        assert state.layer == 2
        output.square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert any(g is not None and float(g.abs().max()) > 0 for g in results[0])
    for expected, found in zip(*results, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_state_belongs_to_the_caller() -> None:
    """Two passes interleaved, and a layer run twice from the same state, do not disturb one another."""
    budget = _random(BudgetRouter(H, 4, 2, cr.Between(1, 3), cr.Exactly(4)))
    hidden = _hidden(2, 30, dtype=torch.float32)
    whole = _walk(budget, hidden)
    before = {name: value.clone() for name, value in budget.state_dict().items()}
    keys = [cr.random_key(0, layer, torch.arange(30)) for layer in range(2)]
    first, second = budget.begin(hidden[0]), budget.begin(hidden[0])
    _, after_first = budget(hidden[0], first, key=keys[0])
    _, after_second = budget(hidden[0], second, key=keys[0])
    budget(hidden[0], first, key=keys[0])
    for state in (after_second, after_first):
        routing, _ = budget(hidden[1], state, key=keys[1])
        assert torch.equal(routing.mask, whole[1].mask)
    assert all(torch.equal(value, before[name]) for name, value in budget.state_dict().items())


def test_a_batch_decides_as_its_tokens_do_alone() -> None:
    budget = _random(BudgetRouter(H, 4, 2, cr.Between(1, 3), cr.AtMost(5)))
    hidden = _hidden(2, 9, dtype=torch.float32)
    whole = _walk(budget, hidden)
    for t in range(9):
        state = budget.begin(hidden[0, t : t + 1])
        for layer in range(2):
            key = cr.random_key(0, layer, torch.tensor([t]))
            routing, state = budget(hidden[layer, t : t + 1], state, key=key)
            assert torch.equal(routing.mask[0], whole[layer].mask[t])


def test_leading_dimensions_are_tokens() -> None:
    budget = _random(BudgetRouter(H, 4, 2, cr.Between(1, 3), cr.AtMost(5), per_token=True))
    hidden = torch.randn(2, 5, H)
    key = cr.random_key(3, torch.arange(10))
    state = budget.begin(hidden)
    a, _ = budget(hidden, state, key=key.reshape(2, 5))
    b, _ = budget(hidden.reshape(10, H), state, key=key)
    assert torch.equal(a.mask, b.mask)


def test_low_precision_hidden_states() -> None:
    budget = BudgetRouter(H, 4, 2, cr.Between(1, 3), cr.AtMost(5), per_token=True, dtype=torch.bfloat16)
    routing, state = budget(torch.randn(5, H, dtype=torch.bfloat16), budget.begin(torch.randn(5, H)), key=1)
    assert routing.logits.dtype == torch.float32
    assert state.messages.dtype == torch.float64
    routing.gates.sum().backward()
    assert budget.estimates.grad is not None


@pytest.mark.parametrize("decide", ["sample", "mode"])
def test_a_budget_alone_is_the_routers_without_their_maps(decide: str) -> None:
    router = _random(BudgetRouter(H, 4, 3, [cr.Between(1, 3), cr.Exactly(2), cr.Between(0, 4)], cr.AtMost(7)))
    budget = router.without_routers()
    assert type(budget) is cr.Budget
    assert dict(budget.named_parameters()).keys() == {"preferences", "estimates"}
    assert all(value is getattr(router, name) for name, value in budget.named_parameters())
    hidden = _hidden(3, 50, dtype=torch.float32)
    state, other = router.begin(hidden[0]), budget.begin(hidden[0])
    for layer in range(3):
        key = cr.random_key(0, layer, torch.arange(50))
        logits, circuit = router.router(layer).logits(hidden[layer]), router.router(layer).circuit
        potential = budget.potential(other)
        assert torch.equal(potential, router.potential(state, hidden[layer]))
        routing = cr.route(logits, circuit, count_potential=potential, key=key, training=decide == "sample")
        if decide == "sample":
            assert torch.equal(routing.mask, router(hidden[layer], state, key=key)[0].mask)
        state, other = router.spend(state, routing), budget.spend(other, routing)
    assert int(other.spent.max()) <= 7
    with pytest.raises(ValueError, match=r"state\.layer=3: all 3 layers"):
        budget.potential(other)
    headed = BudgetRouter(H, 4, 2, cr.Between(1, 3), cr.AtMost(5), per_token=True)
    with pytest.raises(ValueError, match="per_token=True"):
        headed.without_routers()
    with pytest.raises(ValueError, match="hidden=None"):
        headed.potential(headed.begin(hidden[0]))


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((H, 4, 3, cr.Between(2, 4), cr.AtMost(5)), cr.InfeasibleError, r"between 6 and 12.*Between\(2, 4\).*3 of 3"),
        ((H, 4, 3, cr.Between(0, 2), cr.Exactly(7)), cr.InfeasibleError, r"total=Exactly\(7\)"),
        ((H, 4, 3, cr.Between(0, 2), cr.Exactly(13)), cr.InfeasibleError, r"total=Exactly\(13\)"),
        ((H, 4, 2, cr.CountIn({0, 2}), cr.Exactly(3)), cr.InfeasibleError, r"Exactly\(3\)"),
        ((H, 4, 3, cr.Exactly(5), cr.AtMost(20)), cr.InfeasibleError, "Exactly"),
        ((H, 4, 3, [cr.Exactly(1)], cr.AtMost(20)), ValueError, "per_layer has 1 entries.*layers=3"),
        ((H, 4, 3, 2, cr.AtMost(20)), TypeError, "per_layer=2"),
        ((H, 4, 3, cr.Exactly(1), 7), TypeError, "total=7"),
        ((H, 4, 3, cr.ActiveGroups(cr.Groups(2), at_most=1), cr.AtMost(9)), TypeError, r"per_layer\[0\]"),
        ((H, 4, 0, cr.Exactly(1), cr.AtMost(9)), ValueError, "layers=0"),
    ],
)
def test_plans_that_cannot_work(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BudgetRouter(*arguments)  # type: ignore[arg-type]


def _two_layers() -> BudgetRouter:
    return BudgetRouter(H, 4, 2, cr.Between(1, 3), cr.AtMost(5))


def _too_many(budget: BudgetRouter) -> None:
    hidden, state = torch.randn(3, H), budget.begin(torch.randn(3, H))
    for _ in range(3):
        _, state = budget(hidden, state, key=0)


def _out_of_order(budget: BudgetRouter) -> None:
    budget(torch.randn(3, H), budget.begin(torch.randn(3, H)), layer=1)


def _other_tokens(budget: BudgetRouter) -> None:
    budget(torch.randn(4, H), budget.begin(torch.randn(3, H)))


def _other_width(budget: BudgetRouter) -> None:
    budget(torch.randn(4, H + 1), budget.begin(torch.randn(4, H)))


def _other_estimates(budget: BudgetRouter) -> None:
    budget.begin(torch.randn(4, H), estimates=torch.zeros(2, 3))


def _half_a_path(budget: BudgetRouter) -> None:
    routing, _ = budget(torch.randn(4, H), budget.begin(torch.randn(4, H)))
    budget.log_prob([routing])


def _another_router(budget: BudgetRouter) -> None:
    budget.estimation_loss([cr.ExactKRouter(H, 4, 2)(torch.randn(3, H))] * 2)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (_too_many, "state.layer=2: all 2 layers"),
        (_out_of_order, "layer=1: the next one is layer 0"),
        (_other_tokens, "hidden has 4 tokens and state 3"),
        (_other_width, "hidden_size=6"),
        (_other_estimates, r"estimates have shape \(2, 3\)"),
        (_half_a_path, "routings has 1 entries"),
        (_another_router, "routings hold a decision of another router.* give those that this budget decided"),
    ],
)
def test_misuse_is_named(misuse: Callable[[BudgetRouter], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse(_two_layers())


def test_a_replayed_path_must_keep_the_budget() -> None:
    budget = _two_layers()
    state = budget.begin(torch.randn(1, H))
    _, state = budget(torch.randn(1, H), state, replay=torch.tensor([[True, True, True, False]]))
    with pytest.raises(ValueError, match="replay"):
        budget(torch.randn(1, H), state, replay=torch.tensor([[True, True, True, False]]))
