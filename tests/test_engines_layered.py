"""The engines of composed circuits: naive against enumeration, torch against naive, on every output and gradient."""

import importlib.util
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.circuit import Graph, NodeKind
from circuitroute.circuit.counting import split_by_count
from circuitroute.engines import layered_engine
from circuitroute.engines.layered import NaiveLayered, NumbaLayered, TorchLayered, evaluated, lean
from circuitroute.engines.layered.torch import sampling, steps, sweep
from circuitroute.engines.layered.torch.plan import lay_out
from circuitroute.engines.layered.torch.runs import Contraction, LargestSum
from circuitroute.engines.layered.torch.steps import Dense, Pairs, Pool
from circuitroute.keys import uniform
from tests.test_compile import NoNeighbours, Parity
from tests.truth import enumerate_worlds, world_truth

CPU = torch.device("cpu")
FAST = {"torch": TorchLayered, "numba": NumbaLayered}
if importlib.util.find_spec("numba") is None:
    del FAST["numba"]
GROUPS = cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8)

# Small enough to enumerate; with definite counts (shifted) and without.
SMALL = [
    (cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3), 12),
    (cr.EachGroup(cr.Groups(3), cr.Between(1, 2)), 9),
    (cr.LayerBudget(layers=2, experts=5, per_layer=cr.Between(1, 3), total=cr.AtMost(4)), 10),
    (cr.Cost([3, 1, 4, 1, 5, 9, 2, 6], at_most=11, at_least=3), 8),
    (cr.Exactly(1).over([0, 4]) & cr.AtMost(3), 7),
    (cr.Exactly(2).over([1, 3, 5]), 7),
    (Parity(), 6),
    (NoNeighbours() | cr.Exactly(5), 8),
    (Parity(), 1),  # the root is a literal
    (cr.AtLeast(1).over([0]) & cr.AtLeast(0), 2),
]
LARGE = [
    (GROUPS, 64),
    (cr.EachGroup(cr.Groups(5), cr.Between(1, 3)), 60),
    (cr.LayerBudget(layers=6, experts=12, per_layer=cr.Between(1, 4), total=cr.Between(10, 15)), 72),
    (cr.Cost(random.Random(0).choices(range(1, 30), k=40), at_most=120, at_least=60), 40),
    (NoNeighbours() & cr.Exactly(7), 33),
]


def name(case):
    return f"{type(case[0]).__name__}-{case[1]}" if isinstance(case, tuple) else None


def accepts(constraint, n):
    worlds = enumerate_worlds(n)
    return cr.compile(constraint, n).satisfies(torch.from_numpy(worlds)).numpy()


