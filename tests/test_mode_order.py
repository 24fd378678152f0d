"""Ties of the mode: the lower count first, then the list of indices that comes first, on every way to a mode.

The truth is enumeration: all allowed subsets in that order, the first with the largest score. Logits are integers and
halves, so that sums are exact and equal subsets are equal on every engine.
"""

import itertools
import math

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.engines.layered import NaiveLayered, evaluated
from circuitroute.engines.layered.torch.unrolled import UnrolledMode
from circuitroute.integrations.serving import export, routing_function
from tests.test_engines_layered import FAST

x = cr.variables(10)
INTERLEAVED = cr.Groups([[0, 4], [2, 6], [1, 3], [5, 7]])
COMPOSED = [
    (cr.Exactly(2) & cr.ActiveGroups(cr.Groups(4), at_most=4), 8),
    (cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Between(0, 3), 8),
    (cr.ActiveGroups(INTERLEAVED, at_most=2) & cr.Exactly(3), 8),
    (cr.EachGroup(INTERLEAVED, cr.AtMost(1)), 8),
    (cr.EachGroup(cr.Groups([[0, 3, 6], [1, 4, 7], [2, 5, 8]]), cr.CountIn({0, 2})), 9),
    (cr.Logic(x[0] | x[1]), 3),
    (cr.Logic((x[3] >> x[5]) & ~(x[0] & x[7])), 8),
    (cr.Logic(x[0] ^ x[1] ^ x[4]), 5),
    (cr.Cost([3, 1, 2, 5, 4, 1, 2, 2], at_most=7) & cr.AtLeast(2), 8),
    (cr.Exactly(1).over([4]), 6),
    (cr.Exactly(2).over([5, 1, 3]), 6),
    (cr.Exactly(3).over([7, 0, 5, 2, 1]) & cr.Exactly(4), 8),
    (cr.LayerBudget(layers=2, experts=4, per_layer=cr.Between(1, 3), total=cr.AtMost(4)), 8),
]


def truth(allowed, logits, potential=None):
    """[T, N] bool from the allowed subsets [W, N]; all False where nothing is left."""
    subsets = sorted(np.flatnonzero(row).tolist() for row in allowed)
    subsets.sort(key=len)
    masks = np.zeros((len(subsets), allowed.shape[1]), dtype=bool)
    for row, subset in zip(masks, subsets, strict=True):
        row[subset] = True
    theta = logits.double().numpy()
    scores = np.where(np.isinf(theta), 0, theta) @ masks.T.astype(float)
    missing = (theta == math.inf).astype(int) @ (~masks).T.astype(int)
    forbidden = (theta == -math.inf).astype(int) @ masks.T.astype(int)
    scores[missing + forbidden > 0] = -math.inf
    if potential is not None:
        scores += potential.double().numpy()[..., masks.sum(1)]
    best = scores.argmax(1)  # the first
    return torch.from_numpy(masks[best] & (scores.max(1) > -math.inf)[:, None])


def allowed_of(circuit):
    worlds = torch.tensor(list(itertools.product([False, True], repeat=circuit.n)))
    return worlds[circuit.satisfies(worlds)].numpy()


def tied_logits(n, rows=150, seed=0):
    """Zeros, small integers and halves, some of them with evidence; the last row leaves nothing to most rules."""
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-1, 2, (rows, n), generator=generator).float()
    halves = torch.randint(-3, 4, (rows, n), generator=generator) / 2
    given = torch.randint(-1, 2, (rows, n), generator=generator).float()
    given[torch.rand(rows, n, generator=generator) < 0.15] = math.inf
    given[torch.rand(rows, n, generator=generator) < 0.15] = -math.inf
    return torch.cat([torch.zeros(1, n), -torch.zeros(1, n), integers, halves, given, torch.full((1, n), -math.inf)])


