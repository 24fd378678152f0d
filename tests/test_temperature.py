"""Temperature, decide, price and bias: what is tempered, what is not, and who samples.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.keys import fold_in, uniform
from circuitroute.routing.choice import SHARE
from circuitroute.routing.estimators import Simple

T, E = 40, 6

CONSTRAINTS = {
    "exactly": cr.Exactly(2),
    "between": cr.Between(1, 4),
    "any": cr.Between(0, E),
    "counts": cr.CountIn({1, 4}),
    "groups": cr.EachGroup(cr.Groups(2), cr.Exactly(1)),
    "costs": cr.Cost([1, 2, 3, 1, 2, 3], at_most=5),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
INF = math.inf


def logits_of(tokens: int = T, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def with_evidence(dtype: torch.dtype = torch.float32) -> Tensor:
    logits = logits_of(dtype=dtype)
    logits[1, 0], logits[2, 3], logits[3, 5], logits[3, 2] = INF, -INF, INF, -INF
    return logits


def key_of(tokens: int = T, seed: int = 5) -> Tensor:
    return cr.random_key(seed, torch.arange(tokens))


def compiled(constraint: cr.Constraint) -> cr.Circuit:
    return cr.compile(constraint, E)


# ---------------------------------------------------------------------------------------------- the distribution


@every_constraint
@pytest.mark.parametrize("temperature", [1.0, 1, torch.tensor(1.0), torch.ones(T)], ids=["float", "int", "[]", "[T]"])
def test_temperature_1_changes_no_bit(constraint: cr.Constraint, temperature: Any) -> None:
    circuit, logits = compiled(constraint), with_evidence()
    plain = cr.route(logits.requires_grad_(), circuit, key=key_of())
    found = cr.route(logits, circuit, key=key_of(), temperature=temperature, decide="sample")
    for name in ("mask", "gates", "logits", "marginals", "log_prob"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    gradients = [torch.autograd.grad(r.gates.square().sum(), logits)[0] for r in (plain, found)]
    assert torch.equal(*gradients)


@every_constraint
@pytest.mark.parametrize("temperature", [0.25, 3.0, torch.tensor(0.5), torch.linspace(0.1, 4.0, T)], ids=str)
@pytest.mark.parametrize("decide", ["sample", "mode", 0.5])
def test_the_distribution_is_that_of_divided_logits(constraint: cr.Constraint, temperature: Any, decide: Any) -> None:
    circuit, logits = compiled(constraint), with_evidence()
    routing = cr.route(logits, circuit, key=key_of(), temperature=temperature, decide=decide)
    t = temperature[:, None] if isinstance(temperature, Tensor) and temperature.dim() else temperature
    expected = circuit(logits / t)  # infinite logits stay infinite
    for name in ("marginals", "log_partition", "mode", "variance", "covariance_matrix"):
        assert torch.equal(getattr(routing.distribution, name), getattr(expected, name)), name
    if circuit.counts is not None:
        assert torch.equal(routing.distribution.count_probs, expected.count_probs)
    assert torch.equal(routing.distribution.entropy(), expected.entropy())
    assert torch.equal(routing.marginals, expected.marginals)
    assert torch.equal(routing.log_prob, expected.log_prob(routing.mask))
    assert torch.equal(routing.logits, logits)
    assert torch.equal(cr.losses.z_loss(routing), cr.losses.z_loss(cr.route(logits, circuit, key=key_of())))
    share = routing.mask.float().sum(0) / routing.mask.sum().clamp(min=1)
    balance = E * (share * expected.marginals.sum(0) / expected.marginals.sum()).sum()
    torch.testing.assert_close(cr.losses.load_balance(routing), balance)


@every_constraint
def test_a_sample_is_that_of_divided_logits(constraint: cr.Constraint) -> None:
    circuit, logits = compiled(constraint), with_evidence()
    routing = cr.route(logits, circuit, key=key_of(), temperature=0.5)
    assert torch.equal(routing.mask, circuit(logits / 0.5).sample(key=key_of()) == 1)


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid"])
def test_gates_weigh_by_the_logits_themselves(combine: Any) -> None:
    circuit, logits = compiled(cr.Exactly(2)), logits_of()
    routing = cr.route(logits, circuit, combine=combine, key=key_of(), temperature=0.25)
    again = cr.route(logits, circuit, combine=combine, replay=routing.mask)
    assert torch.equal(routing.gates, again.gates)


def test_marginal_gates_are_the_tempered_marginals() -> None:
    routing = cr.route(logits_of(), compiled(cr.Exactly(2)), combine="marginal", key=key_of(), temperature=0.25)
    assert torch.equal(routing.gates, routing.mask * routing.marginals)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, torch.tensor(0.0), torch.tensor([1.0, -1.0, 1.0])])
def test_distributions_refuse_temperatures_that_are_not_positive(temperature: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature=.*: must be positive"):
        compiled(cr.Exactly(2))(logits_of(3)).tempered(temperature)


def test_a_count_potential_is_not_divided() -> None:
    circuit, logits = compiled(cr.Between(0, 4)), logits_of()
    potential = torch.tensor([0.5, 1.0, -1.0, 0.0, -INF])
    routing = cr.route(logits, circuit, key=key_of(), temperature=0.5, count_potential=potential)
    assert torch.equal(routing.marginals, circuit(logits / 0.5, potential).marginals)


def test_leading_dimensions_come_with_their_temperatures() -> None:
    circuit, logits, t = compiled(cr.Exactly(2)), logits_of(), torch.linspace(0.2, 2, T)
    flat = cr.route(logits, circuit, key=key_of(), temperature=t)
    for given in (t, t.view(5, 8)):
        folded = cr.route(logits.view(5, 8, E), circuit, key=key_of(), temperature=given)
        assert torch.equal(folded.mask, flat.mask)
        assert torch.equal(folded.log_prob, flat.log_prob)
    columns = cr.route(logits.view(5, 8, E), circuit, key=key_of(), temperature=t[:8])
    assert torch.equal(columns.marginals, circuit(logits / t[:8].repeat(5)[:, None]).marginals)


# ---------------------------------------------------------------------------------------------- the mode


@every_constraint
@pytest.mark.parametrize("temperature", [1e-3, 0.25, 1.0, 7.0, torch.linspace(0.1, 4.0, T)], ids=str)
@pytest.mark.parametrize("logits", [logits_of(), with_evidence(), logits_of().round(), torch.zeros(T, E)])
def test_the_mode_is_that_of_the_logits(constraint: cr.Constraint, temperature: Any, logits: Tensor) -> None:
    """To the bit, ties included, in training and in evaluation."""
    circuit = compiled(constraint)
    expected = circuit(logits).mode == 1
    for options in ({"decide": "mode"}, {"decide": 0}, {"decide": 0.0, "key": key_of()}, {"training": False}):
        routing = cr.route(logits, circuit, temperature=temperature, **options)
        assert torch.equal(routing.mask, expected)


@pytest.mark.parametrize("decide", ["mode", "sample", 0.5])
def test_rows_of_nan_are_nan_alone(decide: Any) -> None:
    circuit, logits = compiled(cr.Exactly(2)), with_evidence()
    logits[4, 2], logits[6, :] = math.nan, -INF
    good = [i for i in range(T) if i not in (4, 6)]
    options = {"decide": decide, "temperature": 0.5}
    routing = cr.route(logits, circuit, key=key_of(), validate_args=False, **options)
    alone = cr.route(logits[good], circuit, key=key_of()[good], **options)
    assert not routing.mask[[4, 6]].any()
    assert routing.gates[[4, 6]].isnan().all()
    assert torch.equal(routing.mask[good], alone.mask)
    assert torch.equal(routing.gates[good], alone.gates)
    assert torch.equal(routing.log_prob[good], alone.log_prob)
    with pytest.raises(ValueError, match="NaN in row"):
        cr.route(logits, circuit, key=key_of(), **options)


# ---------------------------------------------------------------------------------------------- its gradient


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4), CONSTRAINTS["groups"]], ids=repr)
def test_the_temperature_has_the_gradient_of_finite_differences(
    constraint: cr.Constraint, per_token: bool, evidence: bool
) -> None:
    circuit = compiled(constraint)
    logits = (with_evidence(torch.float64) if evidence else logits_of(dtype=torch.float64))[:5]
    free = logits.isfinite()
    mask = cr.route(logits, circuit, key=key_of(5)).mask
    t = torch.linspace(0.6, 1.7, 5, dtype=torch.float64) if per_token else torch.tensor(0.7, dtype=torch.float64)

    def outputs(t: Tensor, finite: Tensor) -> tuple[Tensor, ...]:
        full = logits.masked_scatter(free, finite)
        routing = cr.route(full, circuit, replay=mask, temperature=t)
        return routing.marginals, routing.log_prob, routing.distribution.log_partition

    inputs = (t.requires_grad_(), logits[free].requires_grad_())
    assert torch.autograd.gradcheck(outputs, inputs)


def test_the_estimators_gradient_reaches_the_temperature() -> None:
    logits, t = with_evidence().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    routing = cr.route(logits, compiled(cr.Exactly(2)), key=key_of(), temperature=t)
    upstream = logits_of(seed=3)
    found = torch.autograd.grad((routing.gates * upstream).sum(), [t, logits])
    assert all(bool(g.isfinite().all()) for g in found)
    assert float(found[0]) != 0


# ---------------------------------------------------------------------------------------------- shares

MANY = 4000


def test_shares_0_and_1_are_the_mode_and_a_sample() -> None:
    circuit, logits = compiled(cr.Exactly(2)), logits_of()

    def route(decide: Any) -> Tensor:
        return cr.route(logits, circuit, key=key_of(), decide=decide, temperature=2.0).mask

    assert torch.equal(route(0.0), route("mode"))
    assert torch.equal(route(1.0), route("sample"))
    assert torch.equal(route(None), route("sample"))
    assert not torch.equal(route("mode"), route("sample"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_who_is_sampled_is_a_function_of_the_key(share: float) -> None:
    """The same in any batch; who is sampled with a smaller share is with a larger one; subsets are those of share 1.

    With 50 experts at a high temperature a sample is the mode with a probability below 1e-3, so that 4,000 tokens tell
    who was sampled. The share is off by more than 5 standard deviations in one run of a million; seeds are fixed.
    """
    circuit, key = cr.compile(cr.Exactly(3), 50), key_of(MANY)
    logits = torch.randn(MANY, 50, generator=torch.Generator().manual_seed(0))

    def route(decide: Any, at: Any = slice(None)) -> Tensor:
        return cr.route(logits[at], circuit, key=key[at], decide=decide, temperature=5.0).mask

    mode, sample, mixed = route("mode"), route("sample"), route(share)
    sampled = (mixed != mode).any(-1)
    drawn = uniform(fold_in(key, torch.tensor(SHARE)), 0, 1, torch.float64)[0] < share
    assert float((drawn != sampled).double().mean()) < 1e-3
    assert torch.equal(mixed, torch.where(drawn[:, None], sample, mode))
    deviation = math.sqrt(share * (1 - share) / MANY)
    assert abs(float(sampled.double().mean()) - share) < 5 * deviation + 1e-3
    more = (route(min(1.0, share + 0.05)) != mode).any(-1)
    assert bool((more | ~sampled).all())
    order = torch.randperm(MANY, generator=torch.Generator().manual_seed(1))[:100]
    assert torch.equal(route(share, order), mixed[order])
    assert torch.equal(torch.cat([route(share, at) for at in torch.arange(100).split(7)]), mixed[:100])


def test_without_a_key_torch_draws() -> None:
    circuit, logits = compiled(cr.Exactly(2)), logits_of()
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(cr.route(logits, circuit, decide=0.5, temperature=3.0).mask)
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], cr.route(logits, circuit, decide=0.5, temperature=3.0).mask)


@every_constraint
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid", "marginal"])
def test_the_estimators_gradient_crosses_the_mode(constraint: cr.Constraint, combine: Any, temperature: float) -> None:
    """That of mask + marginals - stopgrad(marginals), which reaches unchosen experts too."""
    circuit, logits, upstream = compiled(constraint), logits_of(8).requires_grad_(), logits_of(8, seed=4)

    def plain(mask: Tensor, distribution: cr.SubsetDistribution) -> Tensor:
        marginals = circuit(logits / temperature).marginals
        return mask + marginals - marginals.detach()

    gradients = []
    for estimator in (Simple(), plain):
        routing = cr.route(
            logits, circuit, combine=combine, estimator=estimator, decide="mode", temperature=temperature
        )
        gradients.append(torch.autograd.grad((routing.gates * upstream).sum(), logits, retain_graph=True)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    crossed = torch.autograd.grad((Simple()(routing.mask.float(), routing.distribution) * upstream).sum(), logits)[0]
    assert constraint != cr.Exactly(2) or bool((crossed[~routing.mask] != 0).all())


# ---------------------------------------------------------------------------------------------- what is refused

BAD = {
    "zero": ({"temperature": 0.0}, ValueError, r"temperature=0\.0: must be positive"),
    "negative": ({"temperature": -1.0}, ValueError, r"temperature=-1\.0: must be positive"),
    "nan": ({"temperature": math.nan}, ValueError, "temperature=nan: must be positive"),
    "inf": ({"temperature": INF}, ValueError, "temperature=inf: must be positive"),
    "tiny": ({"temperature": 1e-40}, ValueError, "temperature=1e-40: must be .* decide='mode'"),
    "text": ({"temperature": "hot"}, TypeError, "temperature='hot': expected a number"),
    "bool": ({"temperature": True}, TypeError, "temperature=True"),
    "integers": ({"temperature": torch.tensor(1)}, TypeError, "temperature has dtype torch.int64"),
    "zeros": ({"temperature": torch.tensor(0.0)}, ValueError, r"temperature=0\.0.*must be positive"),
    "one bad token": ({"temperature": torch.tensor([1.0, -2, 1])}, ValueError, r"temperature=-2\.0 in row 1"),
    "nan in a token": ({"temperature": torch.tensor([1.0, 1, math.nan])}, ValueError, "temperature=nan in row 2"),
    "shape": ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\): it must broadcast to \(3,\)"),
    "share above": ({"decide": 1.5}, ValueError, r"decide=1\.5: a share of sampled tokens must lie in 0\.\.1"),
    "share below": ({"decide": -0.1}, ValueError, r"decide=-0\.1: a share"),
    "share nan": ({"decide": math.nan}, ValueError, "decide=nan: a share"),
    "word": ({"decide": "greedy"}, ValueError, "decide='greedy': choose 'sample', 'mode', or a share"),
    "kind": ({"decide": [1]}, TypeError, r"decide=\[1\]: expected a number"),
    "score": ({"decide": "mode", "estimator": "score"}, ValueError, "decide='mode' with estimator='score'"),
    "score share": ({"decide": 0.5, "estimator": "score"}, ValueError, "decide=0.5 with estimator='score'"),
    "price": ({"price": math.nan}, ValueError, "price=nan: must be finite"),
    "price inf": ({"price": torch.tensor([0.0, INF, 0.0])}, ValueError, "price=.*must be finite"),
    "price shape": ({"price": torch.ones(2)}, ValueError, r"price has shape \(2,\): it must broadcast to \(3,\)"),
    "bias shape": ({"bias": torch.ones(E + 1)}, ValueError, rf"bias has shape \({E + 1},\): expected one number per"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_arguments_that_make_no_sense_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cr.route(logits_of(3), compiled(cr.Between(1, 3)), **options)


@pytest.mark.parametrize("name", [name for name in BAD if not name.startswith(("price", "bias"))])
def test_routers_refuse_them_too(name: str) -> None:
    """When they are made, or, what depends on the tokens, when they are called."""
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        cr.Router(4, E, cr.Between(1, 3), **options)(torch.ones(3, 4))
    router = cr.Router(4, E, cr.Between(1, 3), estimator=options.get("estimator", "simple"))
    given = {name: value for name, value in options.items() if name != "estimator"}
    with pytest.raises(error, match=message):
        router(torch.ones(3, 4), **given)


def test_the_score_estimator_samples_and_evaluates() -> None:
    circuit = compiled(cr.Exactly(2))
    cr.route(logits_of(), circuit, estimator="score", decide="sample", temperature=0.5)
    assert cr.route(logits_of(), circuit, estimator="score", training=False).mask.any()


# ---------------------------------------------------------------------------------------------- price and bias


def test_price_and_bias_move_the_choice_alone() -> None:
    circuit, logits = compiled(cr.Between(1, 4)), with_evidence()
    bias = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, 1.0])
    price = torch.linspace(-1, 3, T)
    routing = cr.route(logits, circuit, key=key_of(), price=price, bias=bias, temperature=0.5)
    moved = logits + bias - price[:, None]
    torch.testing.assert_close(routing.marginals, circuit(moved / 0.5).marginals)
    assert torch.equal(routing.logits, logits)
    assert torch.equal(routing.gates, cr.route(logits, circuit, replay=routing.mask).gates)
    mode = cr.route(logits, circuit, decide="mode", price=price, bias=bias)
    assert torch.equal(mode.mask, circuit(logits + (bias - price[:, None])).mode == 1)


def test_prices_of_all_shapes() -> None:
    circuit, logits, key = compiled(cr.Between(1, 4)), logits_of(), key_of()
    alone = cr.route(logits, circuit, key=key, price=1.5)
    for price in (torch.tensor(1.5), torch.full((T,), 1.5), torch.full((1,), 1.5)):
        assert torch.equal(cr.route(logits, circuit, key=key, price=price).mask, alone.mask)
    each = torch.linspace(0, 2, T)
    flat = cr.route(logits, circuit, key=key, price=each)
    for shape in ((5, 8), (T, 1)):
        folded = cr.route(logits.view(*shape, E), circuit, key=key.view(shape), price=each.view(shape))
        assert torch.equal(folded.mask, flat.mask)
    assert cr.route(logits, circuit, decide="mode", price=20.0).counts.eq(1).all()
    assert cr.route(logits, circuit, decide="mode", price=-20.0).counts.eq(4).all()


def test_a_small_price_is_not_lost_on_narrow_logits() -> None:
    """Added in float32: bfloat16 cannot tell 8 from 8.01."""
    circuit, logits = compiled(cr.Between(1, 4)), torch.full((1, E), 8.0, dtype=torch.bfloat16)
    routing = cr.route(logits, circuit, price=0.01)
    torch.testing.assert_close(routing.marginals, circuit(logits.float() - 0.01).marginals)
    assert routing.logits.dtype == torch.float32


def test_the_count_controller_holds_its_target(tmp_path: Any) -> None:
    """Within 0.1 of its target, from a price that is far off; states go through files."""
    circuit, controller = compiled(cr.Between(1, 5)), cr.CountController(2.5, gain=0.1)
    state = type(controller.init())(torch.tensor(8.0))
    counts = []
    for step in range(400):
        routing = cr.route(logits_of(200, seed=step), circuit, decide="mode", price=state.price)
        counts.append(cr.metrics.active_experts(routing))
        if step % 100 == 50:
            torch.save(state._asdict(), tmp_path / "state.pt")
            again = type(state)(**torch.load(tmp_path / "state.pt", weights_only=True))
            assert torch.equal(controller.update(again, routing).price, controller.update(state, routing).price)
            state = again
        state = controller.update(state, routing)
    assert counts[0] < 1.5
    assert abs(sum(counts[-100:]) / 100 - 2.5) < 0.1
    assert state.price.shape == ()
    assert not state.price.requires_grad


def test_the_count_controller_moves_by_the_rule() -> None:
    controller = cr.CountController(2.0, gain=0.5)
    routing = cr.route(logits_of(), compiled(cr.Exactly(3)))
    state = controller.update(controller.init(), routing)
    assert float(state.price) == 0.5
    nothing = cr.route(logits_of(0), compiled(cr.Exactly(3)))
    assert torch.equal(controller.update(state, nothing).price, state.price)
    assert eval(repr(controller), {"CountController": cr.CountController}).gain == 0.5


def test_processes_agree_on_the_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of experts and of tokens are added up, not means: processes may have different numbers of tokens."""
    elsewhere = torch.tensor([100.0, 10.0]).double()  # experts, tokens of another process
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total, group: total.add_(elsewhere))
    controller = cr.CountController(2.0, gain=1.0)
    routing = cr.route(logits_of(), compiled(cr.Exactly(3)))
    group: Any = "a process group"
    state = controller.update(controller.init(), routing, group)
    assert float(state.price) == pytest.approx((3 * T + 100) / (T + 10) - 2)


