"""The compiled routing step against the same step written out with torch in float64, on the naive engine."""

import math

import pytest
import torch

import circuitroute as cr
from circuitroute.engines.step import COMBINES, MAX_RELATIVE_LOGIT, SHARE, Inputs, Rule, Stepper, Upstream
from circuitroute.engines.subset import NaiveSubset, NumbaSubset
from circuitroute.engines.subset.mode import mode
from circuitroute.keys import fold_in, uniform
from circuitroute.routing.decision import chosen_first

pytest.importorskip("numba", reason="the engine numba needs the extra 'cpu'")

ENGINE = NumbaSubset()


def normal(T, n, scale=1.0, seed=0):
    return torch.randn(T, n, generator=torch.Generator().manual_seed(seed)) * scale


def potential_of(counts):
    phi = torch.full((max(counts) + 1,), -math.inf)
    phi[list(counts)] = 0.0
    return phi


def made(x, phi, t=1.0, choice=None):
    return Inputs(x, x if choice is None else choice, t, phi, cr.random_key(3, torch.arange(len(x))))


def decided(inputs, share):
    """[T, N] bool: the naive engine's sample of a / t, or the mode of a."""
    t = inputs.temperature[:, None] if isinstance(inputs.temperature, torch.Tensor) else inputs.temperature
    drawn = NaiveSubset().sample(inputs.choice / t, inputs.potential, inputs.key)
    ruled = mode(inputs.choice, inputs.potential)
    folded = fold_in(inputs.key, torch.tensor(SHARE))
    return torch.where((uniform(folded, 0, 1, torch.float64)[0] < share)[:, None], drawn, ruled)


def weights_of(theta, z, g, m, combine):
    """[T, N] the gates."""
    if combine == "marginal":
        return g * m
    if combine == "sigmoid":
        return g * theta.sigmoid()
    finite = theta.clamp(max=torch.finfo(torch.float32).max)
    if combine == "softmax":
        forced = theta == math.inf
        some = torch.where(forced, 0.0, -math.inf).where(forced.any(-1, keepdim=True), theta)
        return g * torch.softmax(torch.where((some == -math.inf).all(-1, keepdim=True), 0.0, some), -1)
    top = torch.where(z, finite, -math.inf).amax(-1, keepdim=True).detach()
    e = g * (finite - torch.where(top.isinf(), 0.0, top)).clamp(max=MAX_RELATIVE_LOGIT).exp()
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total > 0, total, 1.0)


def composed(theta, choice, t, phi, z, combine, simple=True):
    """(gates, marginals, log Z, log p(z), count posterior), differentiable float64 functions of the first four."""
    a = choice / (t[:, None] if isinstance(t, torch.Tensor) else t)
    log_z, m, q = NaiveSubset().moments(a, phi)
    g = z.double() + (m - m.detach() if simple else 0.0)
    score = torch.where(z & a.isfinite(), a, 0.0).sum(-1)
    score = score + phi.expand(len(a), -1).gather(-1, z.sum(-1, keepdim=True)).squeeze(-1) - log_z
    return weights_of(theta, z, g, m, combine), m, log_z, score, q


