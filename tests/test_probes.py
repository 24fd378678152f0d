"""Probes: what they teach the gates is what running all experts would, in expectation, and they change nothing else.

Legend: T tokens, H hidden size, E experts, P probes per token; u the uniforms that probes are drawn with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.routing import probes as probes_module
from circuitroute.routing.probes import draw_probes, every_unchosen

H, E, T = 3, 5, 12
COMBINES = ("softmax", "normalized", "sigmoid", "marginal")
CONSTRAINTS = {
    "one": cr.Exactly(1),
    "two": cr.Exactly(2),
    "between": cr.Between(1, 3),
    "none": cr.Between(0, 2),
    "groups": cr.EachGroup(cr.Groups([[0, 1], [2, 3, 4]]), cr.Exactly(1)),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
every_combine = pytest.mark.parametrize("combine", COMBINES)


def module_list(inner: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(H, inner), nn.Tanh(), nn.Linear(inner, H)) for _ in range(E))


def layer_of(constraint: cr.Constraint, *, stacked: bool = False, probes: Any = 0, **options: Any) -> cr.MoE:
    torch.manual_seed(0)
    weights = options.pop("probe_weights", "importance")
    router = cr.Router(H, E, constraint, **options)
    nn.init.normal_(router.weight)
    experts = cr.StackedExperts(E, H, 4) if stacked else module_list()
    return cr.MoE(router, experts, probes, weights)


def outputs_of(layer: cr.MoE, hidden: Tensor) -> Tensor:
    """[T, E, H] every expert on every token."""
    if isinstance(layer.experts, cr.StackedExperts):
        each = layer.experts(hidden.repeat(E, 1), [len(hidden)] * E)
        return each.view(E, len(hidden), -1).transpose(0, 1)
    return torch.stack([expert(hidden) for expert in layer.experts], 1)


def hidden_of(*lead: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*lead, H, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def key_of(tokens: int = T, seed: int = 0) -> Tensor:
    return cr.random_key(seed, torch.arange(tokens))


def upstream_of(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(output)


def gradients(layer: cr.MoE, output: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    loss = (output * upstream_of(output)).sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(names, parameters, found, strict=True)
    return {name: torch.zeros_like(parameter) if g is None else g for name, parameter, g in pairs}


def pairs_of(probes: probes_module.Probes) -> list[tuple[int, int]]:
    return list(zip(probes.token.tolist(), probes.expert.tolist(), strict=True))


@contextmanager
def drawn_with(monkeypatch: pytest.MonkeyPatch, u: Tensor) -> Iterator[None]:
    """Probes draw with these uniforms [P] instead of those of their keys."""
    with monkeypatch.context() as patched:
        patched.setattr(probes_module, "uniform", lambda key, *_: u[:, None].expand(-1, len(key)))
        yield


# ---------------------------------------------------------------------------------------------- unbiased


def draws(share: list[float], probes: int) -> Iterator[tuple[tuple[int, ...], float, Tensor]]:
    """All ordered draws without replacement: the experts, their exact probability, uniforms that lead to them."""

    def further(left: list[float], count: int) -> Iterator[tuple[tuple[int, ...], float, tuple[float, ...]]]:
        total = sum(left)
        if count == 0 or total == 0:
            yield (), 1.0, (0.5,) * count
            return
        for j, q in enumerate(left):
            if q > 0:
                middle = (sum(left[:j]) + q / 2) / total
                rest = [0.0 if i == j else p for i, p in enumerate(left)]
                for experts, chance, u in further(rest, count - 1):
                    yield (j, *experts), chance * q / total, (middle, *u)

    for experts, chance, u in further(share, probes):
        yield experts, chance, torch.tensor(u, dtype=torch.float64)


def whole_gradient(layer: cr.MoE, hidden: Tensor, routing: cr.Routing) -> dict[str, Tensor]:
    """The gradients where every expert is run, the unchosen ones for the gates alone."""
    outputs = outputs_of(layer, hidden)
    outputs = torch.where(routing.mask[..., None], outputs, outputs.detach())
    return gradients(layer, torch.einsum("te,teh->th", routing.gates, outputs))


@every_constraint
@every_combine
@pytest.mark.parametrize("probes", [1, 2])
@pytest.mark.parametrize("decide", ["sample", "mode"])
@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
def test_the_expectation_over_all_draws_is_what_all_experts_give(
    constraint: cr.Constraint, combine: Any, probes: int, decide: Any, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By enumeration of every draw in every order, with its exact probability: no sampling error."""
    options = {"combine": combine, "decide": decide, "temperature": 0.7, "probes": probes, "stacked": stacked}
    layer = layer_of(constraint, **options).double()
    hidden, key = hidden_of(1, dtype=torch.float64), key_of(1, seed=3)
    routing = layer.router(hidden, key=key)
    expected = whole_gradient(layer, hidden, routing)
    share = torch.where(routing.mask, 0.0, routing.marginals)[0].tolist()
    found = {name: torch.zeros_like(g) for name, g in expected.items()}
    total, several = 0.0, set()
    for experts, chance, u in draws(share, probes):
        with drawn_with(monkeypatch, u):
            assert sorted(e for _, e in pairs_of(draw_probes(routing, probes, key))) == sorted(experts)
            output, _ = layer(hidden, key=key)
        one = gradients(layer, output)
        several.add(tuple(one["router.weight"].flatten().tolist()))
        for name in found:
            found[name] += chance * one[name]
        total += chance
    assert total == pytest.approx(1)
    assert len(several) > 1  # or nothing would have been estimated
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_without_probes_the_gradient_is_another() -> None:
    """What the tests above would miss if probes did nothing."""
    layer, hidden = layer_of(cr.Exactly(1)).double(), hidden_of(T, dtype=torch.float64)
    output, routing = layer(hidden, key=key_of())
    expected = whole_gradient(layer, hidden, routing)["router.weight"]
    assert not torch.allclose(gradients(layer, output)["router.weight"], expected, rtol=0.05)


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_probes_are_drawn_in_proportion_to_marginals(probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert between its own sums of shares, up to the edges."""
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0, -3.0]], dtype=torch.float64)
    routing = cr.route(logits, cr.compile(cr.Exactly(2), E), decide="mode", temperature=2.0)
    left = torch.where(routing.mask, 0.0, routing.marginals)[0]
    edges = torch.cat([torch.zeros(1), left.cumsum(0)]).double() / left.sum()
    for expert in (left > 0).nonzero().flatten().tolist():
        low, high = edges[expert], edges[expert + 1]
        for u in (low + 1e-9, high - 1e-9):
            with drawn_with(monkeypatch, u.repeat(probes)):
                assert expert in draw_probes(routing, probes, 0).expert.tolist()
            with drawn_with(monkeypatch, u.repeat(1)):
                assert draw_probes(routing, 1, 0).expert.tolist() == [expert]


def test_weights_stay_right_where_marginals_are_far_apart() -> None:
    """What is left after a likely expert is not 1 minus its share, which rounding would make of it."""
    logits = torch.tensor([[20.0, 0.0, -20.0, -40.0, -60.0]])
    routing = cr.route(logits, cr.compile(cr.Exactly(1), E), decide="mode")
    found = draw_probes(routing, 4, 0)
    assert found.expert.tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(found.weight, torch.tensor([1.0, 0.75, 0.5, 0.25]), rtol=0.01, atol=0)


# ---------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid"])
@every_constraint
@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
def test_all_probes_with_the_estimator_dense_are_densemixer(
    combine: Any, constraint: cr.Constraint, stacked: bool
) -> None:
    """Forward the chosen experts, backward as if each had been used with its weight: written plainly."""
    layer = layer_of(constraint, combine=combine, estimator="dense", decide="mode", probes="all", stacked=stacked)
    layer, hidden = layer.double(), hidden_of(T, dtype=torch.float64)
    output, routing = layer(hidden)
    outputs, mask = outputs_of(layer, hidden), routing.mask
    outputs = torch.where(mask[..., None], outputs, outputs.detach())
    logits = nn.functional.linear(hidden, layer.router.weight)
    if combine == "sigmoid":
        weights = logits.sigmoid()
    else:
        weights = logits.softmax(-1)
    if combine == "normalized":
        chosen = (weights * mask).sum(-1, keepdim=True)
        chosen = torch.where(chosen > 0, chosen, 1.0)
        # A chosen weight by the sum of the chosen; an unchosen one by the same sum as a constant.
        weights = torch.where(mask, weights / chosen, weights / chosen.detach())
    torch.testing.assert_close(output, torch.einsum("te,teh->th", weights * mask, outputs))
    expected = gradients(layer, torch.einsum("te,teh->th", weights, outputs))
    for name, value in gradients(layer, output).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@every_combine
@pytest.mark.parametrize("estimator", ["simple", "none"])
def test_all_probes_are_what_all_experts_give(combine: Any, estimator: str) -> None:
    layer = layer_of(cr.Exactly(2), combine=combine, estimator=estimator, probes="all").double()
    hidden = hidden_of(T, dtype=torch.float64)
    output, routing = layer(hidden, key=key_of())
    expected = whole_gradient(layer, hidden, routing)
    for name, value in gradients(layer, output).items():
        torch.testing.assert_close(value, expected[name])


# ---------------------------------------------------------------------------------------------- what stays as it was


@every_constraint
@every_combine
@pytest.mark.parametrize("probes", [1, 3, "all"])
@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
@pytest.mark.parametrize("estimator", ["simple", "dense", "score"])
def test_the_output_is_the_same_to_the_bit(
    constraint: cr.Constraint, combine: Any, probes: Any, stacked: bool, estimator: str
) -> None:
    options = {"combine": combine, "estimator": estimator, "stacked": stacked}
    plain, probed = (layer_of(constraint, probes=p, **options) for p in (0, probes))
    found = [layer(hidden_of(2, T // 2), key=key_of().view(2, T // 2)) for layer in (plain, probed)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].mask, found[1][1].mask)
    assert torch.equal(found[0][1].gates, found[1][1].gates)


@pytest.mark.parametrize("probes", [1, "all"])
@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
def test_experts_and_hidden_states_get_no_gradient_from_probes(probes: Any, stacked: bool) -> None:
    found = []
    for count in (0, probes):
        layer = layer_of(cr.Exactly(1), probes=count, stacked=stacked)
        hidden = hidden_of(T).requires_grad_()
        routing = layer.router(hidden.detach(), key=key_of())
        output, _ = layer(hidden, routing=routing, key=key_of() if count else None)
        (output * upstream_of(output)).sum().backward()
        experts = {name: p.grad for name, p in layer.experts.named_parameters()}
        found.append((hidden.grad, experts, layer.router.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert all(
        (g is None and h is None) or torch.equal(g, h) for g, h in zip(*(f[1].values() for f in found), strict=True)
    )
    assert not torch.allclose(found[0][2], found[1][2])


@pytest.mark.parametrize("weights", ["importance", "none", 1.5])
def test_nothing_is_probed_without_gradients(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a probe was drawn")

    monkeypatch.setattr("circuitroute.layers.moe.draw_probes", refuse)
    layer = layer_of(cr.Exactly(2), probes=2, probe_weights=weights)
    with pytest.raises(AssertionError, match="a probe was drawn"):
        layer(hidden_of(T))
    with torch.no_grad():
        layer(hidden_of(T))
    layer.eval()(hidden_of(T))


# ---------------------------------------------------------------------------------------------- who is probed


@every_constraint
@pytest.mark.parametrize("probes", [1, 2, 4, 50])
def test_probes_are_unchosen_possible_and_distinct(constraint: cr.Constraint, probes: int) -> None:
    logits = torch.randn(200, E, generator=torch.Generator().manual_seed(0))
    logits[:50, 0] = -torch.inf
    logits[50:100, 4] = torch.inf
    routing = cr.route(logits, cr.compile(constraint, E), key=key_of(200))
    found = draw_probes(routing, probes, key_of(200))
    pairs = pairs_of(found)
    assert len(set(pairs)) == len(pairs)
    possible = ~routing.mask & (routing.marginals > 0)
    assert bool(possible[found.token, found.expert].all())
    assert torch.equal(torch.bincount(found.token, minlength=200), possible.sum(-1).clamp(max=probes))
    assert bool((found.weight > 0).all())
    assert found.weight.dtype == routing.gates.dtype
    unchosen = every_unchosen(routing)
    assert set(pairs) <= set(pairs_of(unchosen))
    assert len(unchosen.token) == int((~routing.mask).sum())
    assert bool((unchosen.weight == 1).all())


def test_marginals_below_0_by_rounding_draw_nothing() -> None:
    """As those of composed circuits in the cold may be."""
    logits = 6 * torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    circuit = cr.compile(cr.Cost([1, 2] * 32, at_most=8), 64)
    routing = cr.route(logits, circuit, decide="mode", temperature=0.02)
    found = draw_probes(routing, 3, key_of(5000))
    assert bool((routing.marginals[found.token, found.expert] > 0).all())
    assert bool((found.weight >= 1 / 3).all())
    assert bool(found.weight.isfinite().all())


def test_there_may_be_nothing_to_probe() -> None:
    for constraint, tokens in ((cr.Exactly(E), T), (cr.Exactly(1) & cr.Exactly(1).over([2]), T), (cr.Exactly(2), 0)):
        layer = layer_of(constraint, probes=2)
        output, routing = layer(hidden_of(tokens), key=key_of(tokens))
        output.sum().backward()
        assert len(draw_probes(routing, 2, None).token) == 0


def test_a_row_of_nan_has_no_probes() -> None:
    logits = torch.zeros(3, E)
    logits[1, 2] = torch.nan
    routing = cr.route(logits, cr.compile(cr.Exactly(2), E), validate_args=False)
    assert sorted(draw_probes(routing, 1, 0).token.tolist()) == [0, 2]


def test_probes_are_a_function_of_their_keys() -> None:
    layer = layer_of(cr.Exactly(2))
    routing = layer.router(hidden_of(200), key=key_of(200))

    def drawn(at: Any, key: Tensor) -> dict[int, int]:
        some = layer.router(hidden_of(200)[at], key=key_of(200)[at])
        return dict(pairs_of(draw_probes(some, 1, key)))

    every = drawn(slice(None), key_of(200))
    assert pairs_of(draw_probes(routing, 1, key_of(200))) == list(every.items())
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:30]
    assert drawn(order, key_of(200)[order]) == {i: every[t] for i, t in enumerate(order.tolist())}
    assert drawn(slice(None), key_of(200, seed=9)) != every
    fewer = draw_probes(routing, 1, key_of(200))
    assert set(pairs_of(fewer)) <= set(pairs_of(draw_probes(routing, 2, key_of(200))))
    torch.manual_seed(4)
    first = pairs_of(draw_probes(routing, 1, None))
    assert pairs_of(draw_probes(routing, 1, None)) != first
    torch.manual_seed(4)
    assert pairs_of(draw_probes(routing, 1, None)) == first


def test_weights_are_importance_none_or_capped() -> None:
    routing = cr.route(torch.randn(300, E, generator=torch.Generator().manual_seed(0)), cr.compile(cr.Exactly(2), E))
    for probes in (1, 2):
        full, none, capped = (draw_probes(routing, probes, 3, weights) for weights in ("importance", "none", 1.5))
        assert pairs_of(full) == pairs_of(none) == pairs_of(capped)
        assert bool((none.weight == 1).all())
        assert float(full.weight.max()) > 1.5
        assert torch.equal(capped.weight, full.weight.clamp(max=1.5))
    one = draw_probes(routing, 1, 3)
    share = torch.where(routing.mask, 0.0, routing.marginals)
    q = (share / share.sum(-1, keepdim=True))[one.token, one.expert]
    torch.testing.assert_close(one.weight, 1 / q)


def test_marginals_are_the_tempered_ones() -> None:
    """In the cold a probe is the next expert in line."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]]).expand(50, E)
    routing = cr.route(logits, cr.compile(cr.Exactly(2), E), decide="mode", temperature=0.05)
    assert draw_probes(routing, 1, key_of(50)).expert.eq(2).all()


# ---------------------------------------------------------------------------------------------- surroundings


@pytest.mark.parametrize("probes", [1, "all"])
@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_probes_the_same(probes: Any, keyed: bool, use_reentrant: bool) -> None:
    found = []
    for recomputed in (False, True):
        layer, hidden = layer_of(cr.Exactly(1), probes=probes, decide=0.5), hidden_of(T).requires_grad_()
        torch.manual_seed(3)
        run = lambda x, layer=layer: layer(x, key=key_of() if keyed else None)[0]  # noqa: E731
        output = checkpoint(run, hidden, use_reentrant=use_reentrant) if recomputed else run(hidden)
        (output * upstream_of(output)).sum().backward()
        found.append((output, hidden.grad, *(p.grad for p in layer.parameters())))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
@pytest.mark.parametrize("probes", [1, "all"])
def test_probes_under_autocast(stacked: bool, probes: Any) -> None:
    found = []
    for count in (0, probes):
        layer = layer_of(cr.Exactly(2), probes=count, stacked=stacked)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = layer(hidden_of(T), key=key_of())
        output.sum().backward()
        assert layer.router.weight.grad is not None
        found.append(output)
    assert torch.equal(*found)
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
def test_probes_in_bfloat16(stacked: bool) -> None:
    layer = layer_of(cr.Exactly(2), probes=1, stacked=stacked).bfloat16()
    output, _ = layer(hidden_of(T).bfloat16(), key=key_of())
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert bool(layer.router.weight.grad.isfinite().all())


def test_top_k_and_budget_routers_are_probed_too() -> None:
    torch.manual_seed(0)
    top = cr.MoE(cr.TopKRouter(H, E, 1), module_list(), 1)
    output, _ = top(hidden_of(T), key=key_of())
    output.sum().backward()
    budget = cr.BudgetRouter(H, E, 1, cr.Between(1, 3), cr.Exactly(2))
    layer = cr.MoE(None, module_list(), 1)
    routing, _ = budget(hidden_of(T), budget.begin(hidden_of(T)), key=key_of())
    output, _ = layer(hidden_of(T), key=key_of(), routing=routing)
    output.square().sum().backward()
    assert budget.router(0).weight.grad is not None


def test_a_soft_routing_has_no_marginals_to_probe_by() -> None:
    layer = cr.MoE(cr.SoftTopKRouter(H, E, 2, 2.0), module_list(), 1)
    with pytest.raises(AttributeError, match="a soft routing has no distribution"):
        layer(hidden_of(T))


@pytest.mark.parametrize(
    ("probes", "weights", "error", "message"),
    [
        (-1, "importance", ValueError, "probes=-1: must be at least 0"),
        ("some", "importance", TypeError, "probes='some': expected an integer"),
        (1.5, "importance", TypeError, "probes=1.5: expected an integer"),
        (1, "both", ValueError, "probe_weights='both': choose 'importance', 'none', or a cap"),
        (1, 0, ValueError, r"probe_weights=0\.0: a cap must be positive"),
        (1, float("nan"), ValueError, "probe_weights=nan: a cap must be positive"),
        (1, None, TypeError, "probe_weights=None: expected a number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    probes: Any, weights: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cr.MoE(cr.ExactKRouter(H, E, 2), module_list(), probes, weights)


def test_a_decision_that_was_made_takes_a_key_for_probes_alone() -> None:
    routing = cr.route(torch.zeros(T, E), cr.compile(cr.Exactly(2), E))
    with pytest.raises(ValueError, match="routing was given together with key: a decision"):
        cr.MoE(None, module_list())(hidden_of(T), key=key_of(), routing=routing)
    with pytest.raises(ValueError, match="routing was given together with temperature: a decision"):
        cr.MoE(None, module_list(), 1)(hidden_of(T), key=key_of(), routing=routing, temperature=0.5)


def test_every_order_of_draws_is_enumerated() -> None:
    """Of the tests' own machinery: probabilities add up, orders are all there."""
    found = list(draws([0.5, 0.0, 0.3, 0.2], 2))
    assert sorted(experts for experts, *_ in found) == sorted(itertools.permutations([0, 2, 3], 2))
    assert sum(chance for _, chance, _ in found) == pytest.approx(1)