def logits_of(tokens, n, scale, dtype=torch.float64, seed=0):
    return (torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(
        dtype
    )


def covariance_times(dist, u):
    return torch.autograd.grad((dist.marginals * u).sum(), dist.logits, materialize_grads=True)[0]


@pytest.mark.parametrize("engine", ["naive", *FAST])
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_against_enumeration(case, engine):
    constraint, n = case
    circuit = cr.compile(constraint, n).with_engine(engine)
    assert circuit.op == "layered"
    logits = logits_of(5, n, 3.0).requires_grad_()
    dist, truth = circuit(logits), world_truth(logits.detach().numpy(), accepts(constraint, n))
    np.testing.assert_allclose(dist.log_partition.detach(), truth.log_partition, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(dist.marginals.detach(), truth.marginals, atol=1e-10)
    np.testing.assert_allclose(dist.count_probs.detach(), truth.count_probs[:, : circuit.max_count + 1], atol=1e-10)
    np.testing.assert_allclose(dist.entropy().detach(), truth.entropy, atol=1e-9)
    u = logits_of(5, n, 1.0, seed=1)
    np.testing.assert_allclose(covariance_times(dist, u), (truth.covariance @ u.numpy()[..., None])[..., 0], atol=1e-9)
    (gradient,) = torch.autograd.grad(dist.log_partition.sum(), logits)
    np.testing.assert_allclose(gradient, truth.marginals, atol=1e-10)
    np.testing.assert_allclose(dist.log_prob(dist.mode).detach(), truth.log_probs.max(1), rtol=1e-9, atol=1e-9)


# Naive sweeps of costs take seconds, at large scales several: the other constraints hold those scales.
LARGE_CELLS = [
    pytest.param(
        case, scale, dtype, marks=pytest.mark.slow if isinstance(case[0], cr.Cost) and scale not in (1.0, 10.0) else []
    )
    for case in LARGE
    for scale in (0.1, 1.0, 10.0, 100.0, 1e4)
    for dtype in (torch.float32, torch.float64)
]


@pytest.mark.parametrize(("case", "scale", "dtype"), LARGE_CELLS, ids=name)
def test_fast_engines_are_held_to_naive(case, scale, dtype):
    """Marginals, log Z, gradient, count posterior, log-probability, mode and samples, with evidence in some rows."""
    constraint, n = case
    circuit = cr.compile(constraint, n)
    logits = logits_of(40, n, scale, dtype)
    logits[0, 3], logits[1, 5], logits[1, 9], logits[2] = math.inf, -math.inf, -math.inf, 0.0
    logits.requires_grad_()
    slow = circuit.with_engine("naive")(logits.detach().double().requires_grad_())
    tight, u, key = dtype == torch.float64, logits_of(40, n, 1.0, seed=1), cr.random_key(0, torch.arange(40))
    slope, drawn, one = covariance_times(slow, u), slow.sample((4,), key=key), slow.sample(key=key)
    for engine in FAST:
        fast = circuit.with_engine(engine)(logits)
        hold_to(fast, slow, scale, tight)
        moved = covariance_times(fast, u.to(dtype)).double()
        torch.testing.assert_close(moved, slope, rtol=0, atol=1e-11 if tight else 1e-5)
        sample = fast.sample((4,), key=key)
        assert torch.equal(sample.double(), drawn)
        assert torch.equal(fast.sample_in_sweep(key).double(), one)
        log_probs = fast.log_prob(sample).double(), slow.log_prob(sample)
        torch.testing.assert_close(*log_probs, rtol=1e-6, atol=1e-9 * scale if tight else 2e-5)


def hold_to(fast, slow, scale, tight):
    """Moments and mode."""
    torch.testing.assert_close(fast.marginals.double(), slow.marginals, rtol=0, atol=1e-12 if tight else 1e-6)
    torch.testing.assert_close(fast.log_partition.double(), slow.log_partition, rtol=3e-7, atol=3e-6)
    torch.testing.assert_close(fast.count_probs.double(), slow.count_probs, rtol=0, atol=1e-11 if tight else 1e-6)
    assert torch.equal(fast.mode.double(), slow.mode)


@pytest.mark.parametrize("engine", FAST)
def test_far_apart_logits_take_the_exact_paths(engine):
    """Float32 rows whose root is too small go to float64, and from there to the naive engine; others stay."""
    circuit = cr.compile(cr.EachGroup(cr.Groups(4), cr.Exactly(1)) & cr.AtMost(4), 32).with_engine(engine)
    easy, hard, worst = (torch.full((1, 32), x) for x in (0.0, 12.0, 400.0))
    hard[0, ::2], worst[0, ::2] = -12.0, -400.0
    logits = torch.cat([easy, hard, worst])
    found = layered_engine(circuit, CPU).infer(logits, None)
    groups = cr.compile(cr.EachGroup(cr.Groups(4), cr.Between(1, 2)), 32)
    unshifted = FAST[engine](groups.graph, 8)
    assert found.fallback.tolist() == [False, False, False]  # the shift sees to it
    assert unshifted.infer(logits, None).fallback.tolist() == [False, True, True]
    assert unshifted.infer(logits.double(), None).fallback.tolist() == [False, False, True]
    naive = NaiveLayered(groups.graph).infer(logits.double(), None)
    torch.testing.assert_close(unshifted.infer(logits, None).marginals.double(), naive.marginals, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", FAST)
def test_rows_that_nothing_satisfies_are_nan_alone(engine):
    circuit = cr.compile(GROUPS, 64).with_engine(engine)
    logits = logits_of(4, 64, 1.0, torch.float32)
    logits[1] = -math.inf
    logits[2, :9] = math.inf
    logits[3, 4] = math.nan
    dist = circuit(logits, validate_args=False)
    for value in (dist.log_partition, dist.marginals.sum(-1), dist.count_probs.sum(-1), dist.mode.sum(-1)):
        assert value.isnan().tolist() == [False, True, True, True]
    assert dist.sample(key=0).isnan().any(-1).tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="rows 1, 2"):
        circuit(logits[:3])


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("constraint", [cr.Exactly(3), cr.Between(1, 3), SMALL[0][0]])
def test_an_upstream_gradient_may_depend_on_the_logits(constraint, engine):
    """The same gradient with and without create_graph, and right to the second order."""
    circuit = cr.compile(constraint, 12).with_engine(engine)
    logits = logits_of(2, 12, 1.0).requires_grad_()
    function = lambda x: circuit(x).marginals.square().sum(-1)  # noqa: E731
    plain, kept = (torch.autograd.grad(function(logits).sum(), logits, create_graph=c)[0] for c in (False, True))
    torch.testing.assert_close(kept, plain, rtol=0, atol=1e-12)
    assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("engine", FAST)
def test_evidence_is_certain_and_no_variable(engine):
    logits = logits_of(1, 64, 1.0, torch.float32)
    logits[0, 3], logits[0, 40] = math.inf, -math.inf
    dist = cr.compile(GROUPS, 64).with_engine(engine)(logits.requires_grad_())
    assert dist.marginals[0, [3, 40]].tolist() == [1.0, 0.0]
    (gradient,) = torch.autograd.grad(dist.log_partition.sum(), logits)
    assert gradient[0, [3, 40]].tolist() == [0.0, 0.0]
    assert (gradient[0, :3] > 0).all()


@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], SMALL[3]], ids=name)
@pytest.mark.parametrize("engine", FAST)
def test_gradients_numerically(case, engine):
    constraint, n = case
    circuit = cr.compile(constraint, n).with_engine(engine)
    logits = logits_of(2, n, 2.0).requires_grad_()
    mask = circuit(logits).mode
    outputs = (
        lambda x: circuit(x).log_partition,
        lambda x: circuit(x).marginals,
        lambda x: circuit(x).count_probs,
        lambda x: circuit(x).entropy(),
        lambda x: circuit(x).log_prob(mask),
    )
    for output in outputs:
        assert torch.autograd.gradcheck(output, logits)
    assert torch.autograd.gradgradcheck(outputs[0], logits)
    assert torch.autograd.gradgradcheck(outputs[1], logits)


