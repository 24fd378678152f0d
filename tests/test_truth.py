"""The ground truth itself, held against itself and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.truth import count_gradient, count_truth, counts_in, enumerate_worlds, exactly, world_truth

INF = np.inf


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _potentials(n: int) -> list[np.ndarray]:
    sparse = np.full(n + 1, -INF)
    sparse[[1, n]] = [0.3, -2.0]
    return [exactly(n // 2, n), counts_in(range(2, n), n), sparse, _rng(3).normal(size=n + 1), exactly(0, n)]


def test_worlds_are_all_different_and_indexed_by_their_bits() -> None:
    worlds = enumerate_worlds(4)
    assert worlds.shape == (16, 4)
    assert worlds.dtype == bool
    np.testing.assert_array_equal(worlds @ (1 << np.arange(4)), np.arange(16))


@pytest.mark.parametrize("scale", [0.1, 5.0, 1e4])
@pytest.mark.parametrize("which", range(5))
def test_counting_agrees_with_enumeration(which: int, scale: float) -> None:
    n, phi = 7, _potentials(7)[which]
    theta = _rng(1).normal(size=(6, n)) * scale
    theta[3] = np.round(theta[3])
    theta[4, 2], theta[5, 0] = -INF, INF
    worlds, counts = world_truth(theta, np.ones(2**n, bool), phi), count_truth(theta, phi)
    for name in ("log_partition", "marginals", "count_probs", "entropy"):
        np.testing.assert_allclose(getattr(counts, name), getattr(worlds, name), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("which", range(5))
def test_gradient_is_the_covariance_in_a_direction(which: int) -> None:
    n, phi = 6, _potentials(6)[which]
    theta = _rng(2).normal(size=(5, n)) * 3
    theta[0, 1], theta[1, 2], theta[2, :2] = -INF, INF, (INF, -INF)
    u, v = _rng(4).normal(size=theta.shape), _rng(5).normal(size=(5, n + 1))
    truth, slope = world_truth(theta, np.ones(2**n, bool), phi), count_gradient(theta, phi, u)
    np.testing.assert_allclose(slope.marginals, np.einsum("tij,tj->ti", truth.covariance, u), atol=1e-14)
    both = count_gradient(theta, phi, u, v)
    expected = _covariances(truth, enumerate_worlds(n), np.where(np.isinf(theta), 0, u), v)
    for got, wanted in zip(both, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-14)


def _covariances(truth: object, worlds: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    """E and Cov of f = u . z + v(|z|) over the worlds, NaN where there are none."""
    probs = np.exp(truth.log_probs)
    f = u @ worlds.T + v[:, worlds.sum(1)]
    mean = (probs * f).sum(1)
    is_count = worlds.sum(1)[:, None] == np.arange(worlds.shape[1] + 1)
    centred = probs * (f - mean[:, None])
    return centred @ worlds, centred @ is_count, mean


def test_gradient_agrees_with_differences() -> None:
    theta, u = _rng(6).normal(size=(3, 40)), _rng(7).normal(size=(3, 40))
    phi, step = counts_in({3, 9, 10}, 40), 1e-5
    up, down = count_truth(theta + step * u, phi), count_truth(theta - step * u, phi)
    slope = count_gradient(theta, phi, u)
    for name in ("marginals", "count_probs", "log_partition"):
        difference = (getattr(up, name) - getattr(down, name)) / (2 * step)
        np.testing.assert_allclose(getattr(slope, name), difference, atol=1e-8)


@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (5, 2), (60, 7), (257, 12)])
def test_equal_logits_share_the_count(n: int, k: int) -> None:
    truth = count_truth(np.full((1, n), -3.25), exactly(k, n))
    np.testing.assert_allclose(truth.marginals, k / n, rtol=1e-15)
    np.testing.assert_allclose(truth.log_partition, math.log(math.comb(n, k)) - 3.25 * k, rtol=1e-14)
    np.testing.assert_allclose(truth.entropy, math.log(math.comb(n, k)), rtol=1e-14, atol=1e-14)


def test_zero_logits_count_models() -> None:
    n, allowed = 30, [2, 11, 17]
    models = sum(math.comb(n, k) for k in allowed)
    truth = count_truth(np.zeros((1, n)), counts_in(allowed, n))
    np.testing.assert_allclose(np.exp(truth.log_partition), models, rtol=1e-13)
    np.testing.assert_allclose(truth.count_probs[0, allowed], [math.comb(n, k) / models for k in allowed])


def test_without_a_constraint_variables_are_independent() -> None:
    theta = _rng(8).normal(size=(2, 9))
    theta[0, :2] = INF, -INF
    truth, p = world_truth(theta, lambda mask: True), 1 / (1 + np.exp(-theta))
    np.testing.assert_allclose(truth.marginals, p, rtol=1e-14)
    variance = np.einsum("ti,ij->tij", p * (1 - p), np.eye(9))
    np.testing.assert_allclose(truth.covariance, variance, atol=1e-15)
    softplus = np.where(np.isinf(theta), 0, np.logaddexp(0, theta))
    np.testing.assert_allclose(truth.log_partition, softplus.sum(1), rtol=1e-14)


def test_an_accept_function_and_its_table_agree() -> None:
    theta, worlds = _rng(9).normal(size=(4, 6)), enumerate_worlds(6)
    by_function = world_truth(theta, lambda mask: mask[0] <= mask[3] and mask.sum() != 2)
    by_table = world_truth(theta, (worlds[:, 0] <= worlds[:, 3]) & (worlds.sum(1) != 2))
    np.testing.assert_array_equal(by_function.log_probs, by_table.log_probs)
    assert (by_function.count_probs[:, 2] == 0).all()
    assert (by_function.mode[:, 0] <= by_function.mode[:, 3]).all()


def test_mode_takes_the_largest_logits() -> None:
    theta = _rng(10).normal(size=(5, 8))
    truth = world_truth(theta, lambda mask: mask.sum() == 3)
    top = np.argsort(-theta, axis=1)[:, :3]
    np.testing.assert_array_equal(np.sort(truth.mode.nonzero()[1].reshape(5, 3)), np.sort(top))


def test_rows_with_nothing_left_are_nan_and_alone() -> None:
    theta = _rng(11).normal(size=(4, 5))
    theta[1, :4], theta[2, :3], theta[3, 0] = -INF, INF, np.nan
    u, phi = np.ones((4, 5)), exactly(2, 5)
    results = [world_truth(theta, np.ones(32, bool), phi), count_truth(theta, phi)]
    fields = [values for truth in results for values in vars(truth).values()]
    for values in [*fields, *count_gradient(theta, phi, u)]:
        assert np.isfinite(values[0]).any()
        assert not np.isnan(values[0]).any()
        assert np.isnan(values[1:]).all()


def test_per_token_potentials_are_rows_of_their_own() -> None:
    theta, phi = _rng(12).normal(size=(3, 8)), np.stack([exactly(k, 8) for k in (1, 4, 8)])
    together = count_truth(theta, phi)
    for t in range(3):
        alone = count_truth(theta[t : t + 1], phi[t])
        np.testing.assert_allclose(together.marginals[t], alone.marginals[0], rtol=1e-15)
    np.testing.assert_array_equal(together.count_probs.argmax(1), [1, 4, 8])


def test_extreme_logits_keep_their_digits() -> None:
    theta = _rng(13).normal(size=(4, 200)) * 1e4
    theta[:, 50] = theta[:, 60] = np.sort(theta, axis=1)[:, -7]
    truth = count_truth(theta, exactly(7, 200))
    np.testing.assert_allclose(truth.marginals.sum(1), 7, rtol=1e-12)
    np.testing.assert_allclose(truth.marginals[:, 50], truth.marginals[:, 60], rtol=1e-12)
    exact = [np.sort(row.astype(np.longdouble))[-7:].sum() for row in theta]
    np.testing.assert_allclose(truth.log_partition, np.array(exact, float), rtol=1e-3)


def test_a_potential_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 4 entries, got 6"):
        count_truth(np.zeros((1, 3)), np.zeros(6))


def test_large_problems_stay_exact() -> None:
    theta = _rng(14).normal(size=(20, 512))
    truth = count_truth(theta, exactly(64, 512))
    np.testing.assert_allclose(truth.marginals.sum(1), 64, rtol=1e-13)
    slope = count_gradient(theta, exactly(64, 512), np.ones(512))
    # Adding a constant to every logit changes nothing when the count is fixed.
    np.testing.assert_allclose(slope.marginals, 0, atol=1e-14)