@pytest.mark.parametrize(
    ("target", "gain", "message"),
    [(0, 0.1, "target=0.0"), (math.nan, 0.1, "target=nan"), (2, -1, "gain=-1.0"), (2, INF, "gain=inf")],
)
def test_controllers_refuse_nonsense(target: float, gain: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: must be positive and finite"):
        cr.CountController(target, gain)


# ---------------------------------------------------------------------------------------------- agreement


@every_constraint
@pytest.mark.parametrize("temperature", [0.3, 1.0, torch.linspace(0.2, 3, T)], ids=str)
def test_mode_agreement_is_that_of_enumeration(constraint: cr.Constraint, temperature: Any) -> None:
    circuit, logits = compiled(constraint), with_evidence(torch.float64)
    logits[5] = -9.0  # an empty mode, where there is one
    routing = cr.route(logits, circuit, key=key_of(), temperature=temperature)
    worlds = torch.tensor(list(itertools.product([False, True], repeat=E)))
    distribution = circuit(logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature))
    allowed = worlds[circuit.satisfies(worlds)]
    mode = circuit(logits).mode == 1
    expected = torch.zeros(T, dtype=torch.float64)
    for world in allowed:
        possible = ((~(logits == INF) | world) & (~(logits == -INF) | ~world)).all(-1)
        chance = distribution.log_prob(world.expand(T, E).double()).exp().where(possible, torch.tensor(0.0).double())
        shared = (mode & world).sum(-1) / mode.sum(-1).clamp(min=1)
        expected += chance * torch.where(mode.any(-1), shared, (~world.any()).double())
    found = cr.metrics.mode_agreement(routing)
    assert found.shape == (T,)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_mode_agreement_is_1_in_the_cold() -> None:
    circuit, logits = compiled(cr.Exactly(2)), logits_of()
    found = [float(cr.metrics.mode_agreement(cr.route(logits, circuit, temperature=t)).mean()) for t in (1e6, 1, 1e-6)]
    assert found[0] == pytest.approx(2 / E, abs=1e-4)
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(1, abs=1e-6)


