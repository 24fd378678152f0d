"""The compiled engine of arbitrary circuits: its arrays, threads, neighbours, and what it refuses.

What it shares with the engine ``torch`` is tested in test_engines_layered.py: every output and gradient.
"""

import concurrent.futures
import copy
import math
import pickle
import random
import sys

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.circuit import Graph, NodeKind
from circuitroute.engines import compiled, layered_engine
from circuitroute.engines.layered import NaiveLayered, NumbaLayered, TorchLayered
from circuitroute.engines.layered.flat import flatten
from circuitroute.engines.layered.numba import engine as own
from tests.test_engines_layered import CPU, GROUPS, SMALL, logits_of, name

pytest.importorskip("numba", reason="the engine numba needs the extra 'cpu'")

BUDGET = cr.LayerBudget(layers=3, experts=8, per_layer=cr.Between(1, 4), total=cr.AtMost(8))


def everything(circuit, logits, key):
    """All that one sweep gives, and the gradient of the marginals."""
    engine = layered_engine(circuit, CPU)
    found = engine.infer(logits, None, key)
    u = logits.clamp(-3, 3).cos()
    dm, dq = engine.second_derivative(logits, None, found, u, None)
    parts = (found.log_partition, found.marginals, found.count_probs, found.shift, found.log_root, found.mask, dm, dq)
    return [x for x in parts if x is not None]


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_rows_are_the_nodes(case):
    """Elements and uses are the same products, and what is below the root comes before it."""
    circuit = cr.compile(*case)
    flat = flatten(circuit.graph, circuit.max_count)
    n, J = flat.n, flat.log_weights.shape[1]
    owner = np.repeat(np.arange(flat.rows), np.diff(flat.first))
    assert (np.maximum(flat.left, flat.right) < owner).all()
    products = sorted(zip(owner.tolist(), flat.left.tolist(), flat.right.tolist(), strict=True))
    child = np.repeat(np.arange(flat.rows), np.diff(flat.first_use))
    uses = set(zip(flat.parent.tolist(), child.tolist(), flat.sibling.tolist(), strict=True))
    wanted = {(o, a, b) for o, c, d in products for a, b in ((c, d), (d, c)) if a > 2 * n or (a < 2 * n and a % 2)}
    assert uses == wanted
    assert flat.rows == 2 * n + 1 + int((circuit.graph.kind[:-1] == NodeKind.SUM).sum()) + J


def test_results_do_not_depend_on_neighbours_or_threads(monkeypatch):
    circuit = cr.compile(BUDGET, 24).with_engine("numba")
    logits, key = logits_of(50, 24, 3.0, torch.float32), cr.random_key(0, torch.arange(50))
    logits[7, :2], logits[8] = math.inf, 1e3 * logits[8]
    whole = everything(circuit, logits, key)
    for rows in (slice(7, 8), slice(3, 20), slice(8, 50)):
        for a, b in zip(whole, everything(circuit, logits[rows], key[rows]), strict=True):
            assert torch.equal(a[rows], b)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "LOGITS_PER_THREAD", 1)
    for a, b in zip(whole, everything(circuit, logits, key), strict=True):
        assert torch.equal(a, b)


def test_callers_threads_may_share_it():
    circuit = cr.compile(GROUPS, 64).with_engine("numba")
    logits, key = logits_of(40, 64, 2.0, torch.float32), cr.random_key(1, torch.arange(40))
    expected = everything(circuit, logits, key)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: everything(circuit, logits, key), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_may_lie_anyhow(dtype):
    """Strided and expanded logits, keys and upstream gradients."""
    circuit = cr.compile(cr.Exactly(2).over([1, 3, 5]), 7).with_engine("numba")
    logits, key = logits_of(7, 20, 2.0, dtype).t()[::2], cr.random_key(0, torch.arange(20))[::2]
    found, expected = everything(circuit, logits, key), everything(circuit, logits.contiguous(), key.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    row = logits_of(1, 7, 2.0, dtype).expand(5, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(circuit(row).marginals[:, 1].sum(), row)
    assert torch.equal(gradient[0], gradient[4])


def test_no_rows():
    circuit = cr.compile(BUDGET, 24).with_engine("numba")
    for part in everything(circuit, torch.zeros(0, 24), cr.random_key(0, torch.arange(0))):
        assert len(part) == 0


def test_long_sums_keep_their_digits():
    """Sums of thousands of products, which one float32 accumulator would leave with fewer digits."""
    circuit = cr.compile(cr.Cost(random.Random(0).choices(range(1, 60), k=40), at_most=500), 40)
    assert int(np.diff(circuit.graph.first).max()) > 2 * 32
    flat, slow = NumbaLayered(circuit.graph, 40), NaiveLayered(circuit.graph)
    logits = logits_of(20, 40, 1.0, torch.float32)
    found, exact = flat.infer(logits, None), slow.infer(logits.double(), None)
    torch.testing.assert_close(found.marginals.double(), exact.marginals, rtol=0, atol=4e-7)
    torch.testing.assert_close(
        found.log_root, exact.log_partition - (found.log_partition.double() - found.log_root), rtol=0, atol=1e-5
    )


def test_a_variable_alone():
    """The root is a literal: nothing to choose, nothing to sum."""
    engine = NumbaLayered(Graph.of(1, [NodeKind.PRESENT], [0], [[]]), 1)
    found = engine.infer(torch.tensor([[0.3], [math.inf], [-2.0]]), None, cr.random_key(0, torch.arange(3)))
    assert found.marginals.tolist() == [[1.0]] * 3
    assert found.mask.all()
    torch.testing.assert_close(found.log_partition, torch.tensor([0.3, 0.0, -2.0]))
    assert found.count_probs.tolist() == [[0.0, 1.0]] * 3


def test_copies_and_pickles_of_a_circuit_that_has_run():
    circuit = cr.compile(GROUPS, 64).with_engine("numba")
    logits = logits_of(3, 64, 1.0, torch.float32)
    expected = circuit(logits).marginals
    for again in (copy.deepcopy(circuit), pickle.loads(pickle.dumps(circuit))):
        assert again.engine_for("cpu") == "numba"
        assert torch.equal(again(logits).marginals, expected)


def test_what_it_does_not_give_is_of_its_own_kind():
    """The product with a counter, and the exact sweeps of single rows."""
    engine = NumbaLayered(cr.compile(*SMALL[1]).graph, 6)
    assert not engine.gives_counts
    assert type(engine.counting()) is NumbaLayered
    assert engine.counting().counting() is engine.counting()


def test_tensors_elsewhere_are_refused():
    engine = NumbaLayered(cr.compile(GROUPS, 64).graph, 8)
    for ask in (
        lambda x: engine.infer(x, None),
        lambda x: engine.derivative(own.Inputs(x, None), x[:, 0].double(), x, None),
    ):
        with pytest.raises(cr.EngineError, match="engine='numba' runs on CPU tensors and these are on meta"):
            ask(torch.zeros(3, 64, device="meta"))


def test_without_numba_torch_runs_and_a_forced_engine_says_what_to_install(monkeypatch):
    circuit = cr.compile(GROUPS, 64)
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.missing.cache_clear()
    try:
        assert circuit.engine_for("cpu") == "torch"
        assert type(layered_engine(circuit, CPU)) is TorchLayered
        with pytest.raises(cr.EngineError, match=r"numba is not installed; pip install 'circuitroute\[cpu\]'"):
            circuit.with_engine("numba")
    finally:
        compiled.missing.cache_clear()