@pytest.mark.parametrize("case", LARGE[:2], ids=name)
def test_blocks_change_nothing(case, monkeypatch):
    """Tokens, products and choices are cut into pieces; results and samples stay the very same."""
    constraint, n = case
    circuit = cr.compile(constraint, n).with_engine("torch")
    logits, key = logits_of(70, n, 2.0, torch.float32), cr.random_key(0, torch.arange(70))
    whole = circuit(logits)
    expected = whole.sample(key=key), whole.mode
    monkeypatch.setattr(sweep, "BLOCK_VALUES", {"cpu": 1})
    monkeypatch.setattr(steps, "MAX_PRODUCTS", 100)
    monkeypatch.setattr(sampling, "MAX_ENTRIES", 100)
    pieces = cr.compile(constraint, n).with_engine("torch")(logits)
    torch.testing.assert_close(pieces.marginals, whole.marginals, rtol=0, atol=3e-7)
    assert torch.equal(pieces.sample(key=key), expected[0])
    assert torch.equal(pieces.mode, expected[1])
    assert torch.equal(circuit(logits[30:31]).sample(key=key[30:31]), expected[0][30:31])


@pytest.mark.parametrize("engine", FAST)
def test_modes_of_work(engine):
    """Inference mode, no gradient, autocast, half precision and an empty batch."""
    circuit = cr.compile(GROUPS, 64).with_engine(engine)
    logits = logits_of(3, 64, 1.0, torch.float32)
    expected = circuit(logits).marginals
    with torch.inference_mode():
        assert torch.equal(circuit(logits).marginals, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(circuit(logits).marginals, expected)
    assert circuit(logits.bfloat16()).marginals.dtype == torch.float32
    assert circuit(logits[:0]).sample(key=0).shape == (0, 64)
    assert circuit(logits[:0]).mode.shape == (0, 64)
    assert circuit(logits.requires_grad_()).covariance_matrix.shape == (3, 64, 64)


def test_siblings_that_are_alike_are_one_step():
    plan = lay_out(cr.compile(GROUPS, 64).graph, CPU)
    assert [type(step) for step in plan.steps[:3]] == [Dense] * 3  # inside the groups
    assert plan.counts == (8,)
    # One row per node (two per variable and one for the constant, used or not) and no more.
    assert plan.rows <= cr.compile(GROUPS, 64).num_nodes + 1
    irregular = lay_out(cr.compile(LARGE[3][0], 40).graph, CPU)
    assert Pairs in {type(step) for step in irregular.steps}


def shared() -> Graph:
    """A circuit that is no tree: two sums share the node over variables 2 and 3, and split their scopes differently.

    Node 8, exactly one of {2, 3}, is used by both elements of the root, which is decided by variable 0.
    """
    literals = [(kind, v) for v in range(4) for kind in (NodeKind.ABSENT, NodeKind.PRESENT)]
    kind = [int(k) for k, _ in literals] + [3, 3, 3, 3, 3, 3]
    variable = [v for _, v in literals] + [-1] * 6
    #        8: one of {2, 3}   9: x1 and 8   10: not x1 and 8   11: 0 absent, 9   12: 0 present, 10   13: root
    elements = [[(4, 7), (5, 6)], [(3, 8)], [(2, 8)], [(0, 9)], [(1, 10)], [(11, None), (12, None)]]
    kind, variable = [0, *kind], [-1, *variable]
    pairs = [[(a + 1, 0 if b is None else b + 1) for a, b in some] for some in elements]
    first = np.cumsum([0] * 10 + [len(p) for p in pairs])
    flat = np.array([pair for some in pairs for pair in some], dtype=np.int32)
    return Graph(
        n=4,
        kind=np.array(kind, dtype=np.uint8),
        variable=np.array(variable, dtype=np.int32),
        first=first.astype(np.int64),
        left=flat[:, 0].copy(),
        right=flat[:, 1].copy(),
    )


@pytest.mark.parametrize("engine", FAST)
def test_a_circuit_that_is_no_tree(engine):
    circuit = cr.Circuit(shared(), Parity()).with_engine(engine)
    assert circuit.model_count() == 4
    worlds = enumerate_worlds(4)
    accept = circuit.satisfies(torch.from_numpy(worlds)).numpy()
    logits = logits_of(6, 4, 2.0).requires_grad_()
    truth, dist = world_truth(logits.detach().numpy(), accept), circuit(logits)
    np.testing.assert_allclose(dist.marginals.detach(), truth.marginals, atol=1e-12)
    np.testing.assert_allclose(dist.count_probs.detach(), truth.count_probs[:, : circuit.max_count + 1], atol=1e-12)
    slow = circuit.with_engine("naive")(logits.detach())
    key = cr.random_key(1, torch.arange(6))
    assert torch.equal(dist.sample((50,), key=key), slow.sample((50,), key=key))
    assert torch.equal(dist.mode, slow.mode)
    u = logits_of(6, 4, 1.0, seed=3)
    np.testing.assert_allclose(covariance_times(dist, u), (truth.covariance @ u.numpy()[..., None])[..., 0], atol=1e-12)


@pytest.mark.parametrize("engine", [*FAST, "naive"])
@pytest.mark.parametrize("batch", [(0,), (0, 3), (2, 0)])
def test_no_rows_have_counts_too(engine, batch):
    """There is no Fourier transform of nothing."""
    circuit = cr.compile(cr.Exactly(1).over([0, 2]), 4).with_engine(engine)
    logits = torch.zeros(*batch, 4, requires_grad=True)
    counts = circuit(logits).count_probs
    assert counts.shape == (*batch, circuit.max_count + 1)
    (gradient,) = torch.autograd.grad(counts.sum(), logits)
    assert gradient.shape == logits.shape


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_splitting_by_count_changes_no_subset(case):
    circuit = cr.compile(*case)
    split = cr.Circuit(split_by_count(circuit.graph), circuit.constraint)
    split.check()
    assert split.model_count() == circuit.model_count()
    plan = lay_out(split.graph, CPU)
    assert plan.counts is not None
    assert plan.counts[-1] == circuit.max_count


def test_nodes_are_split_by_count_where_that_is_cheap():
    """Then logits that ask for far too many variables are no reason to leave float32."""
    budget = cr.compile(cr.LayerBudget(layers=16, experts=16, per_layer=cr.Between(1, 6), total=cr.AtMost(40)), 256)
    engine = layered_engine(budget, CPU)
    found = engine.infer(logits_of(50, 256, 1.0, torch.float32) + 3, None)
    assert not found.fallback.any()
    assert found.count_probs is not None
    wide = cr.compile(cr.EachGroup(cr.Groups(64), cr.Between(0, 15)), 1024)
    assert evaluated(wide.graph) is wide.graph  # would be hundreds of times larger
    definite = cr.compile(GROUPS, 64).graph
    assert evaluated(definite) is definite


@pytest.mark.parametrize("kind", FAST.values(), ids=FAST)
def test_moments_are_not_split_where_all_counts_are_allowed(kind):
    """No logits are shifted then, and the circuit as it is is smaller; a sample stays the one of the split circuit."""
    n = 24
    hierarchy = cr.Logic(" & ".join(f"(x{i} >> x{(i - 1) // 2})" for i in range(1, n)))
    tree = cr.compile(hierarchy, n)
    engine = layered_engine(tree.with_engine(kind.name), CPU)
    assert type(engine) is kind
    assert (tree.min_count, tree.max_count) == (0, n)
    assert lean(tree.graph) is tree.graph
    assert evaluated(tree.graph).num_edges > 4 * tree.num_edges
    logits, key = logits_of(64, n, 3.0, torch.float32), cr.random_key(3, torch.arange(64))
    logits[0, 3], logits[1, 5], logits[2] = math.inf, -math.inf, 60.0
    split = TorchLayered(evaluated(tree.graph), n)
    for keyed in (None, key):
        found, other = engine.infer(logits, None, keyed), split.infer(logits, None, keyed)
        assert found.count_probs is None
        assert other.count_probs is not None
        assert not other.shift.any()
        for ours, theirs in ((found.marginals, other.marginals), (found.log_partition, other.log_partition)):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.mask, other.mask)
    assert torch.equal(engine.sample(logits, None, key), NaiveLayered(evaluated(tree.graph)).sample(logits, None, key))
    assert torch.equal(engine.mode(logits), split.mode(logits))
    torch.testing.assert_close(engine.counting().infer(logits, None).count_probs, other.count_probs)
    few = cr.compile(hierarchy & cr.AtMost(n - 1), n)
    assert lean(few.graph) is not few.graph  # shifts may be needed


