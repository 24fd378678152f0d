"""SubsetDistribution against enumeration of all worlds, as a torch distribution, and at its edges."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Distribution, kl_divergence

import circuitroute as cr
from circuitroute.engines.autograd import Direct
from circuitroute.engines.logspace import log_coin_flips
from tests.truth import count_truth, enumerate_worlds, world_truth

N = 6
CONSTRAINTS = [
    cr.Exactly(3),
    cr.Between(1, 4),
    cr.CountIn({0, 2, 5}),
    cr.AtLeast(4),
    cr.AtMost(0),
    cr.Exactly(N),
    cr.Exactly(2).over([0, 2, 3, 5]),
    cr.AtMost(1).over([1, 4]),
]


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return torch.randn(*shape, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * scale


def truth_of(circuit, logits, phi=None):
    accept = circuit.satisfies(torch.from_numpy(enumerate_worlds(N))).numpy()
    return world_truth(logits.detach().numpy(), accept, phi)


def evidence():
    x = random_logits(4, seed=3)
    x[0, 2] = -math.inf
    x[1, 3] = math.inf
    x[2, 1], x[2, 4] = -math.inf, -math.inf
    return x


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
@pytest.mark.parametrize("engine", ["numba", "torch", "naive"])
def test_everything_against_all_worlds(constraint, engine):
    circuit = cr.compile(constraint, N)
    if circuit.op == "subset":
        circuit = circuit.with_engine(engine)
    for logits in (random_logits(5), random_logits(5, scale=50.0), evidence()):
        dist = circuit(logits, validate_args=False)
        truth = truth_of(circuit, logits)
        K = circuit.max_count
        close = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}
        np.testing.assert_allclose(dist.log_partition, truth.log_partition, **close)
        np.testing.assert_allclose(dist.marginals, truth.marginals, **close)
        np.testing.assert_allclose(dist.count_probs, truth.count_probs[:, : K + 1], **close)
        np.testing.assert_allclose(dist.covariance_matrix, truth.covariance, **close)
        np.testing.assert_allclose(dist.entropy(), truth.entropy, **close)
        np.testing.assert_allclose(dist.variance, truth.marginals * (1 - truth.marginals), **close)
        worlds = torch.from_numpy(enumerate_worlds(N))
        log_probs = torch.stack([dist.log_prob(w.expand(len(logits), N)) for w in worlds], 1)
        possible = ~np.isnan(truth.log_partition)
        np.testing.assert_allclose(log_probs[possible], truth.log_probs[possible], **close)
        best = dist.log_prob(dist.mode[:, :].nan_to_num())
        np.testing.assert_allclose(best[possible], truth.log_probs[possible].max(1), **close)


def test_the_mode_breaks_ties_by_lower_count_and_then_lower_index():
    circuit = cr.compile(cr.Between(1, 3), 5)
    logits = torch.tensor([[0.0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [-1, -1, 0, -1, 0], [-2, -1, -1, -3, -3]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]
    assert circuit(logits).mode.tolist() == expected


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
@pytest.mark.parametrize("output", ["log_partition", "marginals", "count_probs", "entropy", "log_prob"])
def test_gradcheck(constraint, output):
    circuit = cr.compile(constraint, N)
    logits = random_logits(3, seed=1).requires_grad_()
    mask = circuit(logits.detach()).sample(key=cr.random_key(0, torch.arange(3)))

    def value(x):
        dist = circuit(x)
        return (
            dist.log_prob(mask)
            if output == "log_prob"
            else dist.entropy()
            if output == "entropy"
            else getattr(dist, output)
        )

    assert gradcheck(value, (logits,))
    if output in ("log_partition", "log_prob"):
        assert gradgradcheck(value, (logits,))


@pytest.mark.parametrize("output", ["log_partition", "marginals", "count_probs", "entropy", "log_prob"])
def test_gradcheck_in_the_count_potential(output):
    circuit = cr.compile(cr.Between(1, 4), N)
    logits = random_logits(3, seed=1).requires_grad_()
    mask = circuit(logits.detach()).mode
    for shape in ((5,), (3, 5)):
        potential = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        potential = potential.requires_grad_()

        def value(x, phi):
            dist = circuit(x, phi)
            if output == "log_prob":
                return dist.log_prob(mask)
            return dist.entropy() if output == "entropy" else getattr(dist, output)

        assert gradcheck(value, (logits, potential))


def test_hessian_of_log_partition_is_the_covariance():
    circuit = cr.compile(cr.CountIn({1, 2, 4}), N)
    logits = random_logits()
    hessian = torch.autograd.functional.hessian(lambda x: circuit(x).log_partition, logits)
    torch.testing.assert_close(hessian, circuit(logits).covariance_matrix, rtol=1e-10, atol=1e-12)
    third = torch.autograd.functional.jvp(lambda x: circuit(x).marginals, logits, torch.ones_like(logits))[1]
    torch.testing.assert_close(third, circuit(logits).covariance_matrix.sum(-1), rtol=1e-10, atol=1e-12)


def test_kl_divergence():
    for constraint in CONSTRAINTS:
        circuit = cr.compile(constraint, N)
        p, q = circuit(random_logits(4, seed=1)), circuit(random_logits(4, seed=2))
        a, b = truth_of(circuit, p.logits).log_probs, truth_of(circuit, q.logits).log_probs
        with np.errstate(invalid="ignore"):
            expected = np.where(np.isinf(a), 0, np.exp(a) * (a - b)).sum(1)
        np.testing.assert_allclose(kl_divergence(p, q), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(kl_divergence(p, p), 0, atol=1e-12)
    circuit = cr.compile(cr.Between(1, 3), N)
    x, y = random_logits(3).requires_grad_(), random_logits(3, seed=4).requires_grad_()
    assert gradcheck(lambda a, b: kl_divergence(circuit(a), circuit(b)), (x, y))


def test_kl_divergence_with_potentials_and_evidence():
    circuit = cr.compile(cr.Between(0, 3), N)
    x, phi = random_logits(2), torch.tensor([0.3, -1.0, 2.0, -math.inf], dtype=torch.float64)
    p, q = circuit(x, phi), circuit(x + 1)
    full = np.pad(phi.numpy(), (0, 3), constant_values=-np.inf)
    a, b = truth_of(circuit, x, full).log_probs, truth_of(circuit, x + 1).log_probs
    with np.errstate(invalid="ignore"):
        expected = np.where(np.isinf(a), 0, np.exp(a) * (a - b)).sum(1)
    np.testing.assert_allclose(kl_divergence(p, q), expected, rtol=1e-9)
    assert (kl_divergence(q, p) == math.inf).all()
    assert (kl_divergence(circuit(x), circuit(x).condition(exclude=[0])) == math.inf).all()
    conditioned = kl_divergence(circuit(x).condition(include=[1]), circuit(x))
    torch.testing.assert_close(conditioned, -circuit(x).marginals[:, 1].log())
    with pytest.raises(NotImplementedError, match="different circuits"):
        kl_divergence(p, cr.compile(cr.Exactly(3), N)(x))


def test_accuracy_at_extreme_logits_in_float32():
    """log_prob and entropy of float32 logits of scale 1e4 are right to float32 of their own size."""
    circuit = cr.compile(cr.Exactly(8), 64)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) * 1e4
    x[:, :16] = x[:, :1] + torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    dist = circuit(x)
    truth = count_truth(x.numpy(), np.where(np.arange(65) == 8, 0.0, -np.inf))
    np.testing.assert_allclose(dist.entropy(), truth.entropy, rtol=1e-5, atol=1e-5)
    mask = dist.sample(key=cr.random_key(0, torch.arange(20)))
    exact = (x.double() * mask).sum(-1) - torch.from_numpy(truth.log_partition)
    np.testing.assert_allclose(dist.log_prob(mask), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [19.0, 21.0, 25.0, 33.0])
@pytest.mark.parametrize("constraint", [cr.AtMost(1), cr.EachGroup(cr.Groups(2), cr.AtMost(1))], ids=repr)
def test_log_prob_against_long_odds(constraint, size):
    """Variables of odds e^20 and more, left out by the constraint: unlikely coins, but no unlikely subset."""
    circuit = cr.compile(constraint, N)
    x = torch.tensor([size, size + 22, -size, size + 1, size + 23.5, 0.0], dtype=torch.float64)
    groups = x.reshape(1 if isinstance(constraint, cr.AtMost) else 2, -1)
    mask = (groups == groups.amax(-1, keepdim=True)).reshape(-1)
    ways = torch.cat([torch.zeros(len(groups), 1, dtype=torch.float64), groups], -1)
    for t in (1.0, 0.5):
        exact = torch.log_softmax(ways / t, -1).amax(-1).sum()
        for engine in ("naive", "torch"):
            found = circuit.with_engine(engine)(x / t).log_prob(mask)
            torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-12)
        routing = cr.route(x[None], circuit, replay=mask[None], combine="normalized", temperature=t)
        torch.testing.assert_close(routing.log_prob, exact[None], rtol=1e-13, atol=1e-12)


def test_coins_fall_with_the_last_digit_of_their_probability():
    x = torch.cat([torch.linspace(-60, 60, 241, dtype=torch.float64), torch.tensor([-745.0, 745.0]).double()])
    for selected in (True, False):
        found = log_coin_flips(x, torch.full_like(x, selected, dtype=torch.bool))
        exact = -np.logaddexp(0, np.where(selected, -x, x))
        np.testing.assert_allclose(found, exact, rtol=1e-14, atol=1e-320)


# ---------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
def test_samples_follow_the_distribution(constraint):
    """Chi-square of 40,000 keyed samples against enumeration; the error rate of each case is 1e-4."""
    circuit = cr.compile(constraint, N)
    dist = circuit(random_logits(seed=5, scale=1.0, dtype=torch.float32))
    samples = dist.sample((40_000,), key=cr.random_key(2026))
    assert samples.dtype == torch.float32
    assert set(samples.unique().tolist()) <= {0.0, 1.0}
    code = (samples.long() * 2 ** torch.arange(N)).sum(-1)
    observed = torch.bincount(code, minlength=2**N).double().numpy()
    accept = circuit.satisfies(torch.from_numpy(enumerate_worlds(N))).numpy()
    assert observed[~accept].sum() == 0
    expected = np.exp(world_truth(dist.logits[None].numpy(), accept).log_probs[0][accept]) * len(samples)
    if accept.sum() > 1:
        assert stats.chisquare(observed[accept], expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_samples_with_potentials_and_evidence_follow_the_distribution():
    """Error rate 1e-4."""
    circuit = cr.compile(cr.AtMost(4), N)
    logits = random_logits(seed=5, scale=1.0)
    logits[1], logits[4] = math.inf, -math.inf
    phi = torch.tensor([0.0, -1.0, 0.5, -math.inf, 1.0], dtype=torch.float64)
    samples = circuit(logits, phi).sample((40_000,), key=cr.random_key(7))
    assert (samples[:, 1] == 1).all()
    assert (samples[:, 4] == 0).all()
    code = (samples.long() * 2 ** torch.arange(N)).sum(-1)
    observed = torch.bincount(code, minlength=2**N).double().numpy()
    full = np.pad(phi.numpy(), (0, 2), constant_values=-np.inf)
    probs = np.exp(truth_of(circuit, logits[None], full).log_probs[0])
    assert observed[probs == 0].sum() == 0
    assert stats.chisquare(observed[probs > 0], probs[probs > 0] * len(samples)).pvalue > 1e-4


@pytest.mark.parametrize("constraint", [cr.Between(1, 4), cr.Exactly(2).over([0, 2, 3, 5])], ids=repr)
def test_a_sample_is_a_function_of_its_rows(constraint):
    circuit = cr.compile(constraint, N)
    x, key = random_logits(50), cr.random_key(1, torch.arange(50))
    whole = circuit(x).sample(key=key)
    assert torch.equal(circuit(x.flip(0)).sample(key=key.flip(0)), whole.flip(0))
    assert torch.equal(torch.stack([circuit(r).sample(key=k) for r, k in zip(x, key, strict=True)]), whole)
    assert torch.equal(circuit(x.reshape(5, 10, N)).sample(key=key.reshape(5, 10)), whole.reshape(5, 10, N))
    assert not torch.equal(circuit(x).sample(key=key + 1), whole)


def test_keys_broadcast_and_mix_with_the_sample_index():
    circuit = cr.compile(cr.Exactly(3), N)
    dist = circuit(random_logits(4))
    key = cr.random_key(3, torch.arange(4))
    many = dist.sample((5,), key=key)
    assert many.shape == (5, 4, N)
    assert len({tuple(m.flatten().tolist()) for m in many}) > 1
    assert torch.equal(dist.sample((7,), key=key)[:5], many)
    full = cr.random_key(3, torch.arange(5)[:, None], torch.arange(4))
    assert torch.equal(dist.sample((5,), key=full)[2], dist.sample(key=full[2]))
    same = circuit(random_logits().expand(4, N)).sample(key=cr.random_key(9))
    assert (same == same[0]).all()
    assert torch.equal(dist.sample(key=5), dist.sample(key=torch.tensor(5)))
    assert torch.equal(dist.sample(key=5), dist.sample(key=2**64 + 5))
    with pytest.raises(ValueError, match=r"key has shape \(3,\)"):
        dist.sample(key=torch.arange(3))
    with pytest.raises(TypeError, match="key has dtype"):
        dist.sample(key=torch.rand(4))


def test_without_a_key_the_global_generator_decides():
    dist = cr.compile(cr.Exactly(3), N)(random_logits(40))
    torch.manual_seed(4)
    first, second = dist.sample(), dist.sample()
    torch.manual_seed(4)
    assert torch.equal(dist.sample(), first)
    assert not torch.equal(first, second)


def test_rsample_is_the_mask_with_the_gradient_of_the_marginals():
    circuit = cr.compile(cr.Exactly(3), N)
    x, u = random_logits(4).requires_grad_(), random_logits(4, seed=8)
    key = cr.random_key(0, torch.arange(4))
    z = circuit(x).rsample(key=key)
    assert torch.equal(z.detach(), circuit(x).sample(key=key))
    (grad,) = torch.autograd.grad((z * u).sum(), x)
    expected = (circuit(x).covariance_matrix @ u[..., None]).squeeze(-1)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    assert circuit(x).rsample((3,)).shape == (3, 4, N)


# ------------------------------------------------------------------------------------- as a torch distribution


def test_it_is_a_torch_distribution():
    circuit = cr.compile(cr.Exactly(2), N)
    dist = circuit(random_logits(3, 4))
    assert isinstance(dist, Distribution)
    assert (dist.batch_shape, dist.event_shape) == ((3, 4), (N,))
    assert dist.has_rsample
    assert dist.has_enumerate_support
    assert "logits" in dist.arg_constraints
    assert dist.support.check(dist.sample()).all()
    assert not dist.support.check(torch.ones(N))
    assert not dist.support.check(torch.full((N,), 0.5))
    assert "Exactly(2)" in repr(dist.support)
    assert dist.stddev.shape == (3, 4, N)
    torch.testing.assert_close(dist.mean, dist.marginals)
    wide = dist.expand((2, 3, 4))
    assert wide.batch_shape == (2, 3, 4)
    torch.testing.assert_close(wide.marginals[1], dist.marginals)
    phi = torch.randn(4, 3, dtype=torch.float64)
    both = circuit(random_logits(3, 4), phi)
    torch.testing.assert_close(both.expand((2, 3, 4)).log_partition[0], both.log_partition)
    independent = torch.distributions.Independent(dist, 1)
    assert independent.log_prob(dist.sample()).shape == (3,)


def test_enumerate_support():
    for constraint in CONSTRAINTS:
        circuit = cr.compile(constraint, N)
        dist = circuit(random_logits(2))
        support = dist.enumerate_support()
        assert support.shape == (circuit.model_count(), 2, N)
        assert dist.enumerate_support(expand=False).shape == (circuit.model_count(), 1, N)
        torch.testing.assert_close(dist.log_prob(support).logsumexp(0), torch.zeros(2, dtype=torch.float64))
        codes = [tuple(row) for row in support[:, 0].long().tolist()]
        assert codes == sorted(set(codes))
    with pytest.raises(ValueError, match="too many to enumerate"):
        cr.compile(cr.Exactly(20), 40)(torch.zeros(40)).enumerate_support()


def test_results_can_be_differentiated_one_after_the_other():
    dist = cr.compile(cr.Exactly(2), N)(random_logits(3).requires_grad_())
    dist.log_partition.sum().backward()
    dist.marginals.square().sum().backward()
    dist.marginals.square().sum().backward()
    dist.entropy().sum().backward()


def test_the_gradient_of_log_partition_is_no_further_sweep(monkeypatch):
    """It is the marginals, which are known by then; what is not asked for gets no sweep along zeros."""
    derivative, directions = Direct.derivative, []

    def noted(self, logits, potential, marks, along):
        directions.append(along)
        return derivative(self, logits, potential, marks, along)

    monkeypatch.setattr(Direct, "derivative", noted)
    x = random_logits(5).requires_grad_()
    dist = cr.compile(cr.Between(1, 4), N)(x)
    (by_logits,) = torch.autograd.grad(dist.log_partition.sum(), x, retain_graph=True)
    torch.testing.assert_close(by_logits, dist.marginals.detach(), rtol=0, atol=0)
    assert directions == []
    upstream = random_logits(5, seed=1)
    (by_logits,) = torch.autograd.grad((dist.marginals * upstream).sum(), x)
    covariance = torch.from_numpy(truth_of(dist.circuit, x).covariance)
    torch.testing.assert_close(by_logits, torch.einsum("tij,tj->ti", covariance, upstream), rtol=1e-9, atol=1e-9)
    (((u, v),),) = directions
    assert torch.equal(u, upstream)
    assert v is None


def test_a_sweep_without_gradients_does_not_spoil_a_later_one_with():
    dist = cr.compile(cr.Exactly(2), N)(random_logits(3).requires_grad_())
    with torch.no_grad():
        quiet = dist.marginals
    assert not quiet.requires_grad
    assert dist.marginals.requires_grad
    with torch.inference_mode():
        assert dist.sample().shape == (3, N)
        assert dist.log_partition.shape == (3,)
        assert dist.covariance_matrix.shape == (3, N, N)
    dist.marginals.sum().backward()


@pytest.mark.parametrize("engine", ["numba", "torch", "naive"])
def test_inference_mode_and_callers_tensors_are_left_alone(engine):
    circuit = cr.compile(cr.Between(1, 3), N).with_engine(engine)
    x = random_logits(4)
    before = x.clone()
    with torch.inference_mode():
        dist = circuit(x.clone())
        outputs = [dist.marginals, dist.entropy(), dist.mode, dist.count_probs, dist.log_prob(dist.sample())]
        assert all(o.isfinite().all() for o in outputs)
    dist = circuit(x)
    _ = dist.marginals, dist.sample(), dist.covariance_matrix, dist.condition(include=[0]).mode
    assert torch.equal(x, before)
    assert not x.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    circuit = cr.compile(cr.Exactly(2), N)
    x = random_logits(4).to(dtype).requires_grad_()
    dist = circuit(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for value in (dist.marginals, dist.log_partition, dist.sample(), dist.entropy(), dist.mode, dist.logits):
        assert value.dtype == wide
    dist.marginals.square().sum().backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(dist.marginals, circuit(x.detach().to(wide)).marginals)


def test_non_contiguous_logits():
    circuit = cr.compile(cr.Exactly(2), N)
    x = random_logits(4)
    strided = torch.stack([x, x + 7], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(circuit(strided).marginals, circuit(x).marginals)
    torch.testing.assert_close(circuit(x.t().contiguous().t()).marginals, circuit(x).marginals)
    assert torch.equal(circuit(strided).sample(key=1), circuit(x).sample(key=1))


def test_autocast_does_not_lower_the_precision():
    circuit = cr.compile(cr.Exactly(2), N)
    x = random_logits(4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = circuit(x).marginals
    assert torch.equal(inside, circuit(x).marginals)


# ------------------------------------------------------------------------------------ conditioning and evidence


def test_conditioning_is_bayes():
    circuit = cr.compile(cr.Between(2, 4), N)
    x = random_logits(3)
    dist = circuit(x)
    given = dist.condition(include=[1], exclude=torch.tensor([4]))
    support = dist.enumerate_support()
    agree = (support[..., 1] == 1) & (support[..., 4] == 0)
    log_event = torch.where(agree, dist.log_prob(support), -math.inf).logsumexp(0)
    torch.testing.assert_close(given.log_partition + x[:, 1] - dist.log_partition, log_event)
    weights = torch.where(agree, dist.log_prob(support), -math.inf).softmax(0)
    torch.testing.assert_close(given.marginals, (weights[..., None] * support).sum(0))
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[0, 1], mask[1, 2] = True, True
    per_row = dist.condition(include=mask)
    assert per_row.marginals[0, 1] == per_row.marginals[1, 2] == 1
    torch.testing.assert_close(per_row.marginals[2], dist.marginals[2])
    torch.testing.assert_close(dist.condition(include=mask.float()).marginals, per_row.marginals)


def test_conditioning_errors():
    dist = cr.compile(cr.Exactly(2), N)(random_logits(3))
    with pytest.raises(ValueError, match=r"index 6: indices must lie in 0..5"):
        dist.condition(include=[6])
    with pytest.raises(ValueError, match=r"share the variables \[1\]: give each in one of them only"):
        dist.condition(include=[0, 1], exclude=[1])
    with pytest.raises(ValueError, match="rows 0, 1, 2"):
        dist.condition(include=[0, 1, 2])
    with pytest.raises(ValueError, match="mask must be n=6"):
        dist.condition(include=torch.ones(5))
    with pytest.raises(ValueError, match=r"exclude holds 0\.5: every value of a mask must be 0 or 1; pass integers"):
        dist.condition(exclude=torch.tensor([0.0, 1.0, 0.5, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="row"):
        dist.condition(exclude=[0]).condition(include=[0])
    with pytest.raises(TypeError, match=r"include=0\.5"):
        dist.condition(include=[0.5])


def test_infinite_logits_condition():
    circuit = cr.compile(cr.Exactly(2), N)
    x = random_logits()
    forced = x.clone()
    forced[3] = math.inf
    rest = cr.compile(cr.Exactly(1), N - 1)(x[[0, 1, 2, 4, 5]])
    torch.testing.assert_close(circuit(forced).log_partition, rest.log_partition)
    forced.requires_grad_()
    (grad,) = torch.autograd.grad(circuit(forced).log_partition, forced)
    assert grad[3] == 0
    assert grad.isfinite().all()


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Exactly(2).over([0, 1, 2])], ids=repr)
def test_rows_are_named_when_validating_and_nan_alone_when_not(constraint):
    circuit = cr.compile(constraint, N)
    x = random_logits(4).requires_grad_()
    bad = x.detach().clone()
    bad[1, 0] = math.nan
    with pytest.raises(ValueError, match="NaN in row 1"):
        circuit(bad)
    empty = x.detach().clone()
    empty[0, :3], empty[3, :5] = math.inf, -math.inf
    with pytest.raises(ValueError, match="rows 0, 3"):
        circuit(empty)
    both = torch.cat([bad, empty]).requires_grad_()
    dist = circuit(both, validate_args=False)
    expected = [False, True, False, False, True, False, False, True]
    outputs = [dist.log_partition, dist.marginals, dist.count_probs, dist.entropy(), dist.mode, dist.sample()]
    for value in [*outputs, dist.covariance_matrix, dist.log_prob(torch.tensor([1.0, 1, 0, 0, 0, 0]))]:
        nan = value.detach().reshape(8, -1).isnan()
        assert nan.any(1).tolist() == nan.all(1).tolist() == expected
    good = torch.tensor([not e for e in expected])
    (grad,) = torch.autograd.grad(dist.marginals[good].square().sum() + dist.entropy()[good].sum(), both)
    assert grad[good].isfinite().all()
    torch.testing.assert_close(dist.marginals[2], circuit(x).marginals[2])


def test_bad_arguments():
    circuit = cr.compile(cr.Between(1, 3), N)
    cases = [
        (lambda: circuit(torch.zeros(3, 5)), ValueError, r"shape \(3, 5\): the last dimension must be n=6"),
        (lambda: circuit(torch.tensor(0.0)), ValueError, "must be n=6"),
        (lambda: circuit([0.0] * 6), TypeError, "expected a tensor"),
        (lambda: circuit(torch.zeros(6, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: circuit(torch.zeros(6), torch.zeros(3)), ValueError, "max_count \\+ 1 = 4"),
        (lambda: circuit(torch.zeros(6), [0.0] * 4), TypeError, "count_potential"),
        (lambda: circuit(torch.zeros(2, 6), torch.zeros(3, 4)), ValueError, "does not broadcast"),
        (lambda: circuit(torch.zeros(6), torch.full((4,), math.nan)), ValueError, "count_potential holds NaN"),
        (lambda: circuit(torch.zeros(6), torch.full((4,), math.inf)), ValueError, "count_potential holds \\+inf"),
        (lambda: circuit(torch.zeros(6), torch.full((4,), -math.inf)), ValueError, "the only row"),
        (lambda: circuit(torch.zeros(6)).log_prob(torch.ones(6)), ValueError, "does not satisfy Between"),
        (lambda: circuit(torch.zeros(6)).log_prob(torch.ones(5)), ValueError, "must be n=6"),
        (lambda: circuit(torch.zeros(6)).log_prob(torch.full((6,), 0.5)), ValueError, "value holds 0.5"),
        (lambda: circuit.satisfies(torch.full((6,), 2)), ValueError, "mask holds 2"),
        (lambda: circuit.satisfies([1, 0]), TypeError, "mask="),
        (lambda: cr.compile(cr.Exactly(1).over([0, 1]), 6)(torch.zeros(6), torch.zeros(3)), ValueError, "is not one"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    outside = circuit(torch.zeros(6), validate_args=False).log_prob(torch.ones(6))
    assert outside == -math.inf


def test_masks_outside_the_support_are_named_by_row():
    circuit = cr.compile(cr.Exactly(1), N)
    masks = torch.eye(N)[:4].clone()
    masks[2, 5] = 1
    with pytest.raises(ValueError, match="row 2"):
        circuit(torch.zeros(4, N)).log_prob(masks)


# ------------------------------------------------------------------------------------------------------- keys


def test_random_key_mixes_all_its_arguments():
    assert cr.random_key(1).shape == ()
    assert cr.random_key(1, 2, torch.arange(5)).shape == (5,)
    assert cr.random_key(1, torch.arange(3)[:, None], torch.arange(5)).shape == (3, 5)
    keys = [cr.random_key(*k).item() for k in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1,), (2**63,)]]
    assert len(set(keys)) == len(keys)
    assert cr.random_key(3, torch.tensor(4)).item() == cr.random_key(3, 4).item()
    assert len(cr.random_key(0, torch.arange(100_000)).unique()) == 100_000
    with pytest.raises(TypeError, match=r"seed=1\.5"):
        cr.random_key(1.5)
    with pytest.raises(TypeError, match=r"indices\[0\] has dtype"):
        cr.random_key(0, torch.rand(3))


def test_uniforms_are_uniform_and_uncorrelated():
    """Kolmogorov-Smirnov of 200,000 uniforms, and lag correlations along keys and counters; error rate 1e-4 each."""
    from circuitroute.keys import uniform

    u = uniform(cr.random_key(5, torch.arange(2000)), 0, 100, torch.float64)
    assert u.shape == (100, 2000)
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-4
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[2:], u[:-2])):
        assert stats.pearsonr(a.flatten().numpy(), b.flatten().numpy()).pvalue > 1e-4
    assert torch.equal(uniform(cr.random_key(5, torch.arange(2000)), 10, 5, torch.float64), u[10:15])


def test_both_words_of_a_key_enter_its_uniforms():
    """Of 300,000 streams about ten pairs would be equal if only 32 bits of the key counted."""
    from circuitroute.keys import uniform

    u = uniform(cr.random_key(8, torch.arange(300_000)), 0, 2, torch.float64)
    assert len(torch.unique(u, dim=1)[0]) == 300_000


def test_engines_are_given_no_nan():
    """Rows with NaN are found once, and replaced: they concern themselves alone."""
    circuit, logits = cr.compile(cr.Exactly(2), 4), torch.zeros(3, 4)
    logits[1, 2] = math.nan
    potential = torch.zeros(3, 3)
    potential[2, 2] = math.nan
    rows = circuit(logits, potential, validate_args=False).rows
    assert rows.nan.tolist() == [False, True, True]
    assert not any(given.isnan().any() for given in rows.inputs())
    assert circuit(logits[:1], validate_args=False).rows.nan is None
    assert circuit(logits[:1], validate_args=False).rows.finite


CONSTRAINTS_OF_FIVE = [cr.Exactly(2), cr.AtMost(1).over([0, 1, 2]) & cr.Exactly(1).over([3, 4])]


@pytest.mark.parametrize("constraint", CONSTRAINTS_OF_FIVE, ids=repr)
def test_what_is_given_away_changes_nothing_that_is_kept(constraint):
    dist = cr.compile(constraint, 5)(torch.randn(3, 5))
    for moment in ("log_partition", "marginals"):
        getattr(dist, moment).requires_grad_()
        assert not getattr(dist, moment).requires_grad


@pytest.mark.parametrize("constraint", CONSTRAINTS_OF_FIVE, ids=repr)
def test_logits_known_to_be_finite_have_the_gradients_of_others(constraint):
    """A row with evidence makes the whole batch one that is not known to be finite."""
    circuit = cr.compile(constraint, 5)
    finite = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = finite.clone()
    mixed[2, 0] = math.inf
    found = []
    for rows in (finite.requires_grad_(), mixed.requires_grad_()):
        dist = circuit(rows)
        first = torch.autograd.grad(dist.log_partition.sum(), rows, create_graph=True)[0]
        found.append((first, torch.autograd.grad(first.square().sum(), rows)[0]))
    for alone, beside in zip(*found, strict=True):
        assert torch.equal(alone[:2], beside[:2])
        assert beside[2, 0] == 0.0
