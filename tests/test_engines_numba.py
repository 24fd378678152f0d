"""The compiled CPU engine: its numerics, its samples, what it hands on to other engines, and when it is chosen.

What all engines of the count family share is tested in test_engines_subset.py, this one included.
"""

import concurrent.futures
import logging
import math
import sys
import time

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute import engines
from circuitroute.engines import compiled
from circuitroute.engines.layered.numba import engine as of_circuits
from circuitroute.engines.subset import NaiveSubset, NumbaSubset, TorchSubset
from circuitroute.engines.subset.numba import engine
from circuitroute.engines.sweep import Inputs
from circuitroute.keys import uniform
from tests.truth import count_gradient, count_truth

pytest.importorskip("numba", reason="the engine numba needs the extra 'cpu'")


def normal(T, n, scale=1.0, seed=0, dtype=torch.float32):
    return torch.randn(T, n, generator=torch.Generator().manual_seed(seed)).to(dtype) * scale


def potential_of(counts, dtype=torch.float32):
    phi = torch.full((max(counts) + 1,), -math.inf, dtype=dtype)
    phi[list(counts)] = 0.0
    return phi


# ---------------------------------------------------------------------------------------------- choice


def test_it_is_preferred_on_the_cpu_and_only_there():
    circuit = cr.compile(cr.Exactly(2), 6)
    assert circuit.engine_for("cpu") == "numba"
    assert circuit.engine_for("meta") == "torch"
    assert circuit.engine_for("cuda") != "numba"


def test_trees_too_large_for_it_are_left_to_torch(monkeypatch):
    circuit = cr.compile(cr.Exactly(2), 60)
    monkeypatch.setattr(engine, "MAX_TREE", 100)
    assert circuit.engine_for("cpu") == "torch"
    assert circuit.with_engine("numba").engine_for("cpu") == "numba"


def test_without_numba_torch_runs_and_a_forced_engine_says_what_to_install(monkeypatch):
    circuit = cr.compile(cr.Exactly(2), 6)
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.missing.cache_clear()
    try:
        assert circuit.engine_for("cpu") == "torch"
        with pytest.raises(cr.EngineError, match=r"numba is not installed; pip install 'circuitroute\[cpu\]'"):
            circuit.with_engine("numba")
    finally:
        compiled.missing.cache_clear()


def test_tensors_elsewhere_are_refused():
    with pytest.raises(cr.EngineError, match="engine='numba' runs on CPU tensors and these are on meta"):
        NumbaSubset().infer(torch.zeros(3, 6, device="meta"), potential_of([2]))