@pytest.mark.parametrize("case", [*(c for c in SMALL if c[1] > 1), LARGE[1]], ids=name)
@pytest.mark.parametrize("engine", FAST)
def test_unsplit_circuits(case, engine):
    """Nodes without definite counts: no shift, and the count posterior from a product made on demand."""
    constraint, n = case
    circuit = cr.compile(constraint, n)
    fast, slow = FAST[engine](circuit.graph, circuit.max_count), NaiveLayered(circuit.graph)
    logits = logits_of(6, n, 3.0).requires_grad_()
    found, exact = fast.infer(logits.detach(), None), slow.infer(logits.detach(), None)
    torch.testing.assert_close(found.marginals, exact.marginals, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.log_partition, exact.log_partition)
    attached = fast.attach(found, logits, None).marginals, slow.attach(exact, logits, None).marginals
    u = logits_of(6, n, 1.0, seed=1)
    ours, theirs = (torch.autograd.grad((m * u).sum(), logits, materialize_grads=True)[0] for m in attached)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    counters = [engine.counting() for engine in (fast, slow)]
    found = [engine.infer(logits.detach(), None) for engine in counters]
    counts = [engine.attach(each, logits, None).count_probs for engine, each in zip(counters, found, strict=True)]
    torch.testing.assert_close(*counts, rtol=0, atol=1e-11)
    v = logits_of(6, circuit.max_count + 1, 1.0, seed=2)
    ours, theirs = (torch.autograd.grad((q * v).sum(), logits, materialize_grads=True)[0] for q in counts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    key = cr.random_key(0, torch.arange(6))
    assert torch.equal(fast.sample(logits.detach(), None, key), slow.sample(logits.detach(), None, key))
    assert torch.equal(fast.mode(logits.detach()), slow.mode(logits.detach()))


def test_engines_are_chosen_and_forced():
    circuit = cr.compile(GROUPS, 64)
    preferred = "numba" if "numba" in FAST else "torch"
    assert circuit.engine_for("cpu") == preferred
    assert circuit.engine_for("meta") == circuit.engine_for("cuda") == "torch"
    for engine, kind in FAST.items():
        assert type(layered_engine(circuit.with_engine(engine), CPU)) is kind
    assert type(layered_engine(circuit, CPU)) is FAST[preferred]
    assert isinstance(layered_engine(circuit.with_engine("naive"), CPU), NaiveLayered)
    with pytest.raises(cr.EngineError, match="no such engine"):
        circuit.with_engine("magic")


def test_choices_that_rounding_could_decide_are_noticed():
    """Cumulative weights within the margin of the threshold, on either side; certain choices are not bothered."""
    plan, key = lay_out(cr.compile(GROUPS, 64).graph, CPU), cr.random_key(0, torch.arange(5))
    u = uniform(key, 3, 1, torch.float64)[0]
    share = u + torch.tensor([0.0, 5e-5, -5e-5, 2e-4, -2e-4], dtype=torch.float64)
    draw = sampling.Draw(plan, key, margin=1e-4)
    chosen = draw.invert(torch.stack([share, 1 - share])[:, None], torch.full((1, 5), 3))
    assert draw.uncertain.tolist() == [True, True, True, False, False]
    assert chosen[0, 3:].tolist() == [0, 1]


@pytest.mark.parametrize("engine", FAST)
def test_samples_in_doubt_are_drawn_again(monkeypatch, engine):
    """With everything in doubt, every row goes to float64 and from there to the naive engine: the same samples."""
    circuit, key = cr.compile(GROUPS, 64).with_engine(engine), cr.random_key(0, torch.arange(30))
    logits = logits_of(30, 64, 1.0, torch.float32)
    expected = circuit(logits).sample(key=key)
    redrawn = []
    naive = NaiveLayered.sample
    monkeypatch.setattr(NaiveLayered, "sample", lambda self, x, *rest: redrawn.append(len(x)) or naive(self, x, *rest))
    monkeypatch.setattr(sweep, "MARGIN", {torch.float32: 2.0, torch.float64: 2.0})
    assert torch.equal(circuit(logits).sample(key=key), expected)
    assert torch.equal(circuit(logits).sample_in_sweep(key).float(), expected)
    assert redrawn == [30, 30]


# ---------------------------------------------------------------------------------------------- the parts


@settings(max_examples=200, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=40))
def test_contractions_are_their_triples(triples):
    """Any table, regular or not, in both semirings."""
    x, y, out = (np.array(c, dtype=np.int64) for c in zip(*sorted(triples), strict=True))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    expected, best = torch.zeros(6, 2, 3, dtype=torch.float64), torch.full((6, 2, 3), -math.inf, dtype=torch.float64)
    for i, j, o in zip(x, y, out, strict=True):
        expected[o] += a[i] * b[j]
        best[o] = torch.maximum(best[o], a[i] + b[j])
    contraction = Contraction.of(x, y, out)
    found, largest = torch.zeros_like(expected), torch.full_like(best, -math.inf)
    contraction.add(found, a, b)
    LargestSum(contraction).update(largest, a, b)
    torch.testing.assert_close(found, expected)
    assert torch.equal(largest, best)


