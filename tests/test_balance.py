"""Balance by a bias: the exact one against enumeration, order statistics against sorting, rules against their formulas.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import circuitroute.balance as by_name
import numpy as np
import pytest
import torch
from circuitroute.balance import BalanceState, ExactBalance, LossFree, Quantile, bias_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitroute as cr
from circuitroute.routing import balance
from circuitroute.routing.bias import needed, solver
from tests.tempered import CONSTRAINTS, INF, E, T, compiled, every_constraint, hidden_of, key_of, logits_of
from tests.truth import enumerate_worlds, world_truth

RULES = {"LossFree": LossFree, "Quantile": Quantile, "ExactBalance": ExactBalance}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def double(tokens: int = T, seed: int = 0) -> Tensor:
    return logits_of(tokens, seed, torch.float64) + torch.linspace(-2, 2, E).double()


def mean_of(constraint: cr.Constraint, logits: Tensor) -> Tensor:
    """[E] by all 2^E worlds."""
    allowed = compiled(constraint).satisfies(torch.from_numpy(enumerate_worlds(E))).numpy()
    return torch.from_numpy(world_truth(logits.numpy(), allowed).marginals).mean(0)


def test_the_module_answers_to_its_public_name() -> None:
    assert by_name is cr.balance is balance


# ------------------------------------------------------------------------------------------------ exact


@every_constraint
@pytest.mark.parametrize("temperature", [1.0, 0.25, 3.0])
def test_the_mean_of_exact_marginals_is_the_target(constraint: cr.Constraint, temperature: float) -> None:
    """By enumeration, to 1e-10; the target is that of another bias and batch, so that there is one."""
    logits, other = double(), double(seed=1).roll(1, -1)
    target = mean_of(constraint, other)
    bias = bias_for(compiled(constraint)(logits), target, temperature=temperature)
    assert bias.dtype == torch.float64
    assert float((mean_of(constraint, (logits + bias) / temperature) - target).abs().max()) < 1e-10


@every_constraint
def test_the_default_is_the_constraints_own_balance_at_the_mean_count(constraint: cr.Constraint) -> None:
    logits, circuit = double(), compiled(constraint)
    before, bias = mean_of(constraint, logits), bias_for(circuit(logits))
    mean = mean_of(constraint, logits + bias)
    assert float(mean.sum()) == pytest.approx(float(before.sum()), abs=1e-9)
    if circuit.counts is not None:
        assert float((mean - before.sum() / E).abs().max()) < 1e-10
    if circuit.min_count == circuit.max_count:
        assert float((mean - mean_of(constraint, torch.zeros(1, E).double())).abs().max()) < 1e-10
    assert bias_for(circuit(torch.full((3, E), 0.7)), temperature=0.5).abs().max() < 1e-6


def test_unequal_groups_keep_their_own_numbers() -> None:
    rule = cr.EachGroup(cr.Groups([[0, 1], [2, 3, 4, 5]]), cr.Exactly(1))
    logits = double()
    bias = bias_for(compiled(rule)(logits))
    torch.testing.assert_close(
        mean_of(rule, logits + bias),
        torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25], dtype=torch.float64),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize(
    ("constraint", "fixed"),
    [
        (cr.Exactly(2), [[1, 1, 1, 1, 1, 1]]),
        (cr.EachGroup(cr.Groups(2), cr.Exactly(1)), [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]),
        (cr.Between(1, 4), []),
        (cr.CountIn({0, 6}), [[1, -1, 0, 0, 0, 0], [0, 0, 1, 0, 0, -1]]),
        (cr.Exactly(1).over([0, 1, 2]) & cr.AtMost(3), [[1, 1, 1, 0, 0, 0]]),
    ],
    ids=str,
)
def test_what_is_not_determined_is_of_smallest_norm(constraint: cr.Constraint, fixed: list[list[int]]) -> None:
    """Any other bias with the same marginals differs along what the constraint fixes."""
    logits = double()
    target = mean_of(constraint, double(seed=3))
    bias = bias_for(compiled(constraint)(logits), target)
    for direction in fixed:
        v = torch.tensor(direction).double()
        assert abs(float(bias @ v)) < 1e-9
        torch.testing.assert_close(
            mean_of(constraint, logits + bias + 0.7 * v), target, rtol=0, atol=1e-9
        )  # nothing depends on it


def test_a_temperature_for_every_token_and_a_batch_of_any_shape() -> None:
    logits, temperature = double(), torch.linspace(0.3, 2, T).double()
    circuit = compiled(cr.Exactly(2))
    bias = bias_for(circuit(logits.view(5, 8, E)), temperature=temperature.view(5, 8))
    mean = mean_of(cr.Exactly(2), (logits + bias) / temperature[:, None])
    assert float((mean - 2 / E).abs().max()) < 1e-10
    single = bias_for(circuit(logits.float().t().contiguous().t()), temperature=0.7)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, bias_for(circuit(logits.float().double()), temperature=0.7).float())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("constraint", [cr.Exactly(3), cr.Between(2, 5)], ids=str)
def test_any_scale_and_both_ways_of_solving(
    constraint: cr.Constraint, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a matrix, and by conjugate gradients in chunks; the cold through warmer ones."""
    n = 12
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(150, n, generator=generator, dtype=torch.float64) * scale
    circuit = cr.compile(constraint, n)
    found = []
    for dense, chunk in ((32, 1 << 21), (1, 1 << 21), (1, 40 * n)):
        monkeypatch.setattr(solver, "DENSE", dense)
        monkeypatch.setattr(solver, "CHUNK", chunk)
        found.append(bias_for(circuit(logits), temperature=0.5))
    for bias in found:
        mean = circuit((logits + bias) / 0.5).marginals.mean(0)
        assert float((mean - mean.mean()).abs().max()) < 2e-10
        if scale <= 1:  # beyond, there are many to the last digit
            assert float((bias - found[0]).abs().max()) < 1e-6


