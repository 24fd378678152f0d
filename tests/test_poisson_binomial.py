"""The Poisson binomial distribution, against 60 digits, long double and torch's own distributions."""

import copy
import math
import pickle

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.statistics import counting, law
from circuitroute.statistics.wide import Wide

D = torch.float64


def exact(probs):
    """The probabilities of all counts, in 60 digits and exponents of any size."""
    with mpmath.workdps(60):
        found = [mpmath.mpf(1)]
        for p in map(mpmath.mpf, np.asarray(probs, dtype=float).tolist()):
            q, padded = 1 - p, [mpmath.mpf(0), *found, mpmath.mpf(0)]
            found = [padded[j + 1] * q + padded[j] * p for j in range(len(found) + 1)]
        return found


def log_of(number):
    """The logarithm of a positive number of any size."""
    with mpmath.workdps(400):
        return float(mpmath.log(number))


def errors(log_probs, probs):
    """The relative errors of the probabilities that float64 can hold, and of the logarithms of smaller ones."""
    plain, small = [0.0], [0.0]
    for found, number in zip(log_probs.tolist(), exact(probs), strict=True):
        if number == 0:
            assert found == -math.inf
        elif number > 1e-300:
            plain.append(abs(math.exp(found) / float(number) - 1))
        else:
            small.append(abs(found / log_of(number) - 1))
    return max(plain), max(small)


RNG = np.random.default_rng(0)
PROBS = {
    "uniform": lambda n: RNG.random(n),
    "rare": lambda n: 10.0 ** -RNG.uniform(1, 12, n),
    "extreme": lambda n: np.where(RNG.random(n) < 0.5, 10 ** -RNG.uniform(1, 300, n), 1 - 10 ** -RNG.uniform(1, 15, n)),
    "equal": lambda n: np.full(n, 0.3),
    "fair": lambda n: np.full(n, 0.5),
    "nearly certain": lambda n: RNG.beta(0.1, 0.1, n),
    "some certain": lambda n: np.where(RNG.random(n) < 0.3, RNG.integers(0, 2, n), RNG.random(n)),
    "all certain": lambda n: RNG.integers(0, 2, n).astype(float),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROBS)
@pytest.mark.parametrize("n", [1, 2, 5, 31, 64, 65, 257, 300])
def test_every_probability_is_right(kind, n):
    """The tails too: to 1e-12 wherever float64 holds the probability, and beyond in the logarithm."""
    probs = PROBS[kind](n)
    plain, small = errors(cr.PoissonBinomial(probs=torch.tensor(probs)).log_pmf(), probs)
    assert plain < 1e-12
    assert small < 1e-14


@pytest.mark.parametrize("kind", ["uniform", "rare", "fair"])
def test_every_probability_of_many_coins_is_right(kind):
    """Against long double, which has 16,000 bits of exponent here, in a plain recursion over the coins."""
    probs = PROBS[kind](1500)
    if np.finfo(np.longdouble).max < np.longdouble("1e4900"):
        pytest.skip("no long double here")
    truth = np.ones(1, dtype=np.longdouble)
    for p in probs.astype(np.longdouble):
        truth = np.append(truth * (1 - p), 0) + np.append(0, truth * p)
    found = cr.PoissonBinomial(probs=torch.tensor(probs)).log_pmf().numpy()
    held = truth > 1e-300
    assert held.sum() > 100
    assert np.abs(np.exp(found[held]) / truth[held].astype(float) - 1).max() < 1e-12
    rest = (truth > np.longdouble("1e-4900")) & ~held
    assert np.abs(found[rest] / np.log(truth[rest]).astype(float) - 1).max(initial=0) < 1e-14


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4, 1e5])
def test_logits_and_probabilities_agree(scale):
    logits = torch.randn(3, 90, dtype=D, generator=torch.Generator().manual_seed(0)) * scale
    by_logits = cr.PoissonBinomial(logits=logits)
    plain = law._plain(logits, "logits")
    assert ((by_logits.log_pmf() - plain).abs() <= 1e-11 * plain.abs().clamp(min=1)).all()
    if scale <= 1:
        by_probs = cr.PoissonBinomial(probs=logits.sigmoid())
        assert torch.allclose(by_probs.log_pmf(), by_logits.log_pmf(), rtol=1e-12)
        assert torch.allclose(by_probs.logits, logits)
        assert torch.allclose(by_logits.probs, by_probs.probs)


