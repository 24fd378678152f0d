"""Every engine of the count family against the truth, on every output and gradient.

Bounds: float32 marginals 2e-6, gradients of marginals 1e-5, log Z 1e-5 relative; float64 1e-10.
"""

import math

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.engines.subset import NaiveSubset, NumbaSubset, TorchSubset
from circuitroute.engines.subset.torch import sweep as eager
from circuitroute.engines.sweep import Inputs
from tests.truth import count_gradient, count_truth

ENGINES = ["numba", "torch", "naive"]
SIZES = [1, 2, 5, 60, 64, 100, 257, 512]
SCALES = [0.1, 1.0, 10.0, 100.0, 1e4]
LARGE = {(257, 0.1), (257, 100.0), (512, 1.0), (512, 1e4)}
T = 8


def kinds(n):
    """Constraints of all kinds for n variables, small, middling and full counts."""
    some = {0, 1, n // 8, n // 2, n - 1, n} if n <= 100 else {1, 16, n // 8}
    yield from (cr.Exactly(k) for k in sorted(k for k in some if 0 <= k <= n))
    if n >= 2:
        yield cr.Between(n // 8, max(1, n // 4))
        yield cr.AtMost(max(1, n // 10))
        yield cr.CountIn({0, n // 3, n} if n <= 100 else {0, 12, 24})
    if 2 <= n <= 100:
        yield cr.AtLeast(n // 2)


def rows(n, scale, seed=0):
    """Random logits in float32 with ties, offsets of +-50, and rows of equal values."""
    g = torch.Generator().manual_seed(seed * 1000 + n)
    x = torch.randn(T, n, generator=g) * scale
    x[1] = x[1].round()
    x[2] += 50
    x[3] -= 50
    x[4] = scale
    x[5, : n // 2] = x[5, 0]
    return x


def phi_of(circuit, potential=None):
    phi = np.full(circuit.n + 1, -np.inf)
    phi[list(circuit.counts)] = 0.0
    if potential is not None:
        phi[: len(potential)] += potential
    return phi


def hold(circuit, x, marginal_bound, log_z_bound, gradient_bound, potential=None):
    """All outputs and gradients of ``circuit`` at logits ``x`` against the dynamic program."""
    phi = phi_of(circuit) if potential is None else _add(phi_of(circuit), potential.double().numpy())
    truth = count_truth(x.numpy(), phi)
    g = torch.Generator().manual_seed(7)
    u = torch.randn(x.shape, generator=g, dtype=x.dtype)
    v = torch.randn(len(x), circuit.max_count + 1, generator=g, dtype=x.dtype)
    logits = x.clone().requires_grad_()
    shared = torch.zeros(len(x), circuit.max_count + 1, dtype=x.dtype) if potential is None else potential.clone()
    shared.requires_grad_()
    dist = circuit(logits, shared)
    J = circuit.max_count + 1
    np.testing.assert_allclose(dist.marginals.detach().numpy(), truth.marginals, atol=marginal_bound, rtol=0)
    np.testing.assert_allclose(
        dist.count_probs.detach().numpy(), truth.count_probs[:, :J], atol=2 * marginal_bound, rtol=0
    )
    error = np.abs(dist.log_partition.detach().numpy() - truth.log_partition)
    assert (error / np.maximum(1, np.abs(truth.log_partition))).max() <= log_z_bound
    slopes = count_gradient(x.numpy(), phi, u.numpy(), np.pad(v.numpy(), ((0, 0), (0, circuit.n + 1 - J))))
    inner = (dist.marginals * u).sum() + (dist.count_probs * v).sum()
    by_logits, by_phi = torch.autograd.grad(inner, (logits, shared))
    np.testing.assert_allclose(by_logits.numpy(), slopes.marginals, atol=gradient_bound, rtol=0)
    np.testing.assert_allclose(by_phi.numpy(), slopes.count_probs[:, :J], atol=gradient_bound, rtol=0)
    by_logits, by_phi = torch.autograd.grad(circuit(logits, shared).log_partition.sum(), (logits, shared))
    finite = np.isfinite(x.numpy())
    np.testing.assert_allclose(by_logits.numpy(), np.where(finite, truth.marginals, 0), atol=marginal_bound, rtol=0)
    np.testing.assert_allclose(by_phi.numpy(), truth.count_probs[:, :J], atol=2 * marginal_bound, rtol=0)


def _add(phi_C, potential_TJ):
    result = np.broadcast_to(phi_C, (len(potential_TJ), len(phi_C))).copy()
    result[:, : potential_TJ.shape[1]] += potential_TJ
    return result


# The truth of large sizes takes long: in the ordinary run they are held at two scales each, small sizes at all.
CELLS = [
    pytest.param(n, scale, marks=[] if n <= 100 or (n, scale) in LARGE else pytest.mark.slow)
    for n in SIZES
    for scale in SCALES
]


@pytest.mark.parametrize("engine", ["numba", "torch"])  # last, so that engines find each other's truth
@pytest.mark.parametrize(("n", "scale"), CELLS)
def test_float32(n, scale, engine):
    for constraint in kinds(n):
        circuit = cr.compile(constraint, n).with_engine(engine)
        assert circuit.engine_for("cpu") == engine
        hold(circuit, rows(n, scale), 2e-6, 1e-5, 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
@pytest.mark.parametrize("n", [1, 5, 60, 257])
def test_float64(n, scale, engine):
    for constraint in kinds(n):
        if engine == "naive" and n > 100 and constraint != cr.Exactly(16):
            continue  # the log-space tree is slow; one large case says as much
        circuit = cr.compile(constraint, n).with_engine(engine)
        assert circuit.engine_for("cpu") == engine
        hold(circuit, rows(n, scale).double(), 1e-10, 1e-12, 1e-9)


def evidence_rows(n, k):
    """Forced and forbidden variables up to the point where nothing is left to decide."""
    x = torch.randn(10, n, generator=torch.Generator().manual_seed(n)) * 3
    x[0, :2] = math.inf
    x[1, :k] = math.inf
    x[2, 3:5] = -math.inf
    x[3, : n - k] = -math.inf
    x[4, : n - k - 1] = -math.inf
    x[5, 0], x[5, 1:3] = math.inf, -math.inf
    x[6, :k], x[6, k:] = 1e4, -1e4
    x[7, : k - 1], x[7, k - 1 : k + 1], x[7, k + 1 :] = 1e4, 0.0, -1e4
    x[8, -1], x[8, : n - k] = math.inf, -math.inf
    return x


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("n", "k"), [(8, 3), (60, 8), (64, 16)])
def test_evidence(engine, n, k):
    for constraint in (cr.Exactly(k), cr.Between(k - 1, k + 1), cr.CountIn({k, k + 2})):
        circuit = cr.compile(constraint, n).with_engine(engine)
        hold(circuit, evidence_rows(n, k), 2e-6, 1e-5, 1e-5)
        marginals = circuit(evidence_rows(n, k)).marginals
        assert (marginals[evidence_rows(n, k) == -math.inf] == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spread", [0.5, 5.0, 60.0, 400.0])
def test_count_potentials_per_token(engine, spread):
    circuit = cr.compile(cr.AtMost(12), 40).with_engine(engine)
    g = torch.Generator().manual_seed(3)
    potential = torch.randn(T, 13, generator=g) * spread
    potential[0, 3:9] = -math.inf
    potential[1, :12] = -math.inf
    potential[2] = torch.arange(13) * spread / 4
    hold(circuit, rows(40, 2.0), 2e-6, 1e-5, 1e-5, potential)


def test_far_apart_counts_at_extreme_logits_fall_back_by_row_and_stay_right():
    """Counts 0 and n with logits near zero: no shift shows float32 both ends when they weigh about the same."""
    n = 200
    circuit = cr.compile(cr.CountIn({0, n}), n)
    x = torch.randn(T, n, generator=torch.Generator().manual_seed(1)) * 0.3
    x[4:] -= x[4:].sum(1, keepdim=True) / n  # the two counts weigh about the same
    phi = torch.full((n + 1,), -math.inf)
    phi[[0, n]] = 0.0
    assert TorchSubset().sweep(Inputs(x, phi), None, moments=True).fallback[4:].all()
    hold(circuit, x, 2e-6, 1e-5, 1e-5)


def test_a_second_sweep_around_the_mode_mends_most_underflows():
    """Allowed counts 0, 33 and 100 where about 50 logits are positive, at scale 100: the first shift sees neither."""
    circuit = cr.compile(cr.CountIn({0, 33, 100}), 100)
    x = torch.randn(T, 100, generator=torch.Generator().manual_seed(4)) * 100
    phi = torch.full((101,), -math.inf)
    phi[[0, 33, 100]] = 0.0
    assert TorchSubset().sweep(Inputs(x, phi), None, moments=True).fallback.all()
    assert not TorchSubset().sweep_again(Inputs(x, phi), None, moments=True).fallback.any()
    assert not TorchSubset().infer(x, phi).fallback.any()
    hold(circuit, x, 2e-6, 1e-5, 1e-5)


@pytest.mark.parametrize(
    "constraint",
    [cr.Exactly(1), cr.AtMost(1), cr.Exactly(3), cr.Between(2, 5), cr.CountIn({1, 6}), cr.AtLeast(4), cr.Exactly(23)],
)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.float32, 30.0), (torch.float64, 5.0)])
def test_torch_draws_the_very_subset_the_naive_engine_draws(constraint, dtype, scale):
    circuit = cr.compile(constraint, 23)
    x = torch.randn(3000, 23, generator=torch.Generator().manual_seed(5)).to(dtype) * scale
    key = cr.random_key(11, torch.arange(3000))
    ours, truth = circuit(x).sample(key=key), circuit.with_engine("naive")(x).sample(key=key)
    assert torch.equal(ours, truth)
    assert circuit.satisfies(ours).all()
    joint = circuit(x).sample_in_sweep(key)
    assert torch.equal(joint, ours.bool())


def test_doubtful_draws_are_found_and_redrawn():
    """With these many draws some thresholds fall within the margin, so the test above exercises the redraw."""
    circuit = cr.compile(cr.Exactly(8), 64)
    x = torch.randn(20000, 64, generator=torch.Generator().manual_seed(5))
    phi = torch.full((9,), -math.inf)
    phi[8] = 0.0
    key = cr.random_key(1, torch.arange(len(x)))
    sweep = TorchSubset().sweep(Inputs(x, phi), key, moments=False)
    doubtful = sweep.uncertain
    assert 0.00005 < doubtful.double().mean() < 0.002
    sure = ~doubtful
    assert torch.equal(sweep.mask[sure], NaiveSubset().sample(x[sure], phi, key[sure]))
    assert circuit.n == 64


@pytest.mark.parametrize("engine", [NumbaSubset, TorchSubset])
def test_a_sample_alone_makes_no_moments(engine):
    """Nor does the policy: a row that underflows, and is swept again, leaves them empty, too."""
    pytest.importorskip("numba")
    x, phi = rows(8, 1.0), torch.tensor([0.0] + [-math.inf] * 7 + [0.0])
    x[6] = torch.tensor([900.0, 850.0, -860.0, -890.5, 0.0, 1.0, 2.0, -2.5])
    key = cr.random_key(4, torch.arange(T))
    alone, whole = engine().sweep(Inputs(x, phi), key, moments=False), engine().sweep(Inputs(x, phi), key, moments=True)
    assert whole.fallback[6]
    assert (len(alone.marginals), len(alone.count_probs)) == (0, 0)
    assert (len(whole.marginals), len(whole.count_probs)) == (T, T)
    for name in ("mask", "fallback", "uncertain"):
        assert torch.equal(getattr(alone, name), getattr(whole, name)), name
    assert len(engine()._settled(Inputs(x, phi), key, moments=False).marginals) == 0
    assert torch.equal(engine().sample(x, phi, key), NaiveSubset().sample(x, phi, key))


@pytest.mark.parametrize("n", [7, 64])
def test_a_row_does_not_depend_on_its_batch(n):
    circuit = cr.compile(cr.Between(2, 6), n)
    x = torch.randn(4100, n, generator=torch.Generator().manual_seed(2)) * 4
    key = cr.random_key(0, torch.arange(len(x)))
    whole = circuit(x).sample(key=key)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    assert torch.equal(circuit(x[order]).sample(key=key[order]), whole[order])
    for size in (1, 3, 1000):
        part = slice(50, 50 + size)
        assert torch.equal(circuit(x[part]).sample(key=key[part]), whole[part])


def test_the_block_size_changes_nothing(monkeypatch):
    circuit = cr.compile(cr.Exactly(3), 20)
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    key = cr.random_key(0, torch.arange(50))

    def everything():
        dist = circuit(x)
        (grad,) = torch.autograd.grad(dist.marginals.square().sum(), x)
        return dist.log_partition, dist.marginals, dist.sample(key=key), grad

    whole = everything()
    monkeypatch.setitem(eager.BLOCK_ELEMENTS, "cpu", 7 * 20)
    for a, b in zip(whole, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_infeasible_rows_are_nan_alone():
    circuit = cr.compile(cr.Exactly(3), 6)
    x = torch.randn(4, 6, requires_grad=True)
    bad = x.detach().clone()
    bad[1, :4] = math.inf
    bad[2, :4] = -math.inf
    bad.requires_grad_()
    for engine in ENGINES:
        dist = circuit.with_engine(engine)(bad, validate_args=False)
        for value in (dist.log_partition, dist.marginals, dist.count_probs):
            rows_of_nan = value.detach().reshape(4, -1).isnan()
            assert rows_of_nan.all(1).tolist() == rows_of_nan.any(1).tolist() == [False, True, True, False]
        (grad,) = torch.autograd.grad(dist.marginals[[0, 3]].square().sum() + dist.log_partition[0], bad)
        assert grad[[0, 3]].isfinite().all()


def test_unknown_and_unfit_engines_say_why():
    circuit = cr.compile(cr.Exactly(2), 6)
    with pytest.raises(cr.EngineError, match=r"no such engine; known are naive, .*torch"):
        circuit.with_engine("warp")
    with pytest.raises(cr.EngineError, match="'pyjuice' does not run circuits of op 'subset'"):
        circuit.with_engine("pyjuice")
    with pytest.raises(cr.EngineError, match="does not run circuits of op 'layered'"):
        cr.compile(cr.Exactly(2).over([0, 1, 2]), 6).with_engine("triton")
    assert circuit.with_engine("naive").with_engine("torch").engine_for("cpu") == "torch"


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (1, 6), (6,)])
def test_empty_and_single_rows(shape):
    circuit = cr.compile(cr.Exactly(2), 6)
    x = torch.zeros(shape, requires_grad=True)
    dist = circuit(x)
    assert dist.marginals.shape == shape
    assert dist.log_partition.shape == shape[:-1]
    assert dist.sample().shape == shape
    (dist.marginals.sum() + dist.log_partition.sum()).backward()
    assert x.grad.shape == shape
    torch.testing.assert_close(dist.marginals.detach(), torch.full(shape, 1 / 3))


def test_the_shift_is_finer_than_the_logits():
    """At 2^26 neighbouring float32 logits lie 8 apart; one float could not place a shift between two of them."""
    circuit = cr.compile(cr.Exactly(64), 512)
    g = torch.Generator().manual_seed(0)
    x = 2.0**26 + 8.0 * torch.randint(0, 3, (T, 512), generator=g)
    x[:, :60] += 800.0  # four of the many tied at the top of the rest are chosen
    phi = torch.full((65,), -math.inf)
    phi[64] = 0.0
    sweep = TorchSubset().sweep(Inputs(x, phi), None, moments=True)
    assert not sweep.fallback.any()
    centred = x - sweep.shift[:, None]
    assert ((torch.sigmoid(centred).sum(1) - 64).abs() < 0.5).all()
    hold(circuit, x, 2e-6, 1e-5, 1e-5)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("direction", [0.0, 1.0])
def test_the_gradient_of_large_counts_keeps_its_digits(scale, direction):
    """The sum of u over 256 chosen variables is large, its covariance with one of them small: u that adds a constant to
    all variables, too, must not cost digits."""
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * scale
    x[:, [3, 100, 400]] = math.inf
    u = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)) + direction
    allowed = np.arange(513) >= 256
    truth = count_gradient(x.double().numpy(), np.where(allowed, 0.0, -np.inf), u.double().numpy()).marginals
    for engine in ENGINES:
        logits = x.clone().requires_grad_()
        marginals = cr.compile(cr.AtLeast(256), 512).with_engine(engine)(logits).marginals
        (gradient,) = torch.autograd.grad((marginals * u).sum(), logits)
        assert np.abs(gradient.double().numpy() - truth).max() < 1e-5