# ---------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("n", [16, 64, 128, 512])
def test_marginals_within_a_millionth_in_float32(n, scale):
    x = normal(16, n, scale, seed=n)
    x[1] = x[1].round()
    x[2] = scale
    x[3, : n // 2] += 50
    for k in {1, 4, 8, 64} & set(range(n)):
        phi = np.where(np.arange(n + 1) == k, 0.0, -np.inf)
        truth = count_truth(x.numpy(), phi)
        result = NumbaSubset().infer(x, potential_of([k]))
        np.testing.assert_allclose(result.marginals, truth.marginals, atol=1e-6, rtol=0)
        error = np.abs(result.log_partition.numpy() - truth.log_partition)
        assert (error <= 1e-5 * np.maximum(1, np.abs(truth.log_partition))).all()
        assert not result.fallback.any()


@pytest.mark.parametrize("slope", [0.0, -2.5, 4.0])
@pytest.mark.parametrize("counts", [range(257), range(20, 201)], ids=["all counts", "a range"])
def test_ranges_are_centred_where_their_weight_is(counts, slope):
    """Wherever in the range that is, with a potential that leans to one side, too: no row needs another centre."""
    x = normal(18, 256) + torch.tensor([-5.0, 0.0, 5.0]).repeat(6)[:, None]
    phi = potential_of(counts) + slope * torch.arange(max(counts) + 1)
    truth = count_truth(x.numpy(), np.pad(phi.numpy(), (0, 257 - len(phi)), constant_values=-np.inf))
    found = NumbaSubset().sweep(Inputs(x, phi), None, moments=True)
    assert not found.fallback.any()
    np.testing.assert_allclose(found.count_probs, truth.count_probs[:, : len(phi)], atol=4e-6, rtol=0)
    np.testing.assert_allclose(found.marginals, truth.marginals, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("n", "k", "rows"), [(2048, 64, 8), (4096, 256, 2)])
def test_large_circuits(n, k, rows):
    x = normal(rows, n, 2.0)
    u = normal(rows, n, seed=1)
    phi = np.where(np.isin(np.arange(n + 1), [k - 1, k]), 0.0, -np.inf)
    circuit = cr.compile(cr.Between(k - 1, k), n).with_engine("numba")
    logits = x.clone().requires_grad_()
    dist = circuit(logits)
    truth = count_truth(x.numpy(), phi)
    np.testing.assert_allclose(dist.marginals.detach(), truth.marginals, atol=2e-6, rtol=0)
    np.testing.assert_allclose(dist.count_probs.detach(), truth.count_probs[:, : k + 1], atol=4e-6, rtol=0)
    (grad,) = torch.autograd.grad(dist.marginals, logits, u)
    slopes = count_gradient(x.numpy(), phi, u.numpy(), np.zeros((rows, n + 1)))
    np.testing.assert_allclose(grad, slopes.marginals, atol=1e-5, rtol=0)
    key = cr.random_key(3, torch.arange(rows))
    ours = NumbaSubset().sample(x, potential_of([k - 1, k]), key)
    assert torch.equal(ours, TorchSubset().sample(x, potential_of([k - 1, k]), key))
    assert circuit.satisfies(ours).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_and_log_of_lanes(dtype):
    import numba

    from circuitroute.engines.subset.numba.simd import functions, lanes

    @numba.njit
    def both(x, e, log):
        for i in range(0, len(x), lanes.WIDTH):
            lanes.store(e, i, functions.exp(lanes.load(x, i)))
            lanes.store(log, i, functions.rough_log(lanes.load(e, i)))

    bits = torch.finfo(dtype).bits
    low, high = functions.EXP_LOWEST[bits], functions.EXP_HIGHEST[bits] - 1
    x = torch.linspace(low, high, lanes.WIDTH * 2000, dtype=dtype).numpy()
    e, log = np.empty_like(x), np.empty_like(x)
    both(x, e, log)
    exact = np.exp(x.astype(np.longdouble))
    assert np.abs(e / exact - 1).max() < (1.5e-7 if bits == 32 else 1e-15)
    assert np.abs(log - x).max() < 1e-5
    x = np.resize(np.array([-np.inf, np.inf, -1e4, functions.EXP_LOWEST[bits] - 1, 0, -0.0], x.dtype), lanes.WIDTH)
    e, log = np.empty_like(x), np.empty_like(x)
    both(x, e, log)
    assert e[:6].tolist() == [0, e[1], 0, 0, 1, 1]
    assert np.isfinite(e[1])


def test_rows_that_underflow_go_through_torch_and_are_flagged():
    """Counts 0 and n at logits near zero, of about the same weight: no shift shows float32 both ends."""
    n = 200
    x = normal(6, n, 0.3)
    x[2:] -= x[2:].sum(1, keepdim=True) / n
    phi, key = potential_of([0, n]), cr.random_key(0, torch.arange(6))
    assert NumbaSubset().sweep(Inputs(x, phi), None, moments=True).fallback[2:].all()
    ours, theirs = NumbaSubset().infer(x, phi, key), TorchSubset().infer(x, phi, key)
    assert ours.fallback is not None
    assert torch.equal(ours.fallback, theirs.fallback)
    assert ours.fallback.any()
    truth = count_truth(x.numpy(), phi.double().numpy())
    np.testing.assert_allclose(ours.marginals, truth.marginals, atol=1e-6, rtol=0)
    assert torch.equal(ours.mask, NaiveSubset().sample(x, phi, key))
    assert torch.equal(NumbaSubset().sample(x, phi, key), ours.mask)
    u = normal(6, n, seed=1)
    slopes = count_gradient(x.numpy(), phi.double().numpy(), u.numpy(), np.zeros((6, n + 1)))
    dm, dq = NumbaSubset().second_derivative(x, phi, ours, u, None)
    np.testing.assert_allclose(dm, slopes.marginals, atol=1e-5, rtol=0)
    np.testing.assert_allclose(dq, slopes.count_probs, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "counts"), [(1, [0, 1]), (2, [1]), (7, [3]), (40, [0, 2, 9, 40]), (130, [12]), (65, [1])]
)
def test_samples_are_those_of_the_naive_engine(n, counts, dtype):
    x, phi = normal(1500, n, 2.0, dtype=dtype), potential_of(counts, dtype)
    key = cr.random_key(5, torch.arange(len(x)))
    truth = NaiveSubset().sample(x, phi, key)
    assert torch.equal(NumbaSubset().sample(x, phi, key), truth)
    assert torch.equal(NumbaSubset().infer(x, phi, key).mask, truth)