@every_constraint
@pytest.mark.parametrize("agreement", [0.75, 0.9])
def test_calibration_hits_its_target(constraint: cr.Constraint, agreement: float) -> None:
    torch.manual_seed(0)
    router, hidden = cr.Router(8, E, constraint), torch.randn(3, 20, 8)
    found = router.calibrate_temperature(hidden, agreement)
    assert isinstance(found, float)
    assert router.temperature == found
    reached = cr.metrics.mode_agreement(router(hidden)).mean()
    assert float(reached) == pytest.approx(agreement, abs=1e-3)


def test_calibration_follows_the_scale_of_the_logits() -> None:
    torch.manual_seed(0)
    router, hidden = cr.ExactKRouter(8, E, 2), torch.randn(50, 8)
    small, large = (router.calibrate_temperature(hidden * scale) for scale in (1e-3, 1e3))
    assert large / small == pytest.approx(1e6, rel=1e-3)


@pytest.mark.parametrize(
    ("hidden", "agreement", "message"),
    [
        (torch.ones(5, 8), 1.0, r"agreement=1\.0: on these logits temperatures give from"),
        (torch.ones(5, 8), 0.2, r"agreement=0\.2: on these logits"),
        (torch.ones(5, 8), math.nan, "agreement=nan: on these logits"),
        (torch.zeros(5, 8), 0.75, r"agreement=0\.75: on these logits"),  # all logits equal: no temperature matters
        (torch.ones(0, 8), 0.75, "there are no tokens to calibrate on"),
    ],
)
def test_targets_that_no_temperature_reaches(hidden: Tensor, agreement: float, message: str) -> None:
    router = cr.ExactKRouter(8, E, 2)
    with pytest.raises(ValueError, match=message):
        router.calibrate_temperature(hidden, agreement)
    assert router.temperature == 1.0


