"""The engine ``triton``: on a GPU where there is one, else under Triton's interpreter (see ``conftest.py``).

Interpreted kernels are slow, and their time goes by operations rather than rows: few shapes, many rows each.
Bounds as for the engine ``torch``: marginals 1e-6, gradients of marginals 1e-5, log Z 1e-5 relative.
"""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.engines import Inference, choose
from circuitroute.engines.subset import NaiveSubset, TorchSubset, TritonSubset
from circuitroute.engines.subset.triton import engine as fused
from circuitroute.engines.sweep import Inputs
from tests.test_engines_subset import evidence_rows, phi_of
from tests.truth import count_gradient, count_truth

pytest.importorskip("triton", minversion="3.3")

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rows of one program, without which the interpreter would take minutes: it charges by program.
WIDE = 64 if DEVICE.type == "cpu" else fused.WARPS


def rows(n, scales=(0.1, 1.0, 10.0, 100.0, 1e4), seed=0):
    """Logits at all scales, with ties, offsets of +-50 and equal values."""
    g = torch.Generator().manual_seed(seed + n)
    x = torch.randn(len(scales), 5, n, generator=g) * torch.tensor(scales)[:, None, None]
    x[:, 1] = x[:, 1].round()
    x[:, 2] += 50
    x[:, 3] -= 50
    x[:, 4, : n // 2] = x[:, 4, :1]
    return x.reshape(-1, n)


def hold(circuit, x, potential=None, bound=1e-6):
    """All outputs and gradients at logits ``x`` against the dynamic program; returns the sweep."""
    phi = phi_of(circuit)
    phi = phi[None].repeat(len(x), 0)
    J = circuit.max_count + 1
    if potential is not None:
        phi[:, :J] += potential.double().numpy()
    truth = count_truth(x.numpy(), phi)
    g = torch.Generator().manual_seed(7)
    u, v = torch.randn(x.shape, generator=g), torch.randn(len(x), J, generator=g)
    logits = x.to(DEVICE, copy=True).requires_grad_()
    shared = torch.zeros(len(x), J) if potential is None else potential.clone()
    shared = shared.to(DEVICE).requires_grad_()
    dist = circuit.with_engine("triton")(logits, shared)
    near(dist.marginals, truth.marginals, bound)
    near(dist.count_probs, truth.count_probs[:, :J], 2 * bound)
    error = np.abs(dist.log_partition.detach().cpu().numpy() - truth.log_partition)
    assert (error / np.maximum(1, np.abs(truth.log_partition))).max() <= 1e-5
    slopes = count_gradient(x.numpy(), phi, u.numpy(), np.pad(v.numpy(), ((0, 0), (0, circuit.n + 1 - J))))
    inner = (dist.marginals * u.to(DEVICE)).sum() + (dist.count_probs * v.to(DEVICE)).sum()
    by_logits, by_phi = torch.autograd.grad(inner, (logits, shared))
    near(by_logits, slopes.marginals, 1e-5)
    near(by_phi, slopes.count_probs[:, :J], 1e-5)
    return dist._infer()


def near(found, expected, bound):
    np.testing.assert_allclose(found.detach().cpu().numpy(), expected, atol=bound, rtol=0)


def same_samples(circuit, x, seed=3):
    """The samples of ``x`` are the naive engine's; returns the sweep that drew them."""
    key = cr.random_key(seed, torch.arange(len(x), device=DEVICE))
    x = x.to(DEVICE)
    dist = circuit.with_engine("triton")(x)
    joint = dist.sample_in_sweep(key)
    expected = circuit.with_engine("naive")(x).sample(key=key).bool()
    assert torch.equal(joint, expected)
    assert circuit.satisfies(joint).all()
    return dist._infer(key.reshape(-1))


@pytest.fixture
def in_memory(monkeypatch):
    """Every row goes to the kernel of one row per program."""
    monkeypatch.setattr(fused, "MAX_LANES_COUNT", -1)


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(fused, "WARPS", WIDE)


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("n", "constraint"),
    [
        (1, cr.AtMost(1)),
        (5, cr.CountIn({0, 1, 4})),
        (7, cr.Exactly(0)),
        (8, cr.Exactly(8)),
        (16, cr.Between(2, 4)),
        (60, cr.Exactly(8)),
    ],
)
def test_lanes(n, constraint, wide):
    circuit = cr.compile(constraint, n)
    assert fused.lanes_fit(circuit.n, circuit.max_count)
    x = rows(n) if constraint != cr.CountIn({0, 1, 4}) else rows(n, (0.1, 1.0, 10.0))
    sweep = hold(circuit, x)
    assert isinstance(sweep, fused.Sweep)