def test_a_convolution_is_one_run_per_coefficient():
    pairs = [(i, j) for i in range(9) for j in range(9) if i + j <= 8]
    x, y = (np.array(c) for c in zip(*pairs, strict=True))
    assert len(Contraction.of(x, y, x + y).runs) == 9
    assert len(Contraction.of(x + y, y, x).runs) == 9  # the adjoint
    assert len(Contraction.of(x, 8 - x, np.zeros_like(x)).runs) <= len(x)
    assert len(Contraction.of(np.arange(9), 8 - np.arange(9), np.zeros(9, dtype=np.int64)).runs) == 1


@pytest.mark.parametrize("rows", [[[3, 5], [7, 9]], [[3, 4], [9, 2]], [[1, 1], [2, 2]], [[6], [2]]])
def test_pools_read_and_add(rows):
    """Rows at even distances are views, others copies; rows that occur twice are added twice."""
    pool, index = Pool(np.array(rows), CPU), torch.tensor(rows)
    values = torch.arange(40.0).reshape(10, 4)
    assert torch.equal(pool.read(values), values[index])
    target = torch.zeros(10, 4)
    opened = pool.opened(target)
    opened += 1.0
    pool.close(target, opened)
    expected = torch.zeros(10, 4).index_add_(0, index.reshape(-1), torch.ones(index.numel(), 4))
    assert torch.equal(target, expected)