def test_the_second_derivative_is_the_mean_covariance() -> None:
    logits, circuit = double(), compiled(cr.Between(1, 4))
    part = solver.Part(circuit, logits, torch.linspace(0.5, 2, T).double()[:, None], None)
    system = solver.System([part], E, None, torch.device("cpu"))
    bias = torch.linspace(-1, 1, E).double()
    covariance = circuit((logits + bias) / part.temperature).covariance_matrix
    wanted = (covariance / part.temperature[..., None]).mean(0)
    torch.testing.assert_close(system.matrix(bias), wanted, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(system.products(bias)(bias), wanted @ bias, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(system.diagonal(bias), wanted.diagonal(), rtol=1e-8, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(CONSTRAINTS)),
    st.integers(1, 12),
    st.floats(0.1, 20),
    st.integers(0, 1000),
    st.sampled_from([0.1, 1.0, 5.0]),
)
def test_whatever_the_batch_a_bias_reaches_what_another_one_has(
    name: str, tokens: int, scale: float, seed: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, E, generator=generator, dtype=torch.float64) * scale
    circuit = compiled(CONSTRAINTS[name])
    known = torch.randn(E, generator=generator, dtype=torch.float64)
    reached = circuit((logits + known) / temperature).marginals.mean(0)
    target = 0.8 * reached + 0.2 * circuit(torch.zeros(E).double()).marginals  # away from the boundary
    bias = bias_for(circuit(logits), target, temperature=temperature)
    mean = circuit((logits + bias) / temperature).marginals.mean(0)
    assert float((mean - target).abs().max()) < 2e-10


def test_evidence_stays_and_the_rest_is_balanced() -> None:
    logits = double()
    logits[::4, 0], logits[1::4, 3] = INF, -INF
    target = torch.tensor([0.5, 0.3, 0.3, 0.3, 0.3, 0.3], dtype=torch.float64)
    bias = bias_for(compiled(cr.Exactly(2))(logits), target)
    assert float((mean_of(cr.Exactly(2), logits + bias) - target).abs().max()) < 1e-10
    # An expert that no token may choose has nothing to be balanced, and takes no part by default.
    logits = double()
    logits[:, 2] = -INF
    bias = bias_for(compiled(cr.Exactly(2))(logits))
    wanted = torch.tensor([0.4, 0.4, 0.0, 0.4, 0.4, 0.4], dtype=torch.float64)
    assert float((mean_of(cr.Exactly(2), logits + bias) - wanted).abs().max()) < 1e-10
    assert float(bias[2]) == 0
    logits[:, 2] = INF
    wanted = torch.tensor([0.2, 0.2, 1.0, 0.2, 0.2, 0.2], dtype=torch.float64)
    bias = bias_for(compiled(cr.Exactly(2))(logits), wanted)
    assert float((mean_of(cr.Exactly(2), logits + bias) - wanted).abs().max()) < 1e-10


def test_rows_of_nan_count_for_nothing() -> None:
    logits = double()
    spoiled = logits.clone()
    spoiled[[3, 7], 1] = torch.nan
    kept = torch.tensor([t not in (3, 7) for t in range(T)])
    circuit = compiled(cr.Exactly(2))
    distribution = cr.SubsetDistribution(circuit, spoiled, validate_args=False)
    found = bias_for(distribution)
    torch.testing.assert_close(found, bias_for(circuit(logits[kept])), rtol=0, atol=1e-9)
    for rule in (LossFree(E, step=0.1), Quantile(E), ExactBalance(E)):
        state = rule.init()
        bad = cr.route(spoiled, circuit, key=key_of(), decide="mode", validate_args=False)
        good = cr.route(logits[kept], circuit, decide="mode")
        torch.testing.assert_close(rule.update(state, bad).bias, rule.update(state, good).bias)
    ranged, controller = compiled(cr.Between(1, 4)), cr.CountController(2.0)
    bad = cr.route(spoiled, ranged, decide="mode", validate_args=False)
    good = cr.route(logits[kept], ranged, decide="mode")
    state = controller.init()
    torch.testing.assert_close(controller.update(state, bad).price, controller.update(state, good).price)


def test_degenerate_sizes() -> None:
    """One expert, none chosen, all chosen, one token, ties: nothing to balance is balanced."""
    assert bias_for(cr.compile(cr.Exactly(1), 1)(torch.ones(3, 1))).tolist() == [0.0]
    for k in (0, 4):
        assert bias_for(cr.compile(cr.Exactly(k), 4)(torch.randn(3, 4))).tolist() == [0.0] * 4
    assert bias_for(cr.compile(cr.Exactly(2), 4)(torch.zeros(5, 4))).tolist() == [0.0] * 4
    one = torch.tensor([[1.0, 2.0, 3.0, 5.0]], dtype=torch.float64)
    bias = bias_for(cr.compile(cr.Exactly(1), 4)(one))
    torch.testing.assert_close(one[0] + bias, torch.full((4,), 2.75).double())
    with pytest.raises(ValueError, match=r"a batch of \(0,\): there are no tokens to balance"):
        bias_for(cr.compile(cr.Exactly(2), 4)(torch.zeros(0, 4)))


# ------------------------------------------------------------------------------------------------ what no bias reaches

UNREACHED = {
    "sum": (cr.Exactly(2), [0.5] * 6, r"adds up to 3: no bias reaches that, since every subset that Exactly\(2\)"),
    "sum of a range": (cr.Between(1, 3), [0.7] * 6, r"adds up to 4.2: no bias reaches that.*from 1 to 3 experts"),
    "end of a range": (cr.Between(1, 3), [0.5] * 6, r"adds up to 3: .* both excluded"),
    "one": (cr.Exactly(2), [1.0, 0.2, 0.2, 0.2, 0.2, 0.2], r"target\[0\]=1: no bias reaches that: expert 0 lies"),
    "nothing": (cr.Exactly(2), [0.0, 0.4, 0.4, 0.4, 0.4, 0.4], r"target\[0\]=0: no bias reaches that: expert 0"),
    "groups": (
        cr.EachGroup(cr.Groups(2), cr.Exactly(1)),
        [0.5, 0.5, 0.5, 0.2, 0.2, 0.1],
        r"target of the experts \[0, 1, 2\] together.* is 1.5, and no bias moves it from 1\b",
    ),
    "weighed": (
        cr.Cost([1, 2, 1, 2, 1, 2], at_most=4, at_least=4),
        [0.4] * 6,
        r"target gives .* target\[\d\] .* = .*, and no bias moves it from",
    ),
    "group limits": (
        cr.ActiveGroups(cr.Groups(3), at_most=1) & cr.Exactly(2),
        [0.9, 0.1, 0.1, 0.1, 0.1, 0.7],
        r"no bias reaches|target of the experts",
    ),
    "active groups": (
        cr.ActiveGroups(cr.Groups(3), at_most=2) & cr.Between(1, 4),
        [0.9, 0.2, 0.9, 0.2, 0.9, 0.2],
        r"no bias reaches it.*bias grows without end.*Farthest off are the experts",
    ),
    "implied": (cr.Logic("x0 >> x1") & cr.AtMost(4), [0.6, 0.4, 0.3, 0.3, 0.3, 0.3], r"no bias reaches it"),
    "on the boundary": (cr.Logic("x0 >> x1") & cr.AtMost(4), [0.4, 0.4, 0.3, 0.3, 0.3, 0.3], r"no bias reaches it"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREACHED)
def test_targets_that_no_bias_reaches(name: str) -> None:
    """Also through a rule, which leaves its state as it was."""
    constraint, target, message = UNREACHED[name]
    circuit = compiled(constraint)
    with pytest.raises(ValueError, match=message):
        bias_for(circuit(double()), target)
    rule = ExactBalance(E, target)
    state = rule.init()
    with pytest.raises(ValueError, match="no bias"):
        rule.update(state, cr.route(double().float(), circuit, decide="mode"))
    assert state.bias.tolist() == [0.0] * E


def test_evidence_bounds_what_a_bias_reaches() -> None:
    logits, circuit = double(), compiled(cr.Exactly(2))
    logits[: T // 2, 0] = INF
    with pytest.raises(ValueError, match=r"target\[0\]=0.3: no bias reaches that: expert 0 lies between 0.5 and 1"):
        bias_for(circuit(logits), [0.3, 0.34, 0.34, 0.34, 0.34, 0.34])
    logits[:, 0] = -INF
    with pytest.raises(ValueError, match=r"target\[0\]=0.3.*leave expert 0 no choice: it is always 0"):
        bias_for(circuit(logits), [0.3, 0.34, 0.34, 0.34, 0.34, 0.34])
    rule = Quantile(E, [0.3, 0.34, 0.34, 0.34, 0.34, 0.34])
    with pytest.raises(ValueError, match=r"target\[0\]=0.3.*expert 0 is forced in 0 of 40 tokens, and allowed in 0"):
        rule.update(rule.init(), cr.route(logits, circuit, decide="mode"))


def test_a_few_steps_refuse_what_is_proven_alone() -> None:
    """With a limit on the steps a target that is merely far is approached from step to step."""
    circuit, logits = compiled(cr.Exactly(2)), double().float() * 5
    rule = ExactBalance(E, steps=1)
    state = rule.init()
    missing = []
    for _ in range(30):
        routing = cr.route(logits, circuit, decide="mode", bias=state.bias)
        missing.append(float((routing.marginals.mean(0) - 2 / E).abs().max()))
        state = rule.update(state, routing)
    assert missing[-1] < 1e-5 < missing[1]
    hopeless = ExactBalance(E, UNREACHED["active groups"][1], steps=1)
    state, circuit = hopeless.init(), compiled(UNREACHED["active groups"][0])

    def go_on(state: BalanceState) -> None:
        for _ in range(200):
            state = hopeless.update(state, cr.route(logits, circuit, decide="mode", bias=state.bias))

    with pytest.raises(ValueError, match="no bias reaches it"):
        go_on(state)


def test_a_spread_that_float64_cannot_hold_a_bias_beside() -> None:
    with pytest.raises(ValueError, match=r"the logits differ by .*e\+21 temperatures, and float64 cannot hold a bias"):
        bias_for(compiled(cr.Exactly(2))(double(5) * 1e20))


# ------------------------------------------------------------------------------------------------ the rules


def test_loss_free_is_the_published_rule() -> None:
    circuit, rule = compiled(cr.Exactly(2)), LossFree(E, step=0.01)
    state, bias = rule.init(), torch.zeros(E)
    for step in range(5):
        routing = cr.route(logits_of(seed=step), circuit, decide="mode", bias=state.bias)
        load = routing.mask.sum(0).float()
        bias = bias + 0.01 * (load.mean() - load).sign()
        state = rule.update(state, routing)
        torch.testing.assert_close(state.bias, bias)
    centred = LossFree(E, step=0.01, centre=True)
    after = centred.update(centred.init(), routing).bias
    assert abs(float(after.sum())) < 1e-6
    met = LossFree(E, step=1.0, target=routing.mask.sum(0) / T)
    assert met.update(met.init(), routing).bias.tolist() == [0.0] * E
    most = LossFree(E, step=1.0, target=[1, 0, 0, 0, 0, 0]).update(met.init(), routing).bias
    assert most[0] == 1
    assert bool((most[1:] <= 0).all())


def needed_by_hand(logits: Tensor, bias: Tensor, k: int) -> Tensor:
    cutoff = (logits + bias).sort(-1, descending=True).values[:, k : k + 1]
    return cutoff - logits


def test_quantile_is_the_published_rule() -> None:
    """For exactly k: the k / E quantile of the (k + 1)-th largest biased score minus the score, then centred."""
    circuit, rule, logits = compiled(cr.Exactly(2)), Quantile(E, centre=False), logits_of(60)
    bias = torch.linspace(0, 1, E)
    state = rule.init()._replace(bias=bias)
    needed = needed_by_hand(logits, bias, 2).sort(0).values
    wanted = (needed[19] + needed[20]) / 2
    routing = cr.route(logits, circuit, key=key_of(60), bias=bias)
    torch.testing.assert_close(rule.update(state, routing).bias, wanted, rtol=0, atol=1e-5)
    half = Quantile(E, rate=0.5).update(state, routing).bias
    torch.testing.assert_close(half, (wanted + bias) / 2 - (wanted + bias).mean() / 2, rtol=0, atol=1e-5)
    # By this step's thresholds, so many tokens would choose it; those that have it next already stand at its own bias.
    needed = needed_by_hand(logits, bias, 2)
    assert bool(((needed < wanted - 1e-5).sum(0) <= 20).all())
    assert bool(((needed < wanted + 1e-5).sum(0) >= 20).all())


@every_constraint
def test_needed_biases_are_where_the_mode_changes(constraint: cr.Constraint) -> None:
    """By the most probable of all worlds: a little more bias, and the token has the expert; a little less, and not;
    where it would take another's place, relative to the token's marginal expert."""
    circuit, logits = compiled(constraint), logits_of(12, dtype=torch.float64)
    bias = torch.linspace(-1, 1, E).double()
    routing = cr.route(logits, circuit, decide="mode", bias=bias)
    found, load = needed.needed_bias(routing.untempered, bias, torch.ones(12, dtype=torch.bool))
    assert int(load) == int(routing.mask.sum())
    margins = needed._by_margins(routing.untempered, routing.untempered.logits)
    worlds = torch.from_numpy(enumerate_worlds(E))
    worlds = worlds[circuit.satisfies(worlds)]
    scores = routing.untempered.logits @ worlds.double().t()
    for e in range(E):
        with_e = torch.where(worlds[:, e], scores, -INF).amax(-1)
        without = torch.where(worlds[:, e], -INF, scores).amax(-1)
        raw = without - with_e
        chosen = routing.mask[:, e]
        torch.testing.assert_close(found[:, e][chosen].double(), (bias[e] + raw)[chosen], rtol=0, atol=1e-5)
        assert bool((found[:, e][~chosen].double() <= (bias[e] + raw)[~chosen] + 1e-5).all())
        assert bool((found[:, e][~chosen].double() >= bias[e] - 1e-5).all())
    assert bool(((margins <= 0) == routing.mask)[margins != 0].all())
    if constraint == cr.Exactly(2):
        torch.testing.assert_close(found.double(), needed_by_hand(logits, bias, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(margins + bias, found.double(), rtol=0, atol=1e-5)
    if constraint == cr.Between(0, E):
        torch.testing.assert_close(found.double(), -logits, rtol=0, atol=1e-5)


@every_constraint
def test_every_rule_balances_the_decisions_it_sees(constraint: cr.Constraint) -> None:
    """The same tokens again and again: each rule ends near its own target, from a router that starts far off."""
    circuit, logits = compiled(constraint), double(300).float() * 2
    start = cr.metrics.max_violation(cr.route(logits, circuit, decide="mode"))
    for rule, steps in ((LossFree(E, step=0.05, centre=True), 250), (Quantile(E, rate=0.5), 25), (ExactBalance(E), 2)):
        if circuit.counts is None and not isinstance(rule, LossFree):
            continue  # the constraint's own balance is not that of equal loads
        state = rule.init()
        for _ in range(steps):
            state = rule.update(state, cr.route(logits, circuit, decide="mode", bias=state.bias, temperature=0.1))
        after = cr.metrics.max_violation(cr.route(logits, circuit, decide="mode", bias=state.bias))
        assert after < (0.4 if circuit.counts is None else 0.15), rule
        assert start > 3 * after


def test_quantile_reaches_targets_in_one_step_of_two_experts() -> None:
    """Where margins that are not relative to the marginal expert would have the two change places forever."""
    circuit, logits = cr.compile(cr.Exactly(1), 2), torch.randn(101, 2) + torch.tensor([3.0, 0.0])
    rule = Quantile(2, [0.25, 0.75])
    state = rule.init()
    for _ in range(3):
        state = rule.update(state, cr.route(logits, circuit, decide="mode", bias=state.bias))
        assert int(cr.route(logits, circuit, decide="mode", bias=state.bias).mask[:, 0].sum()) == 25


def test_quantile_where_evidence_leaves_little() -> None:
    logits, circuit = logits_of(), compiled(cr.Exactly(2))
    logits[:, 0], logits[:, 5] = -INF, INF
    rule = Quantile(E, centre=False)
    state = rule.update(rule.init()._replace(bias=torch.arange(E).float()), cr.route(logits, circuit, decide="mode"))
    assert state.bias[0] == 0
    assert state.bias[5] == 5
    assert bool(state.bias.isfinite().all())
    # A target of everything or nothing lies half a logit beyond the last token.
    ends = Quantile(E, [1.0, 0.0, 0.25, 0.25, 0.25, 0.25], centre=False)
    logits = logits_of()
    needed = needed_by_hand(logits, torch.zeros(E), 2)
    found = ends.update(ends.init(), cr.route(logits, circuit, decide="mode")).bias
    torch.testing.assert_close(found[0], needed[:, 0].max() + 0.5)
    torch.testing.assert_close(found[1], needed[:, 1].min() - 0.5)
    for k in (0, E):
        whole = cr.route(logits, compiled(cr.Exactly(k)), decide="mode")
        assert rule.update(rule.init(), whole).bias.tolist() == [0.0] * E


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, INF, -INF, 1e-45, -1e-45]),
        min_size=1,
        max_size=20,
    )
)
def test_order_statistics_are_those_of_sorting(numbers: list[float]) -> None:
    values = torch.tensor([numbers, numbers[::-1]], dtype=torch.float32).t()
    ranks = torch.arange(1, len(numbers) + 1)[:, None].expand(-1, 2)
    found = needed.order_statistics(values, ranks)
    assert torch.equal(found, values.sort(0).values + 0.0)


# ------------------------------------------------------------------------------------------------ where a bias goes


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid"])
@pytest.mark.parametrize("estimator", ["simple", "none", "dense"])
@every_constraint
def test_the_weights_do_not_move_with_the_bias(constraint: cr.Constraint, combine: Any, estimator: str) -> None:
    logits, circuit = logits_of(), compiled(constraint)
    options = {"combine": combine, "estimator": estimator, "temperature": 0.5}
    bias, price = torch.linspace(-3, 3, E), 0.3
    moved = cr.route(logits, circuit, key=key_of(), bias=bias, price=price, **options)
    alone = cr.route(logits, circuit, replay=moved.mask, **options)
    torch.testing.assert_close(moved.gates, alone.gates)
    assert torch.equal(moved.gates != 0, moved.mask)
    assert torch.equal(moved.logits, logits)
    torch.testing.assert_close(moved.marginals, circuit((logits + bias - price) / 0.5).marginals)


@pytest.mark.parametrize("combine", ["softmax", "marginal"])
def test_gradients_of_weights_are_those_of_the_logits_as_given(combine: Any) -> None:
    """g and marginals cross by the moved distribution, which the decision is of; other weights by their own."""
    circuit, bias = compiled(cr.Exactly(2)), torch.linspace(-1, 1, E).double()
    logits = logits_of(5, dtype=torch.float64).requires_grad_()
    mask = cr.route(logits, circuit, decide="mode", bias=bias).mask
    routing = cr.route(logits, circuit, replay=mask, bias=bias, combine=combine)
    upstream = torch.randn(5, E, generator=torch.Generator().manual_seed(0)).double()
    (found,) = torch.autograd.grad(routing.gates, logits, upstream)
    g = circuit(logits + bias).marginals
    weights = torch.softmax(logits, -1) if combine == "softmax" else g
    (wanted,) = torch.autograd.grad(((mask + g - g.detach()) * weights * upstream).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_every_router_takes_a_bias() -> None:
    hidden, bias = hidden_of(3, 4), torch.tensor([9.0, 0, 0, 0, 0, -9.0])
    routers = (
        cr.Router(4, E, CONSTRAINTS["costs"]),
        cr.ExactKRouter(4, E, 2),
        cr.DynamicKRouter(4, E, 1, 3),
        cr.TopKRouter(4, E, 2),
        cr.SoftTopKRouter(4, E, 2.0, 0.5, threshold=0.2, max_experts=3),
    )
    for router in routers:
        found = router(hidden, bias=bias)
        assert bool(found.mask[:, 0].all()), router
        assert not bool(found.mask[:, 5].any())
        alone = router(hidden, replay=found.mask)
        torch.testing.assert_close(found.gates, alone.gates)
        assert torch.equal(found.logits, alone.logits)
        layer = cr.MoE(router, [torch.nn.Identity() for _ in range(E)])
        output, routing = layer(hidden, bias=bias)
        torch.testing.assert_close(output, hidden * routing.gates.sum(-1).view(3, 4, 1))
        assert bool(routing.mask[:, 0].all())
        with pytest.raises(ValueError, match=r"bias has shape \(7,\)"):
            router(hidden, bias=torch.zeros(7))
        with pytest.raises(ValueError, match="bias holds NaN"):
            router(hidden, bias=torch.full((E,), torch.nan))


def test_a_budget_takes_price_and_bias_and_keeps_its_total() -> None:
    torch.manual_seed(0)
    router = cr.BudgetRouter(4, E, 2, cr.Between(1, 3), cr.AtMost(4))
    hidden, bias = hidden_of(3, 4), torch.tensor([20.0, 0, 0, 0, 0, -20.0])
    state = router.begin(hidden)
    counts = []
    for layer in range(2):
        routing, after = router(hidden, state, key=key_of(12).view(3, 4), bias=bias, price=torch.zeros(3, 4))
        assert bool(routing.mask[:, 0].all()), layer
        assert not bool(routing.mask[:, 5].any())
        dear, _ = router(hidden, state, key=key_of(12), price=torch.full((3, 4), 50.0))
        cheap, _ = router(hidden, state, key=key_of(12), price=-50.0)
        counts.append((float(dear.counts.double().mean()), float(cheap.counts.double().mean())))
        replayed, _ = router(hidden, state, replay=routing.mask)
        torch.testing.assert_close(routing.gates, replayed.gates)
        balanced = ExactBalance(E).update(ExactBalance(E).init(), routing)
        assert bool(balanced.bias.isfinite().all())
        state = after
    assert int(state.spent.max()) <= 4
    assert counts[0][0] == 1
    assert counts[0][1] > 1


def test_the_bias_of_a_soft_router_moves_who_is_executed_alone() -> None:
    torch.manual_seed(0)
    router, hidden = cr.SoftTopKRouter(4, E, 2.0, 0.5, threshold=0.3), hidden_of(30)
    bias = torch.linspace(-1, 1, E)
    plain, moved = router(hidden), router(hidden, bias=bias)
    assert not torch.equal(plain.mask, moved.mask)
    assert torch.equal(moved.marginals, plain.marginals)
    assert torch.equal(moved.gates, torch.where(moved.mask, plain.marginals, 0.0))
    assert torch.equal(router(hidden, bias=torch.zeros(E)).mask, plain.mask)
    rule = LossFree(E, step=0.02)
    state = rule.init()
    for _ in range(150):
        state = rule.update(state, router(hidden, bias=state.bias))
    assert cr.metrics.max_violation(router(hidden, bias=state.bias)) < cr.metrics.max_violation(plain)
    for other in (Quantile(E), ExactBalance(E)):
        with pytest.raises(TypeError, match=r"a SoftRouting has none; cr\.balance.LossFree looks at the executed"):
            other.update(other.init(), plain)
    with pytest.raises(TypeError, match="a SoftRouting has none"):
        cr.CountController(2.0).update(cr.CountController(2.0).init(), plain)


# ------------------------------------------------------------------------------------------------ states


@every_rule
def test_states_go_through_files_as_plain_tensors(rule: Any, tmp_path: Any) -> None:
    made, circuit = rule(E), compiled(cr.Exactly(2))
    routing = cr.route(logits_of(), circuit, decide="mode")
    state = made.update(made.init(), routing)
    torch.save(state._asdict(), tmp_path / "state.pt")
    again = BalanceState(**torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(made.update(again, routing).bias, made.update(state, routing).bias)
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(copied.bias, state.bias)
    assert all(type(value) is Tensor and not value.requires_grad for value in state)
    assert state.bias.dtype == torch.float32
    wide = made.update(made.init(dtype=torch.float64), routing)
    assert wide.bias.dtype == torch.float64
    torch.testing.assert_close(wide.bias.float(), state.bias)
    assert eval(repr(made), vars(cr.balance)).num_experts == E
    targeted = rule(E, target=[2 / E] * E)
    assert torch.equal(eval(repr(targeted), vars(cr.balance)).target, targeted.target)


@every_rule
def test_states_of_another_run_are_refused(rule: Any) -> None:
    made, circuit = rule(E), compiled(cr.Exactly(2))
    routing, state = cr.route(logits_of(), circuit, decide="mode"), made.init()
    other = {"LossFree": Quantile, "Quantile": ExactBalance, "ExactBalance": LossFree}[rule.__name__]
    wrong: list[tuple[Any, type[Exception], str]] = [
        (
            rule(8).init(),
            ValueError,
            r"state.bias has shape \(8,\): expected \(6,\); the state is of a run with another",
        ),
        (state._replace(bias=torch.zeros(1, E)), ValueError, r"state.bias has shape \(1, 6\)"),
        (state._replace(bias=torch.zeros(E).bfloat16()), TypeError, "state.bias has dtype torch.bfloat16"),
        (state._replace(bias=torch.zeros(E).long()), TypeError, "state.bias has dtype torch.int64"),
        (state._replace(bias=[0.0] * E), TypeError, "state.bias=.*expected a tensor"),
        (state._replace(bias=torch.full((E,), torch.nan)), ValueError, "state.bias holds nan: a state must be finite"),
        (state._replace(bias=torch.full((E,), -INF)), ValueError, "state.bias holds -inf"),
        (other(E).init(), ValueError, rf"state.kind=\d: the state is of cr.balance.{other.__name__}, and this is cr"),
        (state._replace(kind=torch.tensor(9)), ValueError, "state.kind=9: the state is of no rule"),
        (state._replace(kind=torch.tensor(1.0)), TypeError, "state.kind is torch.float32"),
        (cr.CountController(2).init(), TypeError, "state is a CountState: expected the BalanceState that cr.balance"),
        (state._asdict(), TypeError, r"state is a dict: .*make one: BalanceState\(\*\*values\)"),
        (None, TypeError, "state is a NoneType"),
    ]
    for given_state, error, message in wrong:
        with pytest.raises(error, match=message):
            made.update(given_state, routing)
    with pytest.raises(ValueError, match="routing is over 6 experts, and the controller was made for num_experts=4"):
        rule(4).update(rule(4).init(), routing)
    for nothing, message in ((torch.ones(T, E), "routing holds a Tensor"), (3, "routing=3"), ([None], "a NoneType")):
        with pytest.raises(TypeError, match=message):
            made.update(state, nothing)
    with pytest.raises(ValueError, match=r"routing=\(\): give at least one"):
        made.update(state, [])
    with pytest.raises(TypeError, match=r"dtype=torch\.float16"):
        made.init(dtype=torch.float16)


@every_rule
def test_micro_batches_are_one_batch(rule: Any) -> None:
    made, circuit, logits = rule(E), compiled(cr.Exactly(2)), logits_of()
    whole = cr.route(logits, circuit, decide="mode")
    parts = [cr.route(part, circuit, decide="mode") for part in (logits[:7], logits[7:7], logits[7:])]
    torch.testing.assert_close(made.update(made.init(), parts).bias, made.update(made.init(), whole).bias)
    nothing = made.init()._replace(bias=torch.arange(E).float() - 2.5)
    assert torch.equal(made.update(nothing, parts[1]).bias, nothing.bias)
    if rule is not LossFree:
        with pytest.raises(ValueError, match=r"decisions by different constraints, Exactly\(\d\) and Exactly"):
            made.update(made.init(), [whole, cr.route(logits, compiled(cr.Exactly(3)), decide="mode")])


@every_rule
def test_no_graph_is_kept_and_none_is_needed(rule: Any) -> None:
    made, circuit = rule(E), compiled(cr.Exactly(2))
    logits = logits_of().requires_grad_()
    state = made.update(made.init(), cr.route(logits, circuit, key=key_of(), bias=made.init().bias))
    assert not state.bias.requires_grad
    assert state.bias.grad_fn is None
    assert logits.grad is None
    with torch.inference_mode():
        again = made.update(made.init(), cr.route(logits, circuit, key=key_of(), bias=made.init().bias))
    assert torch.equal(again.bias, state.bias)


def test_the_bias_is_relative_to_the_one_that_was_decided_with() -> None:
    circuit, logits, rule = compiled(cr.Exactly(2)), logits_of(), ExactBalance(E)
    wanted = bias_for(circuit(logits))
    for start in itertools.islice((torch.zeros(E), torch.linspace(-2, 2, E)), 2):
        state = rule.init()._replace(bias=start)
        found = rule.update(state, cr.route(logits, circuit, decide="mode", bias=start, price=0.7)).bias
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    slow = ExactBalance(E, rate=0.25).update(rule.init(), cr.route(logits, circuit, decide="mode")).bias
    torch.testing.assert_close(slow, wanted / 4, rtol=0, atol=1e-5)
    cold = ExactBalance(E, temperature=0.25).update(rule.init(), cr.route(logits, circuit, decide="mode")).bias
    torch.testing.assert_close(cold, bias_for(circuit(logits), temperature=0.25), rtol=0, atol=1e-5)
    potential = torch.tensor([-INF, 0.0, 1.0, 0.5])
    ranged = cr.compile(cr.Between(0, 3), E)
    routing = cr.route(logits, ranged, decide="mode", count_potential=potential, temperature=0.5)
    bias = rule.update(rule.init(), routing).bias
    mean = ranged(logits + bias, potential).tempered(0.5).marginals.mean(0)
    torch.testing.assert_close(mean, mean.mean().expand(E), rtol=0, atol=1e-6)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "experts": (lambda: LossFree(0), ValueError, "num_experts=0: must be at least 1"),
    "step": (lambda: LossFree(4, step=0), ValueError, "step=0.0: must be positive and finite"),
    "no target": (lambda: LossFree(4, target=[0, 0, 0, 0]), ValueError, "target is 0 for all experts"),
    "centre": (lambda: LossFree(4, centre=1), TypeError, "centre=1"),
    "rate": (lambda: Quantile(4, rate=0), ValueError, r"rate=0.0: must lie in \(0, 1\]"),
    "rate above": (lambda: ExactBalance(4, rate=1.5), ValueError, r"rate=1.5: must lie in"),
    "steps": (lambda: ExactBalance(4, steps=0), ValueError, "steps=0: must be at least 1"),
    "temperature": (lambda: ExactBalance(4, temperature=-1), ValueError, "temperature=-1"),
    "length": (lambda: ExactBalance(4, [0.5] * 3), ValueError, r"target has shape \(3,\): expected one number per"),
    "above": (lambda: ExactBalance(4, [0.5, 1.5, 0, 0]), ValueError, r"target\[1\]=1.5: a fraction of the tokens"),
    "below": (lambda: Quantile(4, [0.5, 0.5, 0, -0.5]), ValueError, r"target\[3\]=-0.5"),
    "nan": (lambda: Quantile(4, [0.5, math.nan, 0, 0]), ValueError, r"target\[1\]=nan"),
    "text": (lambda: Quantile(4, "even"), TypeError, "target='even': expected one number per expert"),
    "no number": (lambda: Quantile(4, [None] * 4), TypeError, r"target\[0\]=None"),
    "complex": (lambda: Quantile(4, torch.ones(4) * 1j), TypeError, "target has dtype torch.complex64"),
    "logits": (lambda: bias_for(torch.zeros(3, 4)), TypeError, "distribution is a Tensor: expected one, such"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_traces_and_batches_are_refused_where_values_decide() -> None:
    circuit = compiled(cr.Exactly(2))
    with pytest.raises(NotImplementedError, match="bias_for decides by values, which a traced program"):
        torch.func.vmap(lambda x: bias_for(circuit(x)))(logits_of(8).view(2, 4, E))
    rule = Quantile(E)
    routing = cr.route(torch.zeros(3, E, device="meta"), circuit, training=False)
    with pytest.raises(NotImplementedError, match=r"Quantile.update decides by values"):
        rule.update(rule.init(), routing)


def test_targets_of_any_kind() -> None:
    for target in ([0.25, 0.75], (0.25, 0.75), np.array([0.25, 0.75]), torch.tensor([0.25, 0.75]).bfloat16()):
        assert torch.equal(ExactBalance(2, target).target, torch.tensor([0.25, 0.75], dtype=torch.float64))  # type: ignore[arg-type]