# ---------------------------------------------------------------------------------------------- schedules


def test_schedules() -> None:
    geometric = cr.schedules.geometric(1.0, 0.125, steps=300)
    assert [geometric(step) for step in (0, 100, 200, 300, 5000)] == pytest.approx([1, 0.5, 0.25, 0.125, 0.125])
    cosine = cr.schedules.cosine(1.0, 0.0, steps=100)
    assert [cosine(step) for step in (0, 25, 50, 100, 900)] == pytest.approx(
        [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0, 0]
    )
    constant = cr.schedules.constant(0.25)
    assert {constant(step) for step in (0, 7, 1e9)} == {0.25}
    assert geometric(-5) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cr.schedules.geometric(1.0, 0.0, 10), r"end=0\.0: a geometric schedule has positive ends"),
        (lambda: cr.schedules.geometric(-1.0, 1.0, 10), r"start=-1\.0: a geometric"),
        (lambda: cr.schedules.geometric(1.0, 0.5, 0), "steps=0: must be at least 1"),
        (lambda: cr.schedules.cosine(math.nan, 0.5, 5), "start=nan: must be finite"),
        (lambda: cr.schedules.constant(INF), "value=inf: must be finite"),
    ],
)
def test_schedules_refuse_nonsense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------- routers

ROUTERS: dict[str, Callable[..., cr.Router]] = {
    "router": lambda **options: cr.Router(4, E, cr.CountIn({1, 3}), **options),
    "exact": lambda **options: cr.ExactKRouter(4, E, 3, **options),
    "dynamic": lambda **options: cr.DynamicKRouter(4, E, 1, 4, **options),
}
every_router = pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)


