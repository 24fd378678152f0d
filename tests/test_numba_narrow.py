"""Narrow trees of the engine numba: coefficients that do not matter are left out, and rows for which they would matter
are found and take the whole tree."""

from __future__ import annotations

import math

import pytest
import torch

import circuitroute as cr
from circuitroute.engines.subset import NaiveSubset, NumbaSubset
from circuitroute.engines.subset.numba import engine
from circuitroute.engines.subset.numba.narrow import LEAST, SHARE, degrees
from circuitroute.engines.sweep import Inputs
from tests.truth import count_gradient, count_truth

pytest.importorskip("numba", reason="the engine numba needs the extra 'cpu'")

ENGINE = NumbaSubset()
N, K = 2048, 128


def normal(T, n, scale=1.0, seed=0, dtype=torch.float32):
    return torch.randn(T, n, generator=torch.Generator().manual_seed(seed)).to(dtype) * scale


def exactly(k, dtype=torch.float32):
    phi = torch.full((k + 1,), -math.inf, dtype=dtype)
    phi[k] = 0.0
    return phi


def crowded(row, by=12.0):
    """The row with more of its weight on variables that lie at regular distances, all below few nodes."""
    row = row.clone()
    row[::8] += by
    return row


def both(rows, key):
    """The sweep with a narrow tree, and with the whole one."""
    narrow, whole = engine._Arrays.of(rows, narrow=True), engine._Arrays.of(rows)
    assert narrow.is_narrow
    assert not whole.is_narrow
    return [ENGINE._swept(rows, arrays, key, moments=True) for arrays in (narrow, whole)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_what_is_left_out_does_not_show(dtype, scale):
    rows, key = Inputs(normal(20, N, scale, dtype=dtype), exactly(K, dtype)), cr.random_key(0, torch.arange(20))
    narrow, whole = both(rows, key)
    assert not narrow.fallback.any()
    share = SHARE[str(dtype).removeprefix("torch.")]
    for name in ("marginals", "log_partition", "count_probs"):
        assert torch.allclose(getattr(narrow, name), getattr(whole, name), rtol=share, atol=share)
    assert torch.equal(narrow.mask, whole.mask)
    u, v = normal(20, N, seed=1, dtype=dtype), torch.zeros(20, K + 1, dtype=dtype)
    of_narrow, of_whole = (
        ENGINE._derived(rows, engine._Arrays.of(rows, narrow=choice), narrow.shift, u, v) for choice in (True, False)
    )
    assert not of_narrow[2].any()
    assert torch.allclose(of_narrow[0], of_whole[0], rtol=0, atol=10 * share)


def test_marginals_and_gradients_are_the_truth():
    x, u = normal(2, N), normal(2, N, seed=1)
    truth, slope = count_truth(x, exactly(K).double()), count_gradient(x, exactly(K).double(), u)
    found = ENGINE.infer(x, exactly(K))
    dm, _ = ENGINE.second_derivative(x, exactly(K), found, u, None)
    assert (found.marginals.double() - torch.from_numpy(truth.marginals)).abs().max() < 1e-6
    assert (dm.double() - torch.from_numpy(slope.marginals)).abs().max() < 1e-5


def test_rows_that_need_the_whole_tree_are_found_and_get_it():
    x, key = normal(40, N), cr.random_key(0, torch.arange(40))
    x[[3, 20]] = torch.stack([crowded(x[3]), crowded(x[20])])
    rows, u = Inputs(x, exactly(K)), normal(40, N, seed=1)
    narrow, whole = both(rows, key)
    assert narrow.fallback.nonzero().squeeze(1).tolist() == [3, 20]
    assert (narrow.marginals[3] - whole.marginals[3]).abs().max() > 1e-3  # or the test would show nothing
    found = ENGINE.sweep(rows, key, moments=True)
    assert not found.fallback.any()
    for name in ("marginals", "log_partition", "count_probs", "mask"):
        assert torch.equal(getattr(found, name)[[3, 20]], getattr(whole, name)[[3, 20]])
    dm, _ = ENGINE.derivative(rows, found.shift, u, None)
    expected, _, _ = ENGINE._derived(rows, engine._Arrays.of(rows), found.shift, u, torch.zeros(40, K + 1))
    assert torch.equal(dm[[3, 20]], expected[[3, 20]])
    assert (dm - expected).abs().max() < 1e-8


def test_rows_are_marked_by_the_means_of_their_nodes():
    """Long before anything is lost: the node of every eighth variable has 16, 33 and 47 of 128, 38 being allowed."""
    x = torch.stack([crowded(normal(1, N, 0.1)[0], by) for by in (0.0, 0.9, 1.4)])
    narrow, whole = both(Inputs(x, exactly(K)), cr.random_key(0, torch.arange(3)))
    assert narrow.fallback.tolist() == [False, False, True]
    assert (narrow.marginals - whole.marginals).abs().max() < 1e-6


def test_a_row_is_the_same_whatever_its_neighbours():
    x, key = normal(40, N), cr.random_key(0, torch.arange(40))
    x[3] = crowded(x[3])
    many = ENGINE.sweep(Inputs(x, exactly(K)), key, moments=True)
    for part in (slice(3, 4), slice(2, 12), slice(4, 40)):
        few = ENGINE.sweep(Inputs(x[part], exactly(K)), key[part], moments=True)
        assert torch.equal(few.marginals, many.marginals[part])
        assert torch.equal(few.mask, many.mask[part])


def test_evidence_on_a_narrow_tree():
    x = normal(3, N, dtype=torch.float64)
    x[0, :100], x[1, 500:], x[2, ::16] = math.inf, -math.inf, math.inf
    found, naive = (e.infer(x, exactly(K, torch.float64)) for e in (ENGINE, NaiveSubset()))
    assert torch.allclose(found.marginals, naive.marginals, rtol=0, atol=1e-10)
    assert torch.allclose(found.log_partition, naive.log_partition, rtol=1e-10)


@pytest.mark.parametrize("counts", [[K - 1, K], list(range(K + 1)), [0, K]])
def test_ranges_take_the_whole_tree(counts):
    phi = torch.full((K + 1,), -math.inf)
    phi[counts] = 0.0
    assert not engine._Arrays.of(Inputs(normal(1, N), phi), narrow=True).is_narrow


def test_small_counts_take_the_whole_tree():
    assert not engine._Arrays.of(Inputs(normal(1, N), exactly(LEAST - 1)), narrow=True).is_narrow


@pytest.mark.parametrize(("n", "k"), [(2048, 128), (16_384, 512), (65_536, 2048)])
def test_degrees_leave_out_no_more_than_their_share(n, k):
    """Against the tail of a Poisson count, which has more there than independent coins of the same mean."""
    levels = n.bit_length()
    found, most = degrees(n, k, "float32", levels)
    lost = 0.0
    for level, (degree, mean) in enumerate(zip(found, most, strict=True)):
        if degree < k:
            assert mean >= k * 2**level / n
            x = torch.arange(degree + 1, degree + 400, dtype=torch.float64)
            lost += 2 ** (levels - 1 - level) * float((x * math.log(mean) - mean - torch.lgamma(x + 1)).exp().sum())
    assert min(found) < k == found[-1]
    assert lost * math.sqrt(k) / 0.1 < SHARE["float32"]