def test_logits_beyond_all_exponents():
    """Those that would have no exact slopes go through log space."""
    logits = torch.tensor([1e8, -1e30, 0.0], dtype=D)
    found = cr.PoissonBinomial(logits=logits).log_pmf()
    assert torch.allclose(
        found, torch.tensor([-1e8 + math.log(0.5), math.log(0.5), math.log(0.5), -1e30], dtype=D), rtol=1e-12
    )


def test_equal_coins_are_the_binomial():
    n = 40
    ours = cr.PoissonBinomial(probs=torch.full((n,), 0.3, dtype=D))
    theirs = torch.distributions.Binomial(n, probs=torch.tensor(0.3, dtype=D))
    counts = ours.enumerate_support()
    assert torch.allclose(ours.log_prob(counts), theirs.log_prob(counts))
    assert torch.allclose(ours.mean, theirs.mean)
    assert torch.allclose(ours.variance, theirs.variance)
    assert torch.allclose(ours.stddev, theirs.stddev)


def test_it_is_the_count_of_a_random_subset():
    """The law of |S| of an unconstrained circuit; a count's probability, the partition function of Exactly."""
    logits = torch.randn(4, 9, dtype=D, generator=torch.Generator().manual_seed(1))
    ours = cr.PoissonBinomial(logits=logits)
    assert torch.allclose(ours.pmf(), cr.compile(cr.AtLeast(0), 9)(logits).count_probs)
    log_z = cr.compile(cr.Exactly(3), 9)(logits).log_partition - torch.nn.functional.softplus(logits).sum(-1)
    assert torch.allclose(ours.log_prob(torch.tensor(3.0)), log_z)


# ---------------------------------------------------------------------------------------------- tails and quantiles


@pytest.mark.parametrize("n", [6, 120])
def test_tails_are_right_on_both_sides(n):
    probs = RNG.random(n) ** 3
    numbers = exact(probs)
    ours = cr.PoissonBinomial(probs=torch.tensor(probs))
    value = torch.arange(n + 1, dtype=D)
    log_cdf, log_survival = ours.log_cdf(value).tolist(), ours.log_survival(value).tolist()
    for j in range(n):
        with mpmath.workdps(400):
            above = mpmath.fsum(numbers[j + 1 :])
            below = mpmath.fsum(numbers[: j + 1]) if j < n // 2 else 1 - above
        # The probability that is nearly one is what the other leaves, to the digits of the other.
        assert math.isclose(log_cdf[j], log_of(below), rel_tol=1e-12, abs_tol=1e-300)
        if above < 0.9:
            assert math.isclose(log_survival[j], log_of(above), rel_tol=1e-12)
    assert log_cdf[n] == 0
    assert log_survival[n] == -math.inf
    assert torch.allclose(ours.cdf(value) + ours.survival(value), torch.ones(n + 1, dtype=D))


def test_tails_of_any_real_value():
    ours = cr.PoissonBinomial(probs=torch.tensor([0.5, 0.5], dtype=D))
    value = torch.tensor([-math.inf, -0.5, 0.0, 0.9, 1.5, 2.0, 7.0, math.inf], dtype=D)
    assert torch.allclose(ours.cdf(value), torch.tensor([0, 0, 0.25, 0.25, 0.75, 1, 1, 1], dtype=D))
    assert torch.allclose(ours.survival(value), torch.tensor([1, 1, 0.75, 0.75, 0.25, 0, 0, 0], dtype=D))


@pytest.mark.parametrize("n", [1, 7, 60])
def test_quantiles_are_those_of_scipy(n):
    probs = RNG.random((3, n))
    ours = cr.PoissonBinomial(probs=torch.tensor(probs))
    q = np.concatenate([RNG.random(20), [1e-12, 0.5, 1 - 1e-12]])
    theirs = np.stack([scipy.stats.poisson_binom(row).ppf(q) for row in probs], -1)
    assert np.array_equal(ours.icdf(torch.tensor(q)[:, None]).numpy(), theirs)
    assert ours.quantile(torch.tensor(0.5, dtype=D)).equal(ours.icdf(torch.tensor(0.5, dtype=D)))