def hidden_of(*lead: int) -> Tensor:
    return torch.randn(*lead, 4, generator=torch.Generator().manual_seed(2))


@every_router
def test_routers_have_attributes_and_overrides(make: Callable[..., cr.Router]) -> None:
    router, hidden, key = make(decide=0.5, temperature=0.25), hidden_of(T), key_of()
    assert (router.decide, router.temperature) == (0.5, 0.25)
    assert "decide=0.5, temperature=0.25" in repr(router)

    def expected(**options: Any) -> Tensor:
        return cr.route(router.logits(hidden), router.circuit, key=key, **options).log_prob

    assert torch.equal(router(hidden, key=key).log_prob, expected(decide=0.5, temperature=0.25))
    found = router(hidden, key=key, decide="mode", temperature=2.0, price=0.5, bias=torch.arange(E) / 4)
    wanted = expected(decide="mode", temperature=2.0, price=0.5, bias=torch.arange(E) / 4)
    assert torch.equal(found.log_prob, wanted)
    router.temperature, router.decide = cr.schedules.geometric(1.0, 0.5, 10)(10), "sample"
    assert torch.equal(router(hidden, key=key).log_prob, expected(temperature=0.5))
    assert sorted(router.state_dict()) == ["weight"]
    router.eval()
    assert torch.equal(router(hidden).mask, router.circuit(router.logits(hidden)).mode == 1)


