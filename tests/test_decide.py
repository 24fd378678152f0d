"""Decisions: who is sampled and who takes the mode, what is refused, and routers that are told.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.engines.step import SHARE
from circuitroute.keys import fold_in, uniform
from circuitroute.routing.estimators import Simple
from tests.tempered import INF, E, T, compiled, every_constraint, hidden_of, key_of, logits_of

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
    "digits": ({"temperature": "0.5"}, TypeError, "temperature='0.5': expected a number, got str"),
    "bool": ({"temperature": True}, TypeError, "temperature=True"),
    "list": ({"temperature": [1.0] * 3}, TypeError, r"temperature=\[1\.0, 1\.0, 1\.0\]: expected a number"),
    "schedule": ({"temperature": cr.schedules.constant(0.5)}, TypeError, r"temperature=.*temperature=schedule\(step\)"),
    "integers": ({"temperature": torch.tensor(1)}, TypeError, "temperature has dtype torch.int64"),
    "zeros": ({"temperature": torch.tensor(0.0)}, ValueError, r"temperature=0\.0: must be positive"),
    "one bad token": ({"temperature": torch.tensor([1.0, -2, 1])}, ValueError, r"temperature=-2\.0 in row 1"),
    "nan in a token": ({"temperature": torch.tensor([1.0, 1, math.nan])}, ValueError, "temperature=nan in row 2"),
    "shape": ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\): it must broadcast to \(3,\)"),
    "share above": ({"decide": 1.5}, ValueError, r"decide=1\.5: a share of sampled tokens must lie in 0\.\.1"),
    "share below": ({"decide": -0.1}, ValueError, r"decide=-0\.1: a share"),
    "share nan": ({"decide": math.nan}, ValueError, "decide=nan: a share"),
    "share in a tensor": ({"decide": torch.tensor(2.0)}, ValueError, r"decide=tensor\(2\.\): a share"),
    "share bool": ({"decide": True}, TypeError, "decide=True: expected a number, got a bool"),
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


@pytest.mark.parametrize("name", [name for name in BAD if not name.startswith(("price", "bias"))])
def test_budgets_and_layers_refuse_them_too(name: str) -> None:
    options, error, message = BAD[name]
    estimator = options.get("estimator", "simple")
    given = {name: value for name, value in options.items() if name != "estimator"}
    budget = cr.BudgetRouter(4, E, 2, cr.Between(1, 3), cr.Exactly(4), estimator=estimator)
    hidden = torch.ones(3, 4)
    with pytest.raises(error, match=message):
        budget(hidden, budget.begin(hidden), **given)
    for setting, value in given.items():
        setattr(budget, setting, value)
    with pytest.raises(error, match=message):
        budget(hidden, budget.begin(hidden))
    router = cr.Router(4, E, cr.Between(1, 3), estimator=estimator)
    with pytest.raises(error, match=message):
        cr.MoE(router, [torch.nn.Linear(4, 4) for _ in range(E)])(hidden, **given)


@pytest.mark.parametrize("options", [{"decide": "mode"}, {"temperature": 0.5}, {"price": 1.0}, {"k_": 2}], ids=str)
def test_a_soft_router_says_what_it_has_instead(options: Any) -> None:
    ((name, value),) = options.items()
    router = cr.SoftTopKRouter(4, E, 2)
    message = f"{name}={value!r}: a SoftTopKRouter draws nothing .* its temperature is alpha"
    with pytest.raises(TypeError, match=message):
        router(torch.ones(3, 4), **options)
    with pytest.raises(TypeError, match=message):
        cr.MoE(router, [torch.nn.Linear(4, 4) for _ in range(E)])(torch.ones(3, 4), **options)


def test_the_score_estimator_samples_and_evaluates() -> None:
    circuit = compiled(cr.Exactly(2))
    cr.route(logits_of(), circuit, estimator="score", decide="sample", temperature=0.5)
    assert cr.route(logits_of(), circuit, estimator="score", training=False).mask.any()


# ---------------------------------------------------------------------------------------------- routers

ROUTERS: dict[str, Callable[..., cr.Router]] = {
    "router": lambda **options: cr.Router(4, E, cr.CountIn({1, 3}), **options),
    "exact": lambda **options: cr.ExactKRouter(4, E, 3, **options),
    "dynamic": lambda **options: cr.DynamicKRouter(4, E, 1, 4, **options),
}
every_router = pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)


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
    for decide in ("mode", 0, 0.0):
        assert torch.equal(router(hidden, decide=decide, temperature=9.0).mask, router(hidden).mask)
    with pytest.raises(ValueError, match="decide=nan: a share of sampled tokens must lie in 0"):
        router(hidden, decide=math.nan)
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
    with pytest.raises(ValueError, match=f"it is over {E} variables, and there are to be n=5"):
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


def test_a_replay_must_keep_what_infinite_logits_say() -> None:
    circuit, logits = cr.compile(cr.Exactly(2), 4), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    logits[1, 0], logits[2, 3] = INF, -INF
    good = cr.route(logits, circuit, decide="mode").mask
    assert torch.equal(cr.route(logits, circuit, replay=good).mask, good)
    for row, wrong in ((1, [0, 1, 1, 0]), (2, [1, 0, 0, 1])):
        mask = good.clone()
        mask[row] = torch.tensor(wrong)
        with pytest.raises(ValueError, match=rf"the infinite logits .* exclude, in row {row}"):
            cr.route(logits, circuit, replay=mask)


def test_who_is_sampled_without_a_fused_step() -> None:
    circuit, key = cr.compile(cr.Exactly(3), 20).with_engine("torch"), key_of(200)
    logits = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    mode, sample, mixed = (
        cr.route(logits, circuit, key=key, decide=decide, temperature=5.0).mask for decide in ("mode", "sample", 0.25)
    )
    drawn = uniform(fold_in(key, torch.tensor(SHARE)), 0, 1, torch.float64)[0] < 0.25
    assert not torch.equal(mode, sample)
    assert torch.equal(mixed, torch.where(drawn[:, None], sample, mode))
