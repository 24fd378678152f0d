"""The unrolled mode decides as the engines do, ties included; and ties are decided alike whatever the logits' scale.

The unrolled sample is the one that the engines draw.
"""

import math

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.engines.layered import NaiveLayered, evaluated
from circuitroute.engines.layered.torch import unrolled
from circuitroute.engines.layered.torch.sampling import first
from circuitroute.engines.layered.torch.unrolled import UnrolledMode
from circuitroute.engines.layered.torch.unrolled_sampling import UnrolledSample
from circuitroute.engines.subset import NaiveSubset, NumbaSubset, TorchSubset
from circuitroute.engines.subset.unrolled import UnrolledCount, products

x = cr.variables(12)
CONSTRAINTS = {
    "groups": (cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3), 12),
    "range": (cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Between(0, 4), 12),
    "logic": (cr.Logic((x[3] >> x[5]) & ~(x[0] & x[11])), 12),
    "cost": (cr.Cost(range(1, 13), at_most=20) & cr.AtLeast(2), 12),
    "each": (cr.EachGroup(cr.Groups(3), cr.CountIn({0, 2})), 12),
    "literal": (cr.Exactly(1).over([4]), 6),
    "deep": (cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8), 64),
}


def logits_of(n, seed=0, dtype=torch.float32, rows=200):
    """With evidence in some rows: forced, forbidden, nothing allowed, everything forced; and rows full of ties."""
    logits = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype).float()
    logits[0, 0], logits[1, 1], logits[2], logits[3], logits[4] = math.inf, -math.inf, -math.inf, math.inf, 0.0
    logits[5:20] = logits[5:20].round()
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_it_is_the_mode_of_the_engines(name, dtype):
    constraint, n = CONSTRAINTS[name]
    circuit = cr.compile(constraint, n)
    graph = evaluated(circuit.graph)
    logits = logits_of(n, dtype=dtype)
    found = UnrolledMode(graph)(logits)
    assert torch.equal(found, NaiveLayered(graph).mode(logits))
    if circuit.op == "layered":
        assert torch.equal(found, circuit(logits, validate_args=False).mode_mask())
    assert circuit.satisfies(found[4:]).all()


def test_groups_of_any_size_give_the_same(monkeypatch):
    """Sums of a level are put together for speed only."""
    constraint, n = CONSTRAINTS["deep"]
    graph, logits = evaluated(cr.compile(constraint, n).graph), logits_of(n)
    whole = UnrolledMode(graph)
    monkeypatch.setattr(unrolled, "FEW_PRODUCTS", 0)
    monkeypatch.setattr(unrolled, "MAX_PRODUCTS", 8)
    pieces = UnrolledMode(graph)
    assert len(pieces.tables) > 4 * len(whole.tables)
    assert torch.equal(whole(logits), pieces(logits))


def test_the_first_of_many_is_found():
    """Beyond what a byte can number, too."""
    candidates = torch.zeros(700, 1, 4, dtype=torch.bool)
    for token, at in enumerate((0, 255, 256, 699)):
        candidates[at:, 0, token] = True
    assert first(candidates).flatten().tolist() == [0, 255, 256, 699]


def test_too_large_a_circuit_is_refused(monkeypatch):
    monkeypatch.setattr(unrolled, "MAX_UNROLLED", 10)
    graph = cr.compile(*CONSTRAINTS["groups"]).graph
    with pytest.raises(ValueError, match=rf"graph has {graph.num_edges} products: at most 10"):
        UnrolledMode(graph)