def test_a_top_k_router_takes_the_mode_only() -> None:
    router, hidden = cr.TopKRouter(4, E, 2), hidden_of(T)
    for decide in ("sample", 0.5, 1.0):
        with pytest.raises(ValueError, match="a TopKRouter takes the mode only; ExactKRouter samples"):
            router(hidden, decide=decide)
    assert torch.equal(router(hidden, decide="mode", temperature=9.0).mask, router(hidden).mask)
    router.decide = 0.5
    with pytest.raises(ValueError, match=r"decide=0\.5: a TopKRouter"):
        router(hidden)


def test_circuits_stand_in_for_constraints(tmp_path: Any) -> None:
    circuit = cr.compile(cr.Exactly(2), E)
    circuit.save(tmp_path / "two.circuit")
    for given in (circuit, cr.load(tmp_path / "two.circuit")):
        router = cr.Router(4, E, given)
        assert router.circuit is given
        assert router(hidden_of(T)).counts.eq(2).all()
    with pytest.raises(ValueError, match=f"it is over {E} variables, and there are 5 experts"):
        cr.Router(4, 5, circuit)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0, torch.linspace(0.1, 5, T)], ids=str)
@pytest.mark.parametrize("decide", ["mode", "sample", 0.5])
def test_budgets_are_kept_at_any_temperature(decide: Any, temperature: Any) -> None:
    torch.manual_seed(0)
    budget = cr.BudgetRouter(
        4, E, 3, cr.Between(1, 4), cr.Exactly(7), decide=decide, temperature=temperature, per_token=True
    )
    hidden = hidden_of(T)

    def walk(**options: Any) -> list[cr.Routing]:
        state, routings = budget.begin(hidden), []
        for layer in range(3):
            routing, state = budget(hidden, state, key=cr.random_key(layer, torch.arange(T)), **options)
            routings.append(routing)
        return routings

    routings = walk()
    assert torch.stack([routing.counts for routing in routings]).sum(0).eq(7).all()
    for routing in routings:
        assert routing.counts.ge(1).all()
        assert routing.counts.le(4).all()
    modes = walk(decide="mode", temperature=1.0)
    evaluated = [routing.mask for routing in (budget.eval(), walk())[1]]
    assert all(torch.equal(routing.mask, mask) for routing, mask in zip(modes, evaluated, strict=True))
    if decide == "mode":
        assert all(torch.equal(routing.mask, mask) for routing, mask in zip(routings, evaluated, strict=True))