@pytest.mark.parametrize(("constraint", "n"), COMPOSED, ids=repr)
def test_every_engine_of_composed_circuits(constraint, n):
    circuit = cr.compile(constraint, n)
    assert circuit.op == "layered"
    logits = tied_logits(n)
    expected = truth(allowed_of(circuit), logits)
    # Also of the graph as it was declared, whose nodes may have no definite counts.
    for graph in (evaluated(circuit.graph), circuit.graph):
        assert torch.equal(NaiveLayered(graph).mode(logits), expected)
        for kind in FAST.values():
            assert torch.equal(kind(graph, circuit.max_count).mode(logits), expected)
        assert torch.equal(UnrolledMode(graph)(logits), expected)
    for engine in (*FAST, "naive"):
        found = circuit.with_engine(engine)(logits, validate_args=False)
        assert torch.equal(found.mode_mask(), expected)
        assert torch.equal(found.mode.nan_to_num() == 1, expected)


@pytest.mark.parametrize("n", [63, 64, 65, 130])
def test_many_variables(n):
    """More than fit a word, next to one another and interleaved: a composition that allows what a count does."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.cat([tied_logits(n, 10), torch.randn(20, n, generator=generator).bfloat16().float()])
    late = torch.full((1, n), -1.0)
    late[:, -3:] = 1.0  # all but the last word are equal
    logits = torch.cat([logits, late, late.flip(1)])
    whole = [list(range(i, n, 3)) for i in range(3)], np.array_split(np.arange(n), 3)
    for count in (cr.Exactly(2), cr.Between(1, 4)):
        expected = cr.compile(count, n)(logits, validate_args=False).mode_mask()
        for groups in whole:
            parts = cr.Groups([[int(i) for i in group] for group in groups])
            circuit = cr.compile(count & cr.ActiveGroups(parts, at_most=3), n)
            assert circuit.op == "layered"
            assert circuit.model_count() == cr.compile(count, n).model_count()
            graph = evaluated(circuit.graph)
            for mode in (
                NaiveLayered(graph).mode,
                *(kind(graph, 4).mode for kind in FAST.values()),
                UnrolledMode(graph),
            ):
                assert torch.equal(mode(logits), expected)


def test_only_tokens_with_equals_are_decided_again(monkeypatch):
    circuit = cr.compile(COMPOSED[0][0], 8)
    again = []
    forward = UnrolledMode.forward
    monkeypatch.setattr(
        UnrolledMode, "forward", lambda self, logits: again.append(len(logits)) or forward(self, logits)
    )
    clear = torch.arange(8.0).repeat(5, 1)
    assert torch.equal(circuit(clear).mode, torch.tensor([0.0] * 6 + [1, 1]).repeat(5, 1))
    assert again == []
    assert circuit(torch.cat([clear, torch.zeros(3, 8)])).mode[-1].tolist() == [1, 1] + [0] * 6
    assert again == [3]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_set_of_counts(n):
    """Of all logits in {-1, 0, 1}: on the circuit, through a potential, in a routing step and in serving."""
    logits = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=n)))
    for size in range(1, n + 2):
        for counts in itertools.combinations(range(n + 1), size):
            circuit = cr.compile(cr.CountIn(counts), n)
            allowed = allowed_of(circuit)
            expected = truth(allowed, logits)
            for engine in ("naive", "torch"):
                assert torch.equal(circuit.with_engine(engine)(logits).mode_mask(), expected)
            assert torch.equal(cr.route(logits, circuit, training=False).mask, expected)
            assert torch.equal(cr.route(logits, circuit, decide="mode", temperature=0.5).mask, expected)
            for count in counts:
                rows = torch.full((len(logits),), count)
                of_size = truth(allowed[allowed.sum(1) == count], logits)
                assert torch.equal(circuit(logits).mode_mask(rows), of_size)
            potential = torch.arange(circuit.max_count + 1) % 2 / 2
            assert torch.equal(circuit(logits, potential).mode_mask(), truth(allowed, logits, potential))
            _serves(circuit, logits, expected)


def _serves(circuit, logits, expected):
    function = routing_function(circuit, circuit.n)
    width = max(circuit.max_count, 1)
    weights, ids = function(logits, logits, width, False)
    served = torch.zeros_like(expected).scatter(1, ids.long(), weights > 0)
    assert torch.equal(served, expected)


@pytest.mark.parametrize(("constraint", "n"), COMPOSED, ids=repr)
def test_routing_and_serving_of_composed_circuits(constraint, n):
    circuit = cr.compile(constraint, n)
    logits = tied_logits(n)[:300]
    expected = truth(allowed_of(circuit), logits)
    assert torch.equal(cr.route(logits, circuit, training=False).mask, expected)
    assert torch.equal(cr.route(logits, circuit, decide="mode", temperature=3.0).mask, expected)
    _serves(circuit, logits, expected)


@pytest.mark.parametrize(("constraint", "n"), [*COMPOSED[1:3], (cr.Between(1, 3), 6)], ids=repr)
def test_traced_and_exported(constraint, n):
    circuit = cr.compile(constraint, n)
    logits = tied_logits(n)[:300]
    expected = truth(allowed_of(circuit), logits)
    traced = torch.compile(lambda rows: circuit(rows, validate_args=False).mode_mask(), backend="aot_eager")
    assert torch.equal(traced(logits), expected)
    program = export(routing_function(constraint, n), topk=circuit.max_count, renormalize=False).module()
    weights, ids = program(hidden_states=logits, gating_output=logits, topk=circuit.max_count, renormalize=False)
    assert torch.equal(torch.zeros_like(expected).scatter(1, ids.long(), weights > 0), expected)


@pytest.mark.parametrize(
    "constraint", [cr.Exactly(2), cr.Between(1, 3), cr.CountIn({0, 2, 5}), cr.AtLeast(3)], ids=repr
)
@pytest.mark.parametrize("engine", ["numba", "triton"])
def test_fused_steps(constraint, engine):
    n = 6
    circuit = cr.compile(constraint, n)
    circuit = circuit.with_engine(engine)
    logits = tied_logits(n, 60)
    logits = logits[~circuit(logits, validate_args=False).log_partition.isnan()]
    expected = truth(allowed_of(circuit), logits)
    assert torch.equal(circuit(logits).mode_mask(), expected)
    for combine in ("softmax", "normalized"):
        for options in ({"training": False}, {"decide": "mode"}, {"decide": "mode", "temperature": 0.25}):
            routing = cr.route(logits, circuit, combine=combine, key=1, **options)
            weights, indices = routing.padded(width=max(circuit.max_count, 1))
            assert torch.equal(routing.mask, expected)
            used = torch.zeros_like(expected).scatter(1, indices.long(), weights != 0)
            assert not (used & ~expected).any()


def test_routers():
    """A fresh router whose weight is zero, with a price, a bias, and one with ties of its own."""
    hidden = torch.zeros(3, 4)
    first = torch.tensor([[True, True] + [False] * 4])
    composed = cr.Exactly(2) & cr.ActiveGroups(cr.Groups(3), at_most=3)
    for router in (
        cr.TopKRouter(4, 6, 2),
        cr.ExactKRouter(4, 6, 2),
        cr.DynamicKRouter(4, 6, 2, 4),
        cr.Router(4, 6, composed),
    ):
        assert torch.equal(router.eval()(hidden).mask, first.expand(3, -1))
        routing = router(hidden, price=torch.tensor([0.5, 1.0, 0.0]))
        assert torch.equal(routing.mask, first.expand(3, -1))
        biased = router(hidden, bias=torch.tensor([0.0, 0, 1, 0, 0, 0]))
        assert biased.mask[:, [0, 2]].all()
        assert (biased.mask.sum(-1) == 2).all()


def test_files_of_others(tmp_path):
    """Their elements come in an order of their own: x0 or x1, the latter first."""
    source = tmp_path / "or.nnf"
    source.write_text("nnf 5 4 2\nL 2\nL -1\nA 2 1 0\nL 1\nO 1 2 2 3\n")
    circuit = cr.read_nnf(source)
    assert circuit(torch.zeros(2)).mode.tolist() == [1, 0]
    logits = tied_logits(circuit.n, 20)
    expected = truth(allowed_of(circuit), logits)
    assert torch.equal(circuit(logits, validate_args=False).mode_mask(), expected)
    path = tmp_path / "circuit"
    circuit.save(path)
    assert torch.equal(cr.load(path)(logits, validate_args=False).mode_mask(), expected)