def test_ties_are_broken_alike_at_every_scale():
    """Scaling by a power of two is exact, so equal subsets stay equal, and only rounding could tell them apart."""
    constraint, n = CONSTRAINTS["deep"]
    circuit = cr.compile(constraint, n)
    logits = torch.randn(2000, n, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    modes = [circuit(logits * scale).mode for scale in (1.0, 0.25, 64.0)]
    swapped = circuit(logits.double() * (1 + 2.0**-50)).mode  # what a logarithm's last bit would do
    assert all(torch.equal(mode, modes[0]) for mode in modes)
    tied = ((modes[0] != swapped).any(-1)).nonzero().flatten()
    assert len(tied) > 0  # there are ties here: this test can fail
    scores = [(logits[tied].double() * mode[tied]).sum(-1) for mode in (modes[0], swapped)]
    assert torch.equal(*scores)


# ---------------------------------------------------------------------------------------------- samples


def extreme(n, rows=500, seed=0):
    """Logits of every scale, with ties, and with evidence that leaves nothing in some rows."""
    logits = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    scale = torch.tensor([0.0, 0.1, 3.0, 1e2, 1e4])[torch.arange(rows) % 5]
    logits = logits * scale[:, None]
    logits[1::10] = logits[1::10].round()
    logits[7::11, 0], logits[3::13, -1], logits[5::50], logits[6::50] = math.inf, -math.inf, math.inf, -math.inf
    return logits


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_sample_of_a_circuit_is_that_of_the_engines(name):
    constraint, n = CONSTRAINTS[name]
    circuit = cr.compile(constraint, n)
    graph = evaluated(circuit.graph)
    logits, key = extreme(n), cr.random_key(3, torch.arange(500))
    found = UnrolledSample(graph)(logits, key)
    assert torch.equal(found, NaiveLayered(graph).sample(logits, None, key))
    if circuit.op == "layered":
        assert torch.equal(found, cr.route(logits, circuit, key=key, validate_args=False).mask)
    some = found.any(-1)
    assert int(some.sum()) > 300
    assert circuit.satisfies(found[some]).all()
    assert not torch.equal(found, UnrolledSample(graph)(logits, key + 1))


@pytest.mark.parametrize(
    ("n", "counts"),
    [
        (64, {4, 5, 6, 7, 8}),
        (40, {8}),
        (12, {2, 11}),
        (33, {16}),
        (7, {0, 3}),
        (7, {0}),
        (5, {5}),
        (1, {0, 1}),
        (1, {1}),
    ],
)
def test_the_sample_of_a_count_is_that_of_the_engines(n, counts):
    allowed = np.isin(np.arange(max(counts) + 1), list(counts))
    potential = torch.from_numpy(np.where(allowed, 0.0, -np.inf)).float()
    logits, key = extreme(n), cr.random_key(3, torch.arange(500))
    found = UnrolledCount(n, allowed)(logits, key)
    for engine in (NaiveSubset(), TorchSubset(), NumbaSubset()):
        assert torch.equal(found, engine.sample(logits, potential, key))
    assert set(found.sum(-1).tolist()) <= counts | {0}


def test_products_of_a_count():
    """By hand: pairs of 4 variables to degree 2, then one product up to x^3; coefficients times rows."""
    assert products(4, 3) == 2 * (3 * 2) + 1 * (4 * 3)
    assert products(1, 1) == 0
    assert products(256, 64) < unrolled.MAX_UNROLLED < products(256, 128)


def test_a_sample_of_groups_of_any_size_is_the_same(monkeypatch):
    constraint, n = CONSTRAINTS["deep"]
    graph, logits, key = evaluated(cr.compile(constraint, n).graph), extreme(n), cr.random_key(1, torch.arange(500))
    whole = UnrolledSample(graph)(logits, key)
    monkeypatch.setattr(unrolled, "FEW_PRODUCTS", 0)
    monkeypatch.setattr(unrolled, "MAX_PRODUCTS", 8)
    assert torch.equal(whole, UnrolledSample(graph)(logits, key))


def test_too_large_a_circuit_is_not_sampled_either(monkeypatch):
    monkeypatch.setattr(unrolled, "MAX_UNROLLED", 10)
    graph = cr.compile(*CONSTRAINTS["groups"]).graph
    with pytest.raises(ValueError, match=rf"graph has {graph.num_edges} products: at most 10"):
        UnrolledSample(graph)