@every_router
@pytest.mark.parametrize("options", [{"decide": "mode"}, {"decide": 0.5}, {}], ids=str)
@pytest.mark.parametrize("temperature", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_routers_compile_in_one_graph(make: Callable[..., cr.Router], options: Any, temperature: Any) -> None:
    torch._dynamo.reset()
    router, hidden, key = make(**options, temperature=temperature), hidden_of(T), key_of()

    def routed(hidden: Tensor) -> tuple[Tensor, ...]:
        routing = router(hidden, key=key)
        return routing.mask, routing.gates, routing.log_prob, routing.marginals

    plain, traced = routed(hidden), torch.compile(routed, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(plain[0], traced[0])
    for a, b in zip(plain[1:], traced[1:], strict=True):
        torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad(gates.square().sum(), router.weight, retain_graph=True)[0]
        for gates in (plain[1], traced[1])
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("keyed", [True, False])
def test_checkpointing_decides_the_same(use_reentrant: bool, keyed: bool) -> None:
    torch.manual_seed(0)
    router, hidden = cr.ExactKRouter(4, E, 2, decide=0.5, temperature=3.0), hidden_of(T).requires_grad_()
    masks: list[Tensor] = []

    def layer(hidden: Tensor) -> Tensor:
        routing = router(hidden, key=key_of() if keyed else None)
        masks.append(routing.mask)
        return routing.gates.square()  # saved for backward, so that nothing stops before

    checkpoint(layer, hidden, use_reentrant=use_reentrant).sum().backward()
    assert len(masks) == 2
    assert torch.equal(*masks)


# ---------------------------------------------------------------------------------------------- records


def test_records_keep_the_temperature(tmp_path: Any) -> None:
    circuit, logits = compiled(cr.Between(1, 4)), logits_of()
    routing = cr.route(logits, circuit, key=key_of(), temperature=torch.tensor(0.3))
    record = cr.RoutingRecord.of(routing)
    assert record.temperature == pytest.approx(0.3)
    record.save(tmp_path / "record.npz")
    read = cr.RoutingRecord.load(tmp_path / "record.npz")
    assert read == record
    assert read.temperature == record.temperature
    assert read != cr.RoutingRecord(read.layers, read.log_probs)
    parts = [record[:10], *record[10:].split([20, 10])]
    assert {part.temperature for part in parts} == {record.temperature}
    assert cr.RoutingRecord.cat(parts) == record
    assert "temperature 0.3" in repr(record)
    again = cr.route(logits, circuit, replay=read, temperature=0.3)
    assert torch.equal(again.mask, routing.mask)
    torch.testing.assert_close(again.log_prob, record.path_log_prob.float())
    with pytest.raises(ValueError, match="records were made at temperatures"):
        cr.RoutingRecord.cat([record, cr.RoutingRecord(record.layers, record.log_probs)])


def test_a_record_at_temperature_1_is_the_file_it_was(tmp_path: Any) -> None:
    record = cr.RoutingRecord.of(cr.route(logits_of(), compiled(cr.Exactly(2))))
    assert record.temperature == 1.0
    record.save(tmp_path / "record.npz")
    content = (tmp_path / "record.npz").read_bytes()
    assert b'"version": 1' in content
    assert b"temperature" not in content
    assert cr.RoutingRecord.load(tmp_path / "record.npz") == record


@pytest.mark.parametrize("temperature", [0.5, 2.0, torch.tensor(0.5), torch.linspace(1, 2, T)], ids=str)
def test_records_are_not_replayed_at_another_temperature(temperature: Any) -> None:
    circuit, logits = compiled(cr.Exactly(2)), logits_of()
    record = cr.RoutingRecord.of(cr.route(logits, circuit, key=key_of()))
    with pytest.raises(ValueError, match="replay was recorded at temperature=1, and this decision is at"):
        cr.route(logits, circuit, replay=record, temperature=temperature)
    cr.route(logits, circuit, replay=record.masks()[0], temperature=temperature)  # a mask has none


def test_routers_take_records() -> None:
    router, hidden = cr.ExactKRouter(4, E, 2, temperature=0.5), hidden_of(T)
    record = cr.RoutingRecord.of(router(hidden))
    assert torch.equal(router(hidden, replay=record).mask, record.masks()[0])
    with pytest.raises(ValueError, match=r"recorded at temperature=0\.5"):
        router(hidden, replay=record, temperature=1.0)
    with pytest.raises(ValueError, match="replay is a record of 2 layers"):
        router(hidden, replay=cr.RoutingRecord.of([router(hidden), router(hidden)]))
    soft = cr.SoftTopKRouter(4, E, 2, 2.0)
    executed = cr.RoutingRecord.of(soft(hidden).mask)
    assert torch.equal(soft(hidden, replay=executed).mask, executed.masks()[0])


@pytest.mark.parametrize(
    "decisions",
    [
        [0.5, 0.25],
        [torch.linspace(0.5, 1, T)],
        [1.0, torch.full((T,), 0.5)],
    ],
    ids=["layers", "tokens", "both"],
)
def test_a_record_has_one_temperature(decisions: list[Any]) -> None:
    circuit = compiled(cr.Exactly(2))
    routings = [cr.route(logits_of(), circuit, temperature=t) for t in decisions]
    with pytest.raises(ValueError, match="a record has one temperature for all tokens and layers"):
        cr.RoutingRecord.of(routings)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, INF])
def test_records_refuse_temperatures_that_are_not_positive(temperature: float) -> None:
    record = cr.RoutingRecord.of(cr.route(logits_of(), compiled(cr.Exactly(2))))
    with pytest.raises(ValueError, match="must be positive and finite"):
        cr.RoutingRecord(record.layers, temperature=temperature)