def test_quantiles_invert_the_cdf():
    ours = cr.PoissonBinomial(probs=torch.tensor([0.2, 0.5, 0.9, 0.4], dtype=D))
    counts = torch.arange(5, dtype=D)
    assert ours.icdf(ours.cdf(counts)).equal(counts)
    many = cr.PoissonBinomial(probs=torch.tensor(RNG.random(500)))
    near = many.mean.floor() + torch.arange(-20, 20, dtype=D)
    assert many.icdf(many.cdf(near)).equal(near)
    between = ours.cdf(counts)[:-1] * (1 + 1e-12)
    assert ours.icdf(between).equal(counts[1:])


def test_quantiles_invert_the_cdf_as_it_was_rounded():
    torch.manual_seed(0)
    ours = cr.PoissonBinomial(probs=torch.rand(5, 12))
    counts = torch.arange(13.0)[:, None].expand(-1, 5)
    cdf = ours.cdf(counts)
    assert cdf.dtype == torch.float32
    grows = torch.cat([cdf[:1] > 0, cdf[1:] > cdf[:-1]])
    assert ours.icdf(cdf)[grows].equal(counts[grows])
    one = cr.PoissonBinomial(probs=torch.tensor([0.5, 0.5]))
    assert torch.func.vmap(one.icdf)(torch.tensor([0.25, 0.75, 0.5])).tolist() == [0, 1, 1]


def test_quantiles_at_the_ends_are_possible_counts():
    ours = cr.PoissonBinomial(probs=torch.tensor([[0, 1, 0.5], [0.5, 0.5, 0.5], [1, 1, 1]], dtype=D))
    assert ours.icdf(torch.tensor(0.0)).tolist() == [1, 0, 3]
    assert ours.icdf(torch.tensor(1.0)).tolist() == [2, 3, 3]


@pytest.mark.parametrize("n", [1, 30, 200])
def test_entropy_and_moments(n):
    probs = torch.tensor(RNG.random((2, n)))
    ours = cr.PoissonBinomial(probs=probs)
    p, counts = ours.pmf(), torch.arange(n + 1, dtype=D)
    assert torch.allclose(ours.entropy(), -(p * p.log()).sum(-1))
    assert torch.allclose(ours.mean, (p * counts).sum(-1))
    assert torch.allclose(ours.variance, (p * (counts - ours.mean[:, None]) ** 2).sum(-1))
    assert ours.mode.equal(p.argmax(-1).double())
    assert (ours.mode - ours.mean).abs().max() < 1


# ---------------------------------------------------------------------------------------------- derivatives


OUTPUTS = {
    "log_prob": lambda d: d.log_prob(torch.tensor([0.0, 2.0, 5.0], dtype=D)[:, None]),
    "log_pmf": lambda d: d.log_pmf(),
    "pmf": lambda d: d.pmf(),
    "log_cdf": lambda d: d.log_cdf(torch.tensor([1.0, 4.0], dtype=D)[:, None]),
    "log_survival": lambda d: d.log_survival(torch.tensor([1.0, 4.0], dtype=D)[:, None]),
    "cdf": lambda d: d.cdf(torch.tensor(3.0, dtype=D)),
    "entropy": lambda d: d.entropy(),
    "mean": lambda d: d.mean,
    "variance": lambda d: d.variance,
}