def check(inputs, rule, atol=2e-6):
    """Everything of a step, forward, against the composition; returns the step."""
    step = ENGINE.step(inputs, rule, moments=True)
    z = decided(inputs, rule.share)
    assert torch.equal(step.mask, z)
    S = step.weights.shape[1]
    order = chosen_first(z, inputs.logits, S)
    assert torch.equal(step.indices, order)
    t = inputs.temperature.double() if isinstance(inputs.temperature, torch.Tensor) else inputs.temperature
    values = (inputs.logits.double(), inputs.choice.double(), t, inputs.potential.double())
    with torch.no_grad():
        gates, m, log_z, score, q = composed(*values, z, rule.combine)
    slots = torch.where(z, gates, 0.0).gather(-1, order)
    torch.testing.assert_close(step.weights.double(), slots, atol=atol, rtol=1e-5)
    torch.testing.assert_close(step.count_probs.double(), q, atol=4e-6, rtol=0)
    torch.testing.assert_close(step.log_partition.double(), log_z, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(step.log_prob.double(), score, atol=1e-5, rtol=1e-5)
    marginals = torch.empty_like(inputs.logits)
    ENGINE.step_marginals(inputs, step, marginals)
    torch.testing.assert_close(marginals.double(), m, atol=2e-6, rtol=0)
    assert not step.invalid.any()
    return step


def check_gradient(inputs, rule, step, seed=0, only=None):
    """All slopes against autograd through the composition, for random gradients of everything that is read."""
    shapes = [step.weights.shape, *[step.mask.shape] * 2, *[step.invalid.shape] * 2, inputs.potential.shape[-1:]]
    shapes[-1] = (len(step.mask), *shapes[-1])
    generator = torch.Generator().manual_seed(seed)
    upstream = Upstream(*(torch.randn(s, generator=generator) for s in shapes))
    if only is not None:
        upstream = Upstream(**{name: getattr(upstream, name) for name in only})
    found = ENGINE.step_gradient(inputs, rule, step, upstream)
    theta = inputs.logits.double().requires_grad_()
    one = inputs.choice is inputs.logits
    choice = theta if one else inputs.choice.double().requires_grad_()
    phi = inputs.potential.double().expand(len(theta), -1).clone().requires_grad_()
    t = inputs.temperature.double() if isinstance(inputs.temperature, torch.Tensor) else inputs.temperature
    gates, *others = composed(theta, choice, t, phi, step.mask, rule.combine, rule.simple)
    weights = torch.where(step.mask.gather(-1, step.indices), gates.gather(-1, step.indices), 0.0)
    pairs = [(x, g.double()) for x, g in zip((weights, gates, *others), upstream, strict=True) if g is not None]
    loss = sum(((x * g).sum() for x, g in pairs), 0.0 * (theta.nan_to_num() + choice.nan_to_num()).sum())
    leaves = [theta, phi] if one else [theta, phi, choice]
    slopes = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
    truth = [torch.where(theta.isinf(), 0.0, slopes[0])]
    torch.testing.assert_close(found.logits.double(), truth[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.potential.double(), slopes[1], atol=3e-5, rtol=1e-5)
    assert (found.choice is None) is one
    if not one:
        by_choice = torch.where(choice.isinf(), 0.0, slopes[2])
        torch.testing.assert_close(found.choice.double(), by_choice, atol=3e-5, rtol=1e-5)


CASES = [(1, 1, [1]), (1, 7, [3]), (15, 16, [4]), (17, 21, [0, 2, 5]), (40, 64, [8]), (33, 33, [4, 5, 6, 7, 8])]
CASES += [(16, 6, [6]), (18, 5, [0]), (19, 9, [0, 1, 2, 3])]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("T", "n", "counts"), CASES)
def test_forward_and_back_are_the_composition(T, n, counts, combine):
    x, phi = normal(T, n, 2.0, seed=n), potential_of(counts)
    for share in (0.0, 0.5, 1.0):
        inputs, rule = made(x, phi), Rule(combine, share, True)
        check_gradient(inputs, rule, check(inputs, rule))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_moved_choices_temperatures_and_potentials_of_tokens(combine, share):
    x, choice, phi = normal(37, 21, 2.0), normal(37, 21, 2.0, seed=1), normal(37, 6, seed=2)
    phi[:, 1] = -math.inf
    inputs, rule = made(x, phi, torch.linspace(0.5, 2.0, 37), choice), Rule(combine, share, True)
    check_gradient(inputs, rule, check(inputs, rule))
    inputs = made(x, potential_of([2, 3]), 0.3, choice)
    check_gradient(inputs, rule, check(inputs, rule))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_evidence_and_ties(combine, share):
    x = normal(20, 12, 2.0).round()
    x[3, :2], x[4, 5:], x[5], x[6, 1:] = math.inf, -math.inf, 0.0, -math.inf
    x[7, 4], x[7, 5:9], x[8] = math.inf, -math.inf, -0.0
    x[9, ::2], x[9, 1::2] = 0.0, -0.0
    inputs, rule = made(x, potential_of([1, 2, 4])), Rule(combine, share, True)
    check_gradient(inputs, rule, check(inputs, rule))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_numbers_keep_their_accuracy_at_any_scale(scale):
    for share in (0.0, 1.0):
        check(made(normal(40, 40, scale), potential_of([3, 4])), Rule("normalized", share, True))


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("only", [["weights"], ["gates"], ["marginals"], ["log_prob"], ["log_partition"], []])
@pytest.mark.parametrize("moved", [True, False])
def test_gradients_one_by_one(simple, only, moved):
    inputs = made(normal(18, 21), potential_of([2, 3, 4]), 0.7, normal(18, 21, seed=1) if moved else None)
    for combine in ("softmax", "marginal"):
        rule = Rule(combine, 1.0, simple)
        check_gradient(inputs, rule, ENGINE.step(inputs, rule, moments=True), only=only)


def test_temperatures_divide_as_torch_does():
    """So that samples are those of the divided logits, bit by bit, around every other temperature."""
    x, phi = normal(3000, 24, 3.0), potential_of([4])
    for t in (0.3, 1.7, torch.linspace(0.1, 3.0, 3000)):
        inputs = made(x, phi, t)
        step = ENGINE.step(inputs, Rule("softmax", 1.0, True), moments=True)
        truth = ENGINE.infer(x / (t[:, None] if isinstance(t, torch.Tensor) else t), phi, inputs.key)
        assert torch.equal(step.mask, truth.mask)
        for name in ("shift", "log_root", "log_partition", "count_probs"):
            assert torch.equal(getattr(step, name), getattr(truth, name)), name
        marginals = torch.empty_like(x)
        ENGINE.step_marginals(inputs, step, marginals)
        assert torch.equal(marginals, truth.marginals)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_that_underflow_are_settled(combine, share):
    """Counts 0 and K of all, at logits near zero, of about the same weight: no shift shows float32 both ends."""
    n = 60
    x, phi = normal(9, n, 0.3), potential_of([0, n])
    x -= x.mean(1, keepdim=True) - 0.001
    inputs, rule = made(100 * x, phi, 100.0), Rule(combine, share, True)
    step = check(inputs, rule, atol=4e-6)
    check_gradient(inputs, rule, step)


def test_doubtful_draws_are_settled(monkeypatch):
    from circuitroute.engines.subset.numba import engine

    monkeypatch.setattr(engine, "MARGIN", {torch.float32: 0.02, torch.float64: 1e-11})
    inputs = made(normal(300, 24), potential_of([2, 3]))
    for combine in COMBINES:
        check(inputs, Rule(combine, 0.7, True))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_without_an_answer_are_marked_and_disturb_none(share):
    x, phi = normal(20, 9), potential_of([2, 4])
    whole, rule = ENGINE.step(made(x, phi), Rule("softmax", share, True), moments=True), Rule("softmax", share, True)
    bad = x.clone()
    bad[3, 2], bad[7, :5], bad[11, 1:] = math.nan, math.inf, -math.inf
    inputs = made(bad, phi)
    step = ENGINE.step(inputs, rule, moments=True)
    wrong = torch.zeros(20, dtype=torch.bool)
    wrong[[3, 7, 11]] = True
    assert torch.equal(step.invalid, wrong)
    assert not step.mask[wrong].any()
    assert (step.weights[wrong] == 0).all()
    marginals = torch.empty_like(x)
    ENGINE.step_marginals(inputs, step, marginals)
    for found in (step.log_partition, step.log_prob, step.count_probs, marginals):
        assert found[wrong].isnan().all()
        assert found[~wrong].isfinite().all()
    for name in ("weights", "indices", "mask", "log_prob", "count_probs", "shift"):
        assert torch.equal(getattr(step, name)[~wrong], getattr(whole, name)[~wrong])
    ones = torch.ones(20)
    upstream = Upstream(step.weights, x, x, ones, ones, step.count_probs.nan_to_num())
    slopes = ENGINE.step_gradient(inputs, rule, step, upstream)
    assert (slopes.logits[wrong] == 0).all()
    assert (slopes.potential[wrong] == 0).all()
    assert slopes.logits[~wrong].isfinite().all()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_without_moments_the_decision_is_the_same(share):
    inputs = made(normal(50, 24), potential_of([2, 3, 8]))
    for combine in ("softmax", "normalized", "sigmoid"):
        rule = Rule(combine, share, True)
        some, more = ENGINE.step(inputs, rule, moments=False), ENGINE.step(inputs, rule, moments=True)
        assert torch.equal(some.weights, more.weights)
        assert torch.equal(some.indices, more.indices)
        assert torch.equal(some.mask, more.mask)
        assert some.log_prob is some.shift is None


def test_what_a_step_without_moments_lacks_is_refused():
    inputs, rule = made(normal(3, 8), potential_of([2])), Rule("softmax", 0.0, True)
    step = ENGINE.step(inputs, rule, moments=False)
    for asked in (
        lambda: ENGINE.step_marginals(inputs, step, torch.empty(3, 8)),
        lambda: ENGINE.step_gradient(inputs, rule, step, Upstream(log_prob=torch.ones(3))),
    ):
        with pytest.raises(ValueError, match=r"step: it was taken without moments.* take it with moments=True"):
            asked()


def test_rows_depend_neither_on_neighbours_nor_on_threads():
    inputs, rule = made(normal(1500, 40, 3.0), potential_of([2, 3, 4])), Rule("softmax", 0.5, True)
    before = torch.get_num_threads()
    try:
        steps = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            steps.append(ENGINE.step(inputs, rule, moments=True))
    finally:
        torch.set_num_threads(before)
    few = ENGINE.step(
        inputs._replace(logits=inputs.logits[5:22], choice=inputs.logits[5:22], key=inputs.key[5:22]),
        rule,
        moments=True,
    )
    for name in ("weights", "indices", "mask", "log_prob", "shift", "log_partition"):
        assert torch.equal(getattr(steps[0], name), getattr(steps[1], name))
        assert torch.equal(getattr(steps[0], name)[5:22], getattr(few, name))


def test_what_it_takes():
    x = normal(3, 8)
    assert isinstance(ENGINE, Stepper)
    assert ENGINE.steps(made(x, potential_of([2])))
    assert not ENGINE.steps(made(x.double(), potential_of([2])))
    assert not ENGINE.steps(made(x.half(), potential_of([2])))
    assert not ENGINE.steps(made(normal(3, 100), potential_of([65])))
    assert not ENGINE.steps(made(normal(1, 5000), potential_of([2])))
    assert not ENGINE.steps(made(x.to("meta"), potential_of([2])))


def test_log_probabilities_are_none_of_them_positive():
    """Where one subset is all but certain, rounding could go beyond."""
    circuit = cr.compile(cr.Exactly(8), 60).with_engine("numba")
    logits = 300 * torch.randn(4096, 60, generator=torch.Generator().manual_seed(0))
    log_prob = cr.route(logits, circuit, key=torch.arange(4096)).log_prob
    assert bool((log_prob <= 0).all())
    assert bool((log_prob > -1e-9).any())