@pytest.mark.parametrize(("n", "k", "slots"), [(2, 1, 4), (2, 2, 4), (3, 3, 1), (5, 2, 1), (9, 7, 4), (20, 4, 2)])
def test_one_count_alone_is_less_to_do(n, k, slots, monkeypatch, wide):
    """The root has one coefficient: within a lane, across lanes, with siblings of fewer coefficients than it wants."""
    monkeypatch.setattr(fused, "FEW_LANE_SLOTS", slots)
    monkeypatch.setattr(fused, "DUAL_LANE_SLOTS", slots)
    x = rows(n, (1.0, 30.0))
    x[0, 0], x[1, -1] = math.inf, -math.inf
    x, key = x.to(DEVICE), cr.random_key(2, torch.arange(len(x), device=DEVICE))
    phi = torch.full((k + 1,), -math.inf, device=DEVICE)
    phi[k] = 0.5
    found = []
    for engine in (TritonSubset(), TritonSubset(exact=True)):
        swept = engine.infer(x, phi, key)
        found.append((swept, engine.second_derivative(x, phi, swept, x.nan_to_num(0, 0, 0), None)))
    (general, slopes), (one, slopes_of_one) = found
    assert torch.equal(one.mask, general.mask)
    assert torch.equal(one.fallback, general.fallback)
    torch.testing.assert_close(one.log_partition, general.log_partition, equal_nan=True)
    for a, b in ((one, general), (slopes_of_one, slopes)):
        a, b = ((y.marginals, y.count_probs) if isinstance(y, fused.Sweep) else y for y in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, equal_nan=True)


def test_the_circuit_says_whether_one_count_is_allowed(monkeypatch):
    flags, run = [], fused._Problem._run

    def spied(problem, kernel, programs, arguments, constants):
        flags.append(constants.get("EXACT"))
        run(problem, kernel, programs, arguments, constants)

    monkeypatch.setattr(fused._Problem, "_run", spied)
    x = torch.zeros(1, 3, device=DEVICE)
    for constraint, expected in ((cr.Exactly(2), True), (cr.AtMost(2), False), (cr.Exactly(0), False)):
        flags.clear()
        assert cr.compile(constraint, 3).with_engine("triton")(x).marginals.isfinite().all()
        assert flags == [expected, None]


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_lanes_of_any_width(slots, monkeypatch, wide):
    """A row of 20 in 16, in 8 and in 2 lanes: their nodes are not the lanes' own numbers."""
    monkeypatch.setattr(fused, "FEW_LANE_SLOTS", slots)
    monkeypatch.setattr(fused, "DUAL_LANE_SLOTS", slots)
    circuit = cr.compile(cr.Exactly(4), 20)
    x = rows(20, (1.0, 30.0))
    hold(circuit, x)
    same_samples(circuit, x)


def test_rows_in_memory(in_memory):
    hold(cr.compile(cr.Between(1, 3), 9), rows(9, (1.0, 1e4))[::4])


def test_counts_beyond_the_lanes():
    circuit = cr.compile(cr.Exactly(17), 21)
    assert not fused.lanes_fit(circuit.n, circuit.max_count)
    hold(circuit, rows(21, (2.0,))[:1])


