"""Circuits of counts: their size without building them, and graphs that are built when something asks for them."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from circuitroute_compilers.builtin import _chosen, _graph, compile_builtin
from circuitroute_compilers.counted import CountSize
from circuitroute_compilers.lowering import Capped

import circuitroute as cr
from circuitroute.circuit import DeferredGraph, Graph

ARRAYS = ("kind", "variable", "first", "left", "right")


def all_count_sets(n):
    return [[j for j in range(n + 1) if bits >> j & 1] for bits in range(1, 2 ** (n + 1))]


def some_count_sets():
    chosen = random.Random(0)
    for _ in range(20):
        n = chosen.randint(8, 60)
        yield n, sorted(chosen.sample(range(n + 1), chosen.randint(1, n // 2)))
    yield from [
        (100, [99]),
        (130, list(range(50, 131))),
        (64, [0, 64]),
        (257, [8]),
        (300, [299]),
        (64, list(range(65))),
    ]


CASES = [*((n, counts) for n in range(1, 6) for counts in all_count_sets(n)), *some_count_sets()]


def size_of(n, counts):
    return CountSize(counts, n, Capped(cr.CountIn(counts), counts, n).cap)


def refusal(build):
    try:
        build()
    except cr.CircuitTooLargeError as error:
        return str(error)
    return None


def unbuildable(n, counts):
    """A circuit whose graph must not be asked for."""

    def build():
        raise AssertionError("the graph was built")

    return cr.Circuit(DeferredGraph(n, 1, 1, build), cr.CountIn(counts), counts)


def is_built(circuit):
    return "_built" in vars(circuit.graph)


def test_sizes_are_those_of_the_graph():
    for n, counts in CASES:
        graph, size = _graph(cr.CountIn(counts), n, 10**6), size_of(n, counts)
        assert (size.nodes, size.edges) == (graph.num_nodes, graph.num_edges), (n, counts)


def test_limits_refuse_what_building_refuses_and_say_the_same():
    refused = 0
    for n, counts in CASES[::7] + CASES[-6:]:
        constraint, graph = cr.CountIn(counts), _graph(cr.CountIn(counts), n, 10**6)
        nodes, by_edges = graph.num_nodes, graph.num_edges // 16
        for limit in {nodes - 2, nodes - 1, nodes, by_edges, by_edges + 1, n, 2 * n, 3 * n} - {-1, 0}:
            built = refusal(lambda c=constraint, n=n, limit=limit: _graph(c, n, limit))
            assert refusal(lambda c=constraint, n=n, limit=limit: compile_builtin(c, n, limit)) == built
            refused += built is not None
    assert refused > 50


def test_predictions_are_those_of_a_tree():
    for n, counts in CASES[::5] + CASES[-6:]:
        count = cr.CountIn(counts)
        assert size_of(n, counts).prediction(count) == _chosen(count, n, 10**6).prediction


def test_very_many_variables_are_refused_without_a_tree():
    """The scopes of a tree are bits: of so many variables they would not fit in memory."""
    with pytest.raises(cr.CircuitTooLargeError, match=r"needs \d+ nodes, with width 9 .*max_nodes=1000000"):
        cr.compile(cr.Exactly(8), 300_000)


def test_elements_beyond_the_limit_are_refused():
    """More than 16 elements a node, with all nodes within the limit."""
    with pytest.raises(
        cr.CircuitTooLargeError, match=r"29569023 elements \(the limit is 16 per node\).*max_nodes=1000000"
    ):
        cr.compile(cr.Exactly(2048), 16_384)


def test_large_counts_compile_to_their_size():
    circuit = cr.compile(cr.Exactly(2048), 65_536, max_nodes=9_000_000)
    assert (circuit.num_nodes, circuit.num_edges, circuit.max_count) == (978_943, 130_871_295, 2048)
    assert repr(circuit) == "Circuit(Exactly(2048), n=65536, nodes=978943, edges=130871295)"
    assert not is_built(circuit)


def test_the_graph_is_built_once_when_asked_for_and_shared():
    circuit = compile_builtin(cr.Between(2, 3), 9, 1000)
    forced = circuit.with_engine("torch")
    assert not is_built(circuit)
    assert circuit.model_count() == 36 + 84
    assert is_built(circuit)
    assert forced.graph is circuit.graph
    assert forced.graph.left is circuit.graph.left
    forced.check()
    plain = _graph(cr.Between(2, 3), 9, 1000)
    for name in ARRAYS:
        assert np.array_equal(getattr(circuit.graph, name), getattr(plain, name))


@pytest.mark.parametrize("engine", ["numba", "torch", "naive"])
def test_inference_asks_for_no_graph(engine):
    circuit = unbuildable(6, [2, 3]).with_engine(engine)
    logits = torch.linspace(-1, 1, 12).reshape(2, 6).requires_grad_()
    routing = cr.route(logits, circuit, key=cr.random_key(0, torch.arange(2)))
    (routing.gates.sum() + routing.log_prob.sum() + routing.marginals.square().sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert circuit.satisfies(routing.mask).all()
    conditioned = circuit(logits.detach()).condition(include=[0], exclude=[1, 2])
    assert conditioned.mode[:, 0].all()
    with pytest.raises(ValueError, match="rows 0, 1"):
        circuit(torch.full((2, 6), -torch.inf))
    with pytest.raises(AssertionError, match="the graph was built"):
        circuit.model_count()


def test_pickles_as_a_plain_graph():
    circuit = compile_builtin(cr.Exactly(3), 7, 1000)
    again = pickle.loads(pickle.dumps(circuit))
    assert type(again.graph) is Graph
    assert (again.counts, again.constraint, again.n) == ((3,), cr.Exactly(3), 7)
    for name in ARRAYS:
        assert np.array_equal(getattr(again.graph, name), getattr(circuit.graph, name))


def test_files_are_those_of_a_plain_graph(tmp_path):
    circuit = compile_builtin(cr.CountIn([1, 4]), 7, 1000)
    plain = cr.Circuit(_graph(cr.CountIn([1, 4]), 7, 1000), circuit.constraint, circuit.counts)
    circuit.save(tmp_path / "deferred.crc")
    plain.save(tmp_path / "plain.crc")
    assert (tmp_path / "deferred.crc").read_bytes() == (tmp_path / "plain.crc").read_bytes()


def test_a_wrong_size_is_an_error():
    graph = _graph(cr.Exactly(1), 3, 100)
    deferred = DeferredGraph(3, graph.num_nodes + 1, graph.num_edges, lambda: graph)
    with pytest.raises(ValueError, match=rf"num_nodes={graph.num_nodes + 1} .* {graph.num_nodes} nodes and"):
        _ = deferred.kind