@pytest.mark.parametrize("given_as", ["logits", "probs"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_gradients(name, given_as):
    values = torch.tensor(RNG.random((2, 5)) * 0.9 + 0.05)
    values = (values.logit() if given_as == "logits" else values).requires_grad_()

    def output(x):
        return OUTPUTS[name](cr.PoissonBinomial(**{given_as: x}))

    assert torch.autograd.gradcheck(output, (values,), fast_mode=True)
    assert torch.autograd.gradgradcheck(output, (values,), fast_mode=True)


@pytest.mark.parametrize("kind", ["uniform", "rare", "extreme", "equal"])
@pytest.mark.parametrize("n", [3, 64, 300])
def test_the_gradient_of_many_coins_is_that_of_log_space(kind, n):
    logits = torch.tensor(PROBS[kind](n)).logit()[None].clamp(-600, 600)
    logits = torch.cat([logits, logits.flip(-1) * 0.7]).requires_grad_()
    upstream = torch.randn(2, n + 1, dtype=D, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(cr.PoissonBinomial(logits=logits).log_pmf(), logits, upstream)
    (expected,) = torch.autograd.grad(law._plain(logits, "logits"), logits, upstream)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_the_gradient_is_a_posterior():
    """d log P(count = k) / d theta = the marginals given k, less p; the router's circuit knows the former."""
    logits = torch.randn(200, dtype=D, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (found,) = torch.autograd.grad(cr.PoissonBinomial(logits=logits).log_prob(torch.tensor(90.0)), logits)
    given_k = cr.compile(cr.Exactly(90), 200)(logits.detach()).marginals
    assert torch.allclose(found, given_k - logits.detach().sigmoid(), atol=1e-12)


def test_gradients_at_certain_coins():
    logits = torch.tensor([math.inf, -math.inf, 0.3, 1.0], dtype=D, requires_grad=True)
    (found,) = torch.autograd.grad(cr.PoissonBinomial(logits=logits).log_prob(torch.tensor(2.0)), logits)
    assert found[:2].tolist() == [0, 0]
    assert found.isfinite().all()
    probs = torch.tensor([0.0, 1.0, 0.3, 0.4], dtype=D, requires_grad=True)
    (found,) = torch.autograd.grad(cr.PoissonBinomial(probs=probs).log_prob(torch.tensor(2.0)), probs)

    def moved(place, by):
        changed = probs.detach().clone()
        changed[place] += by
        there = cr.PoissonBinomial(probs=changed).log_prob(torch.tensor(2.0))
        return float(there - cr.PoissonBinomial(probs=probs.detach()).log_prob(torch.tensor(2.0))) / by

    assert math.isclose(float(found[0]), moved(0, 1e-7), rel_tol=1e-5)
    assert math.isclose(float(found[1]), moved(1, -1e-7), rel_tol=1e-5)


def test_what_is_impossible_has_no_gradient():
    probs = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    for create_graph in (False, True):
        log_prob = cr.PoissonBinomial(probs=probs).log_pmf()
        (found,) = torch.autograd.grad(log_prob[1:].sum(), probs, create_graph=create_graph)
        assert found.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_transforms():
    logits = torch.randn(3, 6, dtype=D, generator=torch.Generator().manual_seed(4))

    def log_prob(x):
        return cr.PoissonBinomial(logits=x).log_prob(torch.tensor(2.0, dtype=D))

    assert torch.allclose(torch.func.vmap(log_prob)(logits), log_prob(logits))
    x = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_prob(x).sum(), x)
    assert torch.allclose(torch.func.grad(lambda x: log_prob(x).sum())(logits), slope)
    assert torch.allclose(torch.func.jacfwd(log_prob)(logits[0]), slope[0])
    entropy = torch.func.vmap(lambda x: cr.PoissonBinomial(logits=x).entropy())(logits)
    assert torch.allclose(entropy, cr.PoissonBinomial(logits=logits).entropy())
    assert cr.PoissonBinomial(logits=logits.to("meta")).pmf().shape == (3, 7)


# ---------------------------------------------------------------------------------------------- samples


def test_samples_have_the_law():
    """Chi-squared at a level of 1e-6."""
    probs = torch.tensor([[0.1, 0.5, 0.7, 0.2, 0.9], [0.3] * 5], dtype=D)
    ours = cr.PoissonBinomial(probs=probs)
    drawn = ours.sample((20_000,), key=5)
    assert drawn.shape == (20_000, 2)
    for row in range(2):
        observed = drawn[:, row].long().bincount(minlength=6).double()
        expected = ours.pmf()[row] * 20_000
        assert float(((observed - expected) ** 2 / expected).sum()) < scipy.stats.chi2(5).isf(1e-6)


def test_a_sample_is_a_function_of_row_and_key():
    logits = torch.randn(7, 80, dtype=D, generator=torch.Generator().manual_seed(0))
    key = cr.random_key(3, torch.arange(7))
    drawn = cr.PoissonBinomial(logits=logits).sample(key=key)
    alone = [cr.PoissonBinomial(logits=logits[i]).sample(key=key[i]) for i in range(7)]
    assert drawn.equal(torch.stack(alone))
    again = cr.PoissonBinomial(logits=logits.reshape(7, 1, 80)).sample((4,), key=key[:, None])
    assert again.shape == (4, 7, 1)
    assert again.equal(cr.PoissonBinomial(logits=logits[:, None]).sample((4,), key=key[:, None]))
    assert not again[0].equal(again[1])
    torch.manual_seed(0)
    first = cr.PoissonBinomial(logits=logits).sample((3,))
    torch.manual_seed(0)
    assert cr.PoissonBinomial(logits=logits).sample((3,)).equal(first)
    with pytest.raises(ValueError, match="key has shape"):
        cr.PoissonBinomial(logits=logits).sample(key=torch.arange(5))


def test_samples_reach_far_tails():
    """Inversion by 64 bits of the key: counts of probability 1e-12 are not beyond the grid of uniforms."""
    ours = cr.PoissonBinomial(probs=torch.tensor([1e-12], dtype=D))
    words = torch.tensor([1 - 5e-13, 1 - 2e-12], dtype=D)
    assert ours.icdf(words).tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------- as a distribution


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 0)])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_shapes(batch, n):
    ours = cr.PoissonBinomial(logits=torch.zeros(*batch, n))
    assert ours.batch_shape == batch
    assert ours.event_shape == ()
    assert ours.num_trials == n
    assert ours.param_shape == (*batch, n)
    assert ours.pmf().shape == (*batch, n + 1)
    for found in (ours.mean, ours.variance, ours.mode, ours.entropy(), ours.sample(), ours.log_prob(torch.tensor(0.0))):
        assert found.shape == batch
        assert found.dtype == torch.float32
    assert ours.sample((2, 5)).shape == (2, 5, *batch)
    assert ours.enumerate_support().shape == (n + 1, *batch)
    assert ours.enumerate_support(expand=False).shape == (n + 1, *[1] * len(batch))
    larger = ours.expand((3, *batch))
    assert larger.batch_shape == (3, *batch)
    assert torch.allclose(larger.cdf(torch.tensor(0.0)), ours.cdf(torch.tensor(0.0)).expand(3, *batch))
    value = torch.zeros(5, *batch)
    assert ours.log_prob(value).shape == ours.icdf(value).shape == (5, *batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions_are_float32_of_float64(dtype):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    ours = cr.PoissonBinomial(logits=logits)
    exactly = cr.PoissonBinomial(logits=logits.detach().double())
    assert ours.log_pmf().dtype == torch.float32
    assert ours.log_pmf().equal(exactly.log_pmf().float())
    assert torch.autograd.grad(ours.entropy().sum(), logits)[0].dtype == dtype


def test_views_and_modes_of_torch():
    wide = torch.randn(9, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    expected = cr.PoissonBinomial(logits=wide.t().contiguous()).log_pmf()
    assert cr.PoissonBinomial(logits=wide.t()).log_pmf().equal(expected)
    with torch.inference_mode():
        assert cr.PoissonBinomial(logits=wide.t()).log_pmf().equal(expected)
    x = wide.t().clone().requires_grad_()
    ours = cr.PoissonBinomial(logits=x)
    with torch.no_grad():
        assert ours.log_pmf().equal(expected)
        assert not ours.log_pmf().requires_grad
    assert ours.log_pmf().requires_grad
    for twin in (
        copy.deepcopy(cr.PoissonBinomial(logits=wide)),
        pickle.loads(pickle.dumps(cr.PoissonBinomial(logits=wide))),
    ):
        assert twin.log_pmf().equal(cr.PoissonBinomial(logits=wide).log_pmf())
    assert repr(ours) == "PoissonBinomial(logits: (4, 9))"


def test_order_does_not_matter():
    """The coins are sorted: to the bit."""
    probs = torch.tensor(RNG.random(333))
    found = cr.PoissonBinomial(probs=probs).log_pmf()
    assert cr.PoissonBinomial(probs=probs.flip(0)).log_pmf().equal(found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_any_probabilities(probs):
    ours = cr.PoissonBinomial(probs=torch.tensor(probs, dtype=D))
    plain, small = errors(ours.log_pmf(), probs)
    assert plain < 1e-12
    assert small < 1e-12
    assert float(ours.survival(ours.icdf(torch.tensor(1.0, dtype=D)))) == 0


def test_products_with_exponents_and_plain_ones_agree(monkeypatch):
    probs = RNG.random((2, 200))
    expected = counting.log_pmf(counting.Coins.of_probs(probs))
    monkeypatch.setattr(counting, "PLAIN", -1)
    found = counting.log_pmf(counting.Coins.of_probs(probs))
    assert np.abs(found - expected).max() < 1e-12
    assert math.isclose(float(Wide.exp(np.array([-1e5])).log()[0]), -1e5, rel_tol=1e-15)


# ---------------------------------------------------------------------------------------------- what is refused


def test_arguments_are_checked():
    half = torch.full((2, 3), 0.5)
    for given_as in ({}, {"logits": half, "probs": half}):
        with pytest.raises(ValueError, match="exactly one of logits and probs"):
            cr.PoissonBinomial(**given_as)
    for wrong in ([0.5], 0.5, torch.tensor([1, 0]), half.to(torch.complex64), half.to_sparse()):
        with pytest.raises(TypeError, match="probs"):
            cr.PoissonBinomial(probs=wrong)
    with pytest.raises(ValueError, match=r"logits has shape \(\)"):
        cr.PoissonBinomial(logits=torch.tensor(0.0))
    bad = half.clone()
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match="probs hold NaN in row 1"):
        cr.PoissonBinomial(probs=bad)
    bad[1, 2] = 1.5
    with pytest.raises(ValueError, match=r"probs hold 1.5 in row 1: .* give logits="):
        cr.PoissonBinomial(probs=bad)


def test_values_are_checked():
    ours = cr.PoissonBinomial(probs=torch.full((2, 3), 0.5))
    for wrong in (-1.0, 4.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="in row 1: counts are integers from 0 to N=3"):
            ours.log_prob(torch.tensor([0.0, wrong]))
    with pytest.raises(ValueError, match="value is NaN in row 0"):
        ours.cdf(torch.tensor([math.nan, 0.0]))
    with pytest.raises(ValueError, match=r"value=1.5 in the only row: quantiles"):
        ours.icdf(torch.tensor(1.5))
    with pytest.raises(ValueError, match="must broadcast with the batch"):
        ours.log_prob(torch.zeros(3))
    with pytest.raises(TypeError, match="value"):
        ours.log_prob(1.0)
    assert ours.log_prob(torch.tensor([0, 3])).tolist() == pytest.approx([math.log(1 / 8)] * 2)


def test_without_checks_bad_rows_are_nan_alone():
    logits = torch.zeros(2, 3)
    logits[1, 0] = math.nan
    ours = cr.PoissonBinomial(logits=logits, validate_args=False)
    found = [
        ours.log_prob(torch.tensor(1.0)),
        ours.mean,
        ours.mode,
        ours.entropy(),
        ours.sample(),
        ours.cdf(torch.tensor(1.0)),
    ]
    for value in [*found, ours.icdf(torch.tensor(0.5))]:
        assert value.isnan().tolist() == [False, True]
    good = cr.PoissonBinomial(logits=torch.zeros(3), validate_args=False)
    assert good.log_prob(torch.tensor([-1.0, 0.5, 4.0])).tolist() == [-math.inf] * 3
    assert good.log_prob(torch.tensor(math.nan)).isnan()
    assert good.icdf(torch.tensor([-0.5, 2.0])).isnan().all()


@pytest.mark.slow
def test_equal_coins_by_the_hundred_thousand():
    """What rounds alike in all of them does not add up to more than the bar."""
    n = 100_000
    found = cr.PoissonBinomial(probs=torch.full((n,), 0.3, dtype=D)).log_pmf()
    with mpmath.workdps(40):
        p = mpmath.mpf(0.3)
        for j in (0, 10, 10_000, 25_000, 29_000, 30_000, 31_000, 50_000, n):
            truth = mpmath.log(mpmath.binomial(n, j)) + j * mpmath.log(p) + (n - j) * mpmath.log(1 - p)
            assert abs(float(found[j] - float(truth))) < 1e-12 * max(1.0, abs(float(truth)))