def test_potentials_per_token(wide):
    g = torch.Generator().manual_seed(3)
    spread = torch.tensor([0.5, 5.0, 60.0]).repeat_interleave(4)[:, None]
    potential = torch.randn(12, 7, generator=g) * spread
    potential[0, 2:5] = -math.inf
    potential[1, :6] = -math.inf
    potential[2] = torch.arange(7) * 3.0
    hold(cr.compile(cr.AtMost(6), 20), rows(20, (2.0,), seed=1)[:1].repeat(12, 1), potential)


@pytest.mark.parametrize(("slope", "offset"), [(0.0, 2.0), (10.0, -10.0), (-10.0, 10.0)])
def test_ranges_are_centred_where_their_weight_is(slope, offset, wide):
    """Also where a potential pulls to one side what logits pull to the other: float32 loses nothing, at any place."""
    x = rows(40, (1.0,))[[0, 1, 4]] + offset
    sweep = hold(cr.compile(cr.AtMost(16), 40), x, (slope * torch.arange(17.0)).repeat(3, 1))
    assert not sweep.fallback.any()
    assert int(sweep.length) == 0


def test_evidence(wide):
    circuit = cr.compile(cr.Exactly(3), 8)
    sweep = hold(circuit, evidence_rows(8, 3))
    assert not sweep.fallback.any()
    assert (sweep.marginals[evidence_rows(8, 3) == -math.inf] == 0).all()


@pytest.mark.parametrize(
    ("constraint", "forced"), [(cr.Exactly(16), 0), (cr.Between(4, 16), 0), (cr.AtLeast(32), 3)], ids=repr
)
def test_gradients_of_large_counts_keep_their_digits(constraint, forced, wide):
    """What all variables have in common of u changes the count alone: its large sums must leave nothing behind."""
    circuit, g = cr.compile(constraint, 64), torch.Generator().manual_seed(1)
    x = torch.randn(2 if forced else 20, 64, generator=g)
    x[:, :forced] = math.inf
    u = torch.randn(x.shape, generator=g) + 8
    logits = x.to(DEVICE, copy=True).requires_grad_()
    found = torch.autograd.grad((circuit.with_engine("triton")(logits).marginals * u.to(DEVICE)).sum(), logits)[0]
    expected = count_gradient(x.numpy(), phi_of(circuit)[None].repeat(len(x), 0), u.numpy(), np.zeros((len(x), 65)))
    near(found, expected.marginals, 1e-5)


# ---------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(("n", "constraint", "count"), [(23, cr.Between(2, 5), 250), (64, cr.Exactly(8), 60)])
def test_the_very_subset_the_naive_engine_draws(n, constraint, count, wide):
    x = torch.randn(count, n, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.1, 20, count)[:, None]
    same_samples(cr.compile(constraint, n), x)