def test_doubtful_draws_are_found_and_redrawn():
    x, phi, key = normal(20000, 64, seed=5), potential_of([8]), cr.random_key(1, torch.arange(20000))
    sweep = NumbaSubset().sweep(Inputs(x, phi), key, moments=False)
    assert 0.00005 < sweep.uncertain.double().mean() < 0.002
    truth = NaiveSubset().sample(x, phi, key)
    assert torch.equal(sweep.mask[~sweep.uncertain], truth[~sweep.uncertain])
    assert torch.equal(NumbaSubset().sample(x, phi, key), truth)


def test_draws_that_float64_leaves_in_doubt_are_the_naive_engines(monkeypatch):
    x, phi, key = normal(500, 12), potential_of([3]), cr.random_key(1, torch.arange(500))
    monkeypatch.setattr(engine, "MARGIN", {torch.float32: 0.05, torch.float64: 0.05})
    asked = []
    naive = NaiveSubset.sample
    monkeypatch.setattr(NaiveSubset, "sample", lambda self, *rows: asked.append(len(rows[0])) or naive(self, *rows))
    assert torch.equal(NumbaSubset().sample(x, phi, key), naive(NaiveSubset(), x, phi, key))
    assert asked
    assert 0 < asked[0] < 500


def test_uniforms_are_those_of_keys():
    import numba

    from circuitroute.engines.subset.numba import sampling
    from circuitroute.engines.subset.numba.simd import lanes

    @numba.njit
    def draw(key, words, out):
        for lane in range(lanes.WIDTH):
            words[lane], words[lanes.WIDTH + lane] = sampling.mix64(key[lane])
        low, high = lanes.load(words, 0), lanes.load(words, lanes.WIDTH)
        for number in range(len(out) // lanes.WIDTH):
            lanes.store(out, number * lanes.WIDTH, sampling.uniform(out, low, high, number))

    key = cr.random_key(7, torch.arange(lanes.WIDTH))
    out = np.empty((100, lanes.WIDTH))
    draw(key.numpy(), np.empty(2 * lanes.WIDTH, np.int32), out.reshape(-1))
    assert np.array_equal(out, uniform(key, 0, 100, torch.float64).numpy())


# ---------------------------------------------------------------------------------------------- batches and threads


def everything(x, key, circuit):
    logits = x.clone().requires_grad_()
    dist = circuit(logits)
    mask = dist.sample_in_sweep(key)
    (grad,) = torch.autograd.grad(dist.marginals.square().sum() + dist.count_probs.square().sum(), logits)
    return [dist.log_partition.detach(), dist.marginals.detach(), dist.count_probs.detach(), mask, grad]


def test_the_number_of_threads_changes_nothing():
    circuit = cr.compile(cr.Between(2, 6), 64).with_engine("numba")
    x, key = normal(1003, 64, 3.0), cr.random_key(0, torch.arange(1003))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(x, key, circuit))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def parts_of(T, monkeypatch):
    """The rows that eight threads get, in order."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(compiled, "_READY", {("kernel", "float32")})
    parts = []

    def kernel(rows, *_):
        parts.append(rows)

    engine._in_threads(kernel, engine._Arrays.of(Inputs(normal(T, 4096), potential_of([1]))), ())
    return sorted(parts)


def test_threads_get_whole_blocks(monkeypatch):
    """Part of a block costs what a whole one costs: no thread starts in the middle of one."""
    width = compiled.width()
    for T in (1, width, width + 1, 5 * width - 3, 40 * width):
        parts = parts_of(T, monkeypatch)
        assert [start for start, _ in parts] + [T] == [0] + [stop for _, stop in parts]
        assert all(start % width == 0 for start, _ in parts)
        assert len(parts) == min(8, math.ceil(T / width))


def test_trees_of_all_threads_keep_to_a_limit(monkeypatch):
    numbers = engine._numbers(engine._shape(4096, 1))
    for limit, threads in ((3 * numbers, 3), (numbers - 1, 1)):
        monkeypatch.setattr(compiled, "MAX_NUMBERS", limit)
        assert len(parts_of(640, monkeypatch)) == threads


def test_a_row_depends_on_no_other_row():
    circuit = cr.compile(cr.CountIn({1, 4}), 21).with_engine("numba")
    x, key = normal(50, 21, 4.0), cr.random_key(0, torch.arange(50))
    x[7, :3], x[8] = math.inf, 1e4 * x[8]
    whole = everything(x, key, circuit)
    for rows in (slice(7, 8), slice(3, 20), slice(8, 50)):
        for a, b in zip(whole, everything(x[rows], key[rows], circuit), strict=True):
            assert torch.equal(a[rows], b)


def test_callers_threads_may_share_it():
    circuit = cr.compile(cr.Exactly(4), 32).with_engine("numba")
    x, key = normal(600, 32), cr.random_key(0, torch.arange(600))
    whole = everything(x, key, circuit)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: everything(x, key, circuit), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(whole, result, strict=True))


def test_layouts_and_modes_of_torch():
    circuit = cr.compile(cr.Exactly(3), 10).with_engine("numba")
    x = normal(6, 10)
    marginals = circuit(x).marginals
    assert torch.equal(circuit(x.t().contiguous().t()).marginals, marginals)
    assert torch.equal(circuit(x.repeat(1, 2)[:, :10]).marginals, marginals)
    with torch.inference_mode():
        assert torch.equal(circuit(x.clone()).marginals, marginals)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(circuit(x).marginals, marginals)
        logits = x.clone().requires_grad_()
        circuit(logits).marginals.sum(0)[0].backward()  # an upstream gradient that is expanded, not contiguous
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- compiling


def test_warmup_compiles_all_there_is():
    engines.warmup()
    kernels, circuits = engine._kernels(), of_circuits._kernels()
    for kernel in (kernels.forward, kernels.second_derivative, circuits.forward, circuits.derivative):
        assert len(kernel.signatures) == 2
    assert len(of_circuits._mode_kernel().signatures) == 1
    steps = engine._step_kernels()
    for kernel in (steps.step, steps.step_marginals, engine._gradient_kernel()):
        assert [signature[2].dtype.name for signature in kernel.signatures] == ["float32"]


def test_slow_compiling_is_told(monkeypatch, caplog):
    kernel = engine._kernels().forward
    compiled.compile_now(kernel, lambda rows: None)
    assert not caplog.records
    monkeypatch.setattr(compiled, "SLOW_SECONDS", 0.0)
    compiled.compile_now(kernel, lambda rows: time.sleep(0.5))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("compiling the numba kernel 'forward'")


def test_nowhere_to_keep_kernels_is_told(monkeypatch, caplog):
    sweep = engine._kernels()

    def fail(self):
        raise RuntimeError("cannot cache function 'f': no locator available for file 'sweep.py'")

    monkeypatch.setattr(type(sweep.forward), "enable_caching", fail)
    with caplog.at_level(logging.INFO, logger="circuitroute"):
        assert sweep.kernel(lambda x: x)(3) == 3
    assert "no locator available for file 'sweep.py': compiled kernels last for this process only" in caplog.text


def test_the_cache_on_disk_knows_every_source():
    """Numba looks at the file of a cached function only; the digest of all of them is one of its constants."""
    sweep = engine._kernels()
    assert {"sweep.py", "tree.py", "lanes.py", "polynomials.py"} <= {path.name for path in sweep.sources()}
    for kernel in (sweep.forward, sweep.second_derivative):
        assert [cell.cell_contents for cell in kernel.py_func.__closure__] == [sweep.source_digest()]
