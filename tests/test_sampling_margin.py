"""The margin within which float32 does not decide a sample is at least three times the error of what it compares."""

import math

import pytest
import torch

import circuitroute as cr
from circuitroute.engines import sampling
from circuitroute.engines.subset.numba import engine as compiled
from circuitroute.engines.subset.torch import sampling as eager
from circuitroute.engines.subset.torch import sweep
from circuitroute.engines.sweep import Inputs
from circuitroute.keys import uniform
from tests.test_engines_subset import phi_of

MARGIN = sampling.MARGIN[torch.float32]
CASES = [
    (8, cr.Exactly(3), 1000),
    (64, cr.Exactly(8), 500),
    (64, cr.Between(4, 8), 500),
    (64, cr.Exactly(60), 200),
    (512, cr.Exactly(32), 60),
    (512, cr.AtMost(256), 8),
]


def logits(n, count, scale):
    """As they are, with ties, moved by 50, in two clusters, and with evidence."""
    x = torch.randn(5, count, n, generator=torch.Generator().manual_seed(n)) * scale
    x[1] = x[1].round()
    x[2] += 50
    x[3, :, ::2] -= 40
    x[4, :, 0], x[4, :, 1] = math.inf, -math.inf
    return x.reshape(-1, n)


def potential(constraint, n):
    circuit = cr.compile(constraint, n)
    return torch.as_tensor(phi_of(circuit)[: circuit.max_count + 1])


@pytest.fixture
def gaps(monkeypatch):
    """What every draw compares with zero: cumulative weights less the threshold, over the total; 1 if settled."""
    seen, at = [], []
    invert, split_level, split_pairs = eager.invert, eager._split_level, eager._split_pairs

    def seen_invert(cumulative, u, margin):
        gap = (cumulative[:-1] / cumulative[-1]).double() - u.double()
        seen.append(torch.where(at.pop() > 0, gap, 1.0) if at else gap)
        return invert(cumulative, u, margin)

    def seen_level(level, counts, u):
        at.append(counts)
        return split_level(level, counts, u)

    def seen_pairs(level, counts, u, uncertain):
        half = level.shape[1] // 2
        in_right = level[0, :half] * level[1, half:]
        total = in_right + level[1, :half] * level[0, half:]
        seen.append(torch.where(counts == 1, ((in_right - u * total) / total).double(), 1.0)[None])
        return split_pairs(level, counts, u, uncertain)

    monkeypatch.setattr(eager, "invert", seen_invert)
    monkeypatch.setattr(eager, "_split_level", seen_level)
    monkeypatch.setattr(eager, "_split_pairs", seen_pairs)
    return seen


def drawn(x, phi, key, dtype, seen):
    """(mask, gaps, underflow) of a sweep in ``dtype``."""
    seen.clear()
    block = sweep._Block.up(Inputs(x.to(dtype), phi.to(dtype)), slice(None), None)
    mask, _ = block.sample(key)
    return mask, list(seen), block.root.underflow


@pytest.mark.parametrize(("n", "constraint", "count"), CASES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0, 1e4])
def test_what_float32_compares_is_right_to_a_third_of_the_margin(n, constraint, count, scale, gaps):
    x, phi, key = logits(n, count, scale), potential(constraint, n), cr.random_key(2, torch.arange(5 * count))
    mask, found, lost = drawn(x, phi, key, torch.float32, gaps)
    truth, expected, _ = drawn(x, phi, key, torch.float64, gaps)
    alike = (mask == truth).all(1) & ~lost
    assert alike.double().mean() > 0.95
    worst = [
        (a - b)[..., alike].abs().nan_to_num().max().item() for a, b in zip(found, expected, strict=True) if a.numel()
    ]
    assert 1e-8 < max(worst) <= MARGIN / 3


def test_so_is_what_the_compiled_engine_compares(gaps, monkeypatch):
    """Its gaps are not to be seen, but which rows have one within a margin is: tried with margins of many sizes."""
    pytest.importorskip("numba")
    x, phi, key = logits(64, 2000, 1.0), potential(cr.Exactly(8), 64), cr.random_key(4, torch.arange(10000))
    mask, found, _ = drawn(x, phi, key, torch.float64, gaps)
    nearest = torch.stack([gap.abs().amin((0, 1)) for gap in found]).amin(0)
    # Where u is nearly 1, that a count's last weight is near is seen or not according to the rows beside.
    plain = (uniform(key, 0, 64, torch.float64) < 0.996).all(0)
    for margin in torch.linspace(1e-4, 3e-3, 40).tolist():
        monkeypatch.setattr(compiled, "MARGIN", {torch.float32: margin})
        swept = compiled.NumbaSubset().sweep(Inputs(x, phi.float()), key, moments=False)
        assert torch.equal(swept.mask, mask)
        unlike = plain & (swept.uncertain != (nearest <= margin))
        assert ((nearest[unlike] - margin).abs() <= MARGIN / 3).all()
        assert 0.005 < swept.uncertain.double().mean() < 0.6