def test_doubtful_draws_are_found_and_redrawn_in_float64(wide):
    """They are rare: some that are in doubt for the engine ``torch``, among others."""
    x, phi = torch.randn(300000, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([-math.inf] * 3 + [0.0])
    key = cr.random_key(3, torch.arange(len(x)))
    doubtful = TorchSubset().sweep(Inputs(x, phi), key, moments=False).uncertain.nonzero()[:, 0]
    assert 3 < len(doubtful) < 100
    doubtful = doubtful[:3]  # each takes the interpreter a while
    some = torch.cat([doubtful, torch.arange(300)])
    x, phi, key = (value.to(DEVICE) for value in (x[some], phi, key[some]))
    sweep = TritonSubset().infer(x, phi, key)
    assert not sweep.fallback.any()
    found = sweep.todo[: int(sweep.length)].tolist()
    assert set(range(len(doubtful))) - set(found) == set()
    assert len(set(found)) == len(found) < len(doubtful) + 10
    assert torch.equal(sweep.mask, NaiveSubset().sample(x, phi, key))


def test_doubt_in_one_lane_alone_is_found(monkeypatch, wide):
    """A row in as many lanes as can be, of which a split near the leaves concerns a few."""
    monkeypatch.setattr(fused, "FEW_LANE_SLOTS", 1)
    x, phi = torch.randn(300000, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([-math.inf] * 3 + [0.0])
    key = cr.random_key(3, torch.arange(len(x)))
    some = TorchSubset().sweep(Inputs(x, phi), key, moments=False).uncertain.nonzero()[:10, 0]
    x, phi, key = (value.to(DEVICE) for value in (x[some], phi, key[some]))
    sweep = TritonSubset().infer(x, phi, key)
    assert sorted(sweep.todo[: int(sweep.length)].tolist()) == list(range(len(some)))
    assert torch.equal(sweep.mask, NaiveSubset().sample(x, phi, key))


def test_samples_in_memory(in_memory):
    same_samples(cr.compile(cr.Between(1, 3), 5), rows(5, (3.0,))[:3])


def test_sampling_alone_draws_the_same(wide):
    circuit = cr.compile(cr.AtMost(3), 10).with_engine("triton")
    x, key = rows(10, (1.0, 5.0)).to(DEVICE), cr.random_key(1, torch.arange(10, device=DEVICE))
    assert torch.equal(circuit(x).sample(key=key).bool(), circuit(x).sample_in_sweep(key))


def test_rows_of_large_batches_are_in_fewer_lanes(wide):
    """Sums are in another order there: the last bits may differ, samples may not."""
    assert [fused.lane_shape(64, 9, False, T)["LE"] for T in (1, 8191, 8192)] == [3, 3, 4]
    assert fused.lane_shape(512, 9, False, 1) == fused.lane_shape(512, 9, False)
    T = fused.MANY_TOKENS
    x = torch.randn(T, 11, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    key, phi = cr.random_key(0, torch.arange(T, device=DEVICE)), torch.zeros(3, device=DEVICE)
    few = slice(100, 140)
    whole, part = TritonSubset().infer(x, phi, key), TritonSubset().infer(x[few], phi, key[few])
    assert torch.equal(whole.mask[few], part.mask)
    torch.testing.assert_close(whole.marginals[few], part.marginals, rtol=0, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch(wide):
    circuit = cr.compile(cr.Exactly(2), 6).with_engine("triton")
    x = rows(6, (1.0, 30.0)).to(DEVICE)
    key = cr.random_key(0, torch.arange(10, device=DEVICE))
    whole, part = circuit(x), circuit(x[3:5])
    assert torch.equal(whole.sample_in_sweep(key)[3:5], part.sample_in_sweep(key[3:5]))
    assert torch.equal(whole.marginals[3:5], part.marginals)


# ---------------------------------------------------------------------------------------------- rows float32 loses


def far_apart(scale):
    return [90.0 * scale, 60.0 * scale, -70.0 * scale, -80.0 * scale - 0.5]


@pytest.mark.parametrize("where", ["lanes", "memory"])
def test_far_apart_counts_are_swept_again(where, request):
    """Counts 0 and n weigh about the same, and no shift shows float32 both, nor float64 where they are very far."""
    if where == "memory":
        request.getfixturevalue("in_memory")
    n = 4
    circuit = cr.compile(cr.CountIn({0, n}), n)
    x = torch.tensor([*map(far_apart, (1.0, 1.5, 10.0, 100.0)), [0.3, -0.2, 1.0, 0.0]])
    sweep = hold(circuit, x)
    assert sweep.fallback[:4].all()
    assert {0, 1, 2, 3} <= set(sweep.todo[: int(sweep.length)].tolist())
    same_samples(circuit, x)


def test_far_apart_counts_keep_their_evidence():
    """One variable is forced and two are excluded, beside those of the test above: float64, then log space, know it."""
    circuit = cr.compile(cr.CountIn({1, 5}), 7)
    far = [[-math.inf, *each[:2], math.inf, -math.inf, *each[2:]] for each in map(far_apart, (1.5, 100.0))]
    x = torch.tensor([*far, [-math.inf] + [0.25] * 5 + [math.inf]])
    sweep = hold(circuit, x)
    assert sweep.fallback[:2].all()
    assert sweep.marginals[:2, [0, 3, 4]].tolist() == [[0.0, 1.0, 0.0]] * 2
    same_samples(circuit, x)


def test_samples_in_log_space():
    """Counts 1 and 5 of 6, about equally likely, and each a choice among subsets: all of it lost to float64."""
    circuit = cr.compile(cr.CountIn({1, 5}), 6)
    x = torch.tensor([9000.0, 9000.5, 8999.5, -9000.0, -9001.0, -8999.5])[None].repeat(8, 1)
    sweep = same_samples(circuit, x)
    assert sweep.fallback.all()
    assert len({tuple(mask) for mask in sweep.mask.tolist()}) > 3
    assert sorted(set(sweep.mask.sum(-1).tolist())) == [1, 5]


def test_infeasible_rows_are_nan_alone():
    circuit = cr.compile(cr.Exactly(3), 6)
    x = torch.randn(3, 6)
    x[1, :4] = math.inf
    x = x.to(DEVICE, copy=True).requires_grad_()
    dist = circuit.with_engine("triton")(x, validate_args=False)
    for value in (dist.log_partition, dist.marginals, dist.count_probs):
        of_nan = value.detach().reshape(3, -1).isnan()
        assert of_nan.all(1).tolist() == of_nan.any(1).tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(dist.marginals[[0, 2]].square().sum() + dist.log_partition[0], x)
    assert grad[[0, 2]].isfinite().all()
    engine, phi = TritonSubset(), torch.tensor([-math.inf] * 3 + [0.0], device=DEVICE)
    assert not engine.sample(x.detach(), phi, torch.arange(3, device=DEVICE))[1].any()


# ---------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_as_they_are(dtype, wide):
    x, phi = rows(8, (1.0, 5.0)).to(DEVICE, dtype), torch.tensor([0.0, 0.0, 0.0], device=DEVICE)
    found, expected = TritonSubset().infer(x, phi), TritonSubset().infer(x.float(), phi)
    assert found.marginals.dtype == torch.float32
    assert torch.equal(found.marginals, expected.marginals)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(TritonSubset().attach(found, leaf, phi).marginals[:, 0].sum(), leaf)
    assert grad.dtype == dtype


def test_strided_rows_and_no_rows(wide):
    engine, phi = TritonSubset(), torch.tensor([-math.inf, -math.inf, 0.0], device=DEVICE)
    x = rows(6, (1.0,)).to(DEVICE)
    assert torch.equal(engine.infer(x.t().contiguous().t(), phi).marginals, engine.infer(x, phi).marginals)
    empty = torch.zeros(0, 6, device=DEVICE, requires_grad=True)
    result = engine.attach(engine.infer(empty, phi), empty, phi)
    result.marginals.sum().backward()
    assert result.marginals.shape == empty.grad.shape == (0, 6)
    assert engine.sample(empty, phi, torch.zeros(0, dtype=torch.int64, device=DEVICE)).shape == (0, 6)


def test_slices_at_odd_addresses(wide):
    """They are read at addresses that 16 divides, from a copy."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    key = cr.random_key(1, torch.arange(4, device=DEVICE))
    phi = torch.tensor([0.0, 0.5, 0.25], device=DEVICE)
    engine, whole = TritonSubset(), TritonSubset().infer(x[1:].clone(), phi[1:].clone(), key[1:].clone())
    part = engine.infer(x[1:], phi[1:], key[1:])
    for name in ("log_partition", "marginals", "count_probs", "mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)), name


def test_gradients_need_only_the_marks(wide):
    """Operators hand on tensors only: the list of rows is made again from what is marked."""
    engine = TritonSubset()
    phi = torch.tensor([0.0] + [-math.inf] * 4 + [0.0], device=DEVICE)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x[1] = (x[1] - x[1].mean()) * 100
    sweep = engine.infer(x, phi)
    assert sweep.fallback.tolist() == [False, True, False, False]
    plain = Inference(**{name: getattr(sweep, name) for name in Inference.__dataclass_fields__})
    for a, b in zip(
        engine.second_derivative(x, phi, plain, x, None), engine.second_derivative(x, phi, sweep, x, None), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="this one has no marks"):
        engine.second_derivative(x, phi, dataclasses.replace(plain, fallback=None), x, None)


def test_float64_is_for_the_torch_engine():
    x, phi = torch.randn(3, 6, dtype=torch.float64, device=DEVICE), torch.zeros(3, dtype=torch.float64, device=DEVICE)
    key = torch.arange(3, device=DEVICE)
    found, expected = TritonSubset().infer(x, phi, key), TorchSubset().infer(x, phi, key)
    assert not isinstance(found, fused.Sweep)
    assert torch.equal(found.marginals, expected.marginals)
    assert torch.equal(TritonSubset().sample(x, phi, key), expected.mask)
    slopes = TritonSubset().second_derivative(x, phi, found, x, None)
    assert torch.equal(slopes[0], TorchSubset().second_derivative(x, phi, expected, x, None)[0])


def test_second_gradients_go_through_the_naive_engine(wide):
    circuit = cr.compile(cr.Exactly(2), 5)
    x, u = torch.randn(2, 5, device=DEVICE, requires_grad=True), torch.randn(2, 5, device=DEVICE)
    results = []
    for engine in ("triton", "naive"):
        (grad,) = torch.autograd.grad(circuit.with_engine(engine)(x).marginals.mul(u).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("trees", [2, 4])
def test_large_trees_have_fewer_programs(trees, log):
    """The largest circuit keeps to the limit, where all programs would not; a small one has them all."""
    values, width = trees * fused.row_shape(4096, 65)["SIZE"], 8 if log else 4
    programs = fused.row_programs(values, log)
    assert programs > 100
    assert programs * values * width <= fused.MAX_SCRATCH
    assert fused.row_programs(trees * fused.row_shape(64, 9)["SIZE"], log) == (
        fused.LIST_PROGRAMS if log else fused.ROW_PROGRAMS
    )


# ---------------------------------------------------------------------------------------------- choice and refusal


def test_it_is_preferred_on_cuda_within_its_limits():
    cuda = torch.device("cuda")
    assert choose(cr.compile(cr.Exactly(8), 64), cuda) == "triton"
    assert choose(cr.compile(cr.Exactly(64), 512), cuda) == "triton"
    assert choose(cr.compile(cr.Exactly(65), 512), cuda) == "torch"
    assert choose(cr.compile(cr.Exactly(2), fused.MAX_VARIABLES + 1), cuda) == "torch"
    assert choose(cr.compile(cr.Exactly(8), 64), torch.device("cpu")) != "triton"


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [("6.4", (9, 4), "this build of torch is for ROCm"), (None, (7, 5), "capability 8.0, and the GPU has 7.5")],
)
def test_gpus_that_cannot_run_the_kernels_get_the_torch_engine(monkeypatch, hip, capability, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    circuit = cr.compile(cr.Exactly(2), 6)
    fused.unfit.cache_clear()
    try:
        assert choose(circuit, torch.device("cuda")) == "torch"
        with pytest.raises(cr.EngineError, match=rf"engine='triton' cannot run here: .*{reason}"):
            circuit.with_engine("triton")
        fused.unfit.cache_clear()
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        assert choose(circuit, torch.device("cuda")) == "triton"
        assert circuit.with_engine("triton").engine == "triton"
    finally:
        fused.unfit.cache_clear()


def test_refusals_say_why(monkeypatch):
    with pytest.raises(cr.EngineError, match=r"does not run Exactly\(65\): it takes counts up to 64"):
        cr.compile(cr.Exactly(65), 100).with_engine("triton")
    with pytest.raises(cr.EngineError, match="it takes up to 4096 variables, the circuit has 4097"):
        cr.compile(cr.Exactly(2), 4097).with_engine("triton")
    with pytest.raises(cr.EngineError, match="cannot run this: it takes counts up to 64"):
        TritonSubset().infer(torch.zeros(1, 80), torch.zeros(80))
    monkeypatch.setattr(fused, "installed", lambda: False)
    assert choose(cr.compile(cr.Exactly(8), 64), torch.device("cpu")) != "triton"
    with pytest.raises(cr.EngineError, match="cannot run here: triton is not installed"):
        cr.compile(cr.Exactly(2), 6).with_engine("triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(cr.EngineError, match=r"cannot run here: it needs a CUDA GPU.*TRITON_INTERPRET=1"):
        cr.compile(cr.Exactly(2), 6).with_engine("triton")
    monkeypatch.setattr(fused, "interpreter_runs", lambda: False)
    with pytest.raises(cr.EngineError, match="got tensors on cpu: it takes CUDA tensors"):
        TritonSubset().infer(torch.zeros(1, 6), torch.zeros(3))


def test_kernels_and_library_must_agree_on_the_interpreter(monkeypatch):
    import triton

    other = object.__new__(triton.JITFunction) if fused.interpreter_runs() else (lambda x: x)
    monkeypatch.setattr(fused, "_kernel", lambda: other)
    with pytest.raises(cr.EngineError, match="TRITON_INTERPRET was changed after triton was imported; set it before"):
        TritonSubset().infer(torch.zeros(1, 6), torch.zeros(3))


def test_the_interpreter_must_be_chosen_before_triton_is_imported():
    program = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import triton.language
os.environ["TRITON_INTERPRET"] = "1"
import circuitroute as cr, torch
circuit = cr.compile(cr.Exactly(2), 6).with_engine("triton")
try:
    circuit(torch.zeros(1, 6)).marginals
except cr.EngineError as error:
    print(error)
"""
    done = _python("-c", program)
    assert "TRITON_INTERPRET was changed after triton was imported" in done.stdout, done.stderr


def test_kernels_compile_ahead_of_time(tmp_path):
    """For a GPU that need not be there; the smallest case stands for all."""
    out = tmp_path / "rows.jsonl"
    case = ["--sizes", "2:1", "--kinds", "forward,backward", "--targets", "90"]
    done = _python("-m", "benchmarks.aot", *case, "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["kernel"] for row in found} == {
        f"{where}.{kind}" for where in ("registers", "memory") for kind in ("forward", "backward")
    }
    assert all(row["registers"] > 0 and row["instructions"] > 0 for row in found)
    assert all(row["predicted"] is True for row in found if "predicted_us" in row)


def _python(*arguments):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "compilers")])
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_naive_moments_are_the_naive_engines():
    x, phi = torch.randn(2, 4, device=DEVICE), torch.zeros(3, device=DEVICE)
    for found, expected in zip(TritonSubset().naive_moments(x, phi), NaiveSubset().moments(x, phi), strict=True):
        assert torch.equal(found, expected)


def test_constants_of_kernels_equal_themselves():
    """Triton compares the globals that a kernel captured at every launch: NaN would make each of them fail."""
    from triton.language import constexpr

    from circuitroute.engines.subset import triton as kernels

    modules = [
        importlib.import_module(f"{kernels.__name__}.{path.stem}")
        for path in Path(kernels.__path__[0]).glob("[!_]*.py")
    ]
    constants = [
        (module.__name__, name, found.value)
        for module in modules
        for name, found in vars(module).items()
        if isinstance(found, constexpr)
    ]
    assert len(constants) > 5
    assert [constant for constant in constants if constant[-1] != constant[-1]] == []
