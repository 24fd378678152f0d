"""The example of logic layers: its constraints against other ways to say them, and a small run of everything."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import networkx
import pytest
import torch
from logic_layers import command
from logic_layers.hierarchy import hierarchical_labels, hierarchy_constraint, parents_of_classes
from logic_layers.learning import METHODS, Setting, run
from logic_layers.paths import grid_edges, path_constraint, shortest_paths
from logic_layers.report import table

import circuitroute as cr
from circuitroute.testing import Case, CompilerContract

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "examples" / "rows" / "logic-layers.jsonl"


def _is_path(size, selected):
    graph = networkx.Graph(grid_edges(size, size)[i] for i in selected)
    graph.add_nodes_from([0, size * size - 1])
    degrees = dict(graph.degree)
    ends = {v for v, degree in degrees.items() if degree == 1}
    one_line = networkx.is_connected(graph) and max(degrees.values()) <= 2
    return one_line and ends == {0, size * size - 1}


class TestPaths(CompilerContract):
    namespace = vars(cr)

    def cases(self):
        yield Case(path_constraint(2), 4, lambda selected: _is_path(2, selected))
        yield Case(path_constraint(2) & cr.AtLeast(3), 4, lambda selected: False)


@pytest.mark.parametrize("size", [3, 4])
def test_the_paths_of_a_grid_are_all_simple_ones(size):
    edges = grid_edges(size, size)
    circuit = cr.compile(path_constraint(size), len(edges))
    graph = networkx.Graph(edges)
    expected = set()
    for path in networkx.all_simple_paths(graph, 0, size * size - 1):
        steps = {tuple(sorted(pair)) for pair in pairwise(path)}
        expected.add(tuple(float(edge in steps) for edge in edges))
    found = circuit(torch.zeros(len(edges))).enumerate_support().tolist()
    assert len(found) == len(expected) == circuit.model_count() == {3: 12, 4: 184}[size]
    assert set(map(tuple, found)) == expected
    circuit.check()


def test_the_classes_above_a_class_come_with_it():
    parents = parents_of_classes()
    assert len(parents) == 52
    assert sum(len(up) == 2 for up in parents) == 6
    assert all(p < c for c, up in enumerate(parents) for p in up)
    few = ((), (0,), (0,), (1, 2))
    circuit = cr.compile(hierarchy_constraint(few), 4)
    worlds = [z for z in product((False, True), repeat=4) if all(z[p] for c in range(4) if z[c] for p in few[c])]
    found = circuit(torch.zeros(4)).enumerate_support().bool().tolist()
    assert sorted(map(tuple, found)) == sorted(worlds)


@pytest.mark.parametrize("make", [shortest_paths, hierarchical_labels])
def test_labels_satisfy_the_rules_and_depend_on_the_seed_alone(make):
    task, again, other = make(20, 10, 30, 0), make(20, 10, 30, 0), make(20, 10, 30, 1)
    for part, size in ((task.train, 20), (task.validation, 10), (task.test, 30)):
        assert part.y.shape == (size, task.circuit.n)
        assert bool(task.circuit.satisfies(part.y).all())
    assert torch.equal(task.test.x, again.test.x)
    assert torch.equal(task.test.y, again.test.y)
    assert not torch.equal(task.test.x, other.test.x)
    assert bool(task.known.all())


def test_shortest_paths_are_shortest():
    task = shortest_paths(5, 5, 200, 0, noise=0.0)
    # Without noise a path is a function of the features, and several are met.
    assert len(task.test.y.unique(dim=0)) > 10
    assert bool((task.test.y.sum(-1) >= 6).all())


def test_a_small_run_of_everything(tmp_path, capsys):
    rows, picture = tmp_path / "rows", tmp_path / "picture.svg"
    command.main(["run", "--rows", str(rows), "--seeds", "1", "--sizes", "40", "20", "30", "--epochs", "2"])
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert len(found) == 3 * len(METHODS)
    for row in found:
        assert 0 <= row["exact"] <= row["f1"] <= 1
        if row["method"].startswith("ConstraintLayer") or "mode" in row["method"]:
            assert row["violations"] == 0
    assert any(row["violations"] > 0 for row in found)
    printed = capsys.readouterr().out
    assert table(found) in printed
    command.main(["show", "--rows", str(rows), "--picture", str(picture)])
    drawn = picture.read_bytes()
    assert b"<svg" in drawn
    command.main(["show", "--rows", str(rows), "--picture", str(picture)])
    assert picture.read_bytes() == drawn  # the same rows are the same file


def test_the_layer_finds_more_paths_than_the_plain_net_with_hidden_labels_too():
    """On the smallest grid with room for a choice, with few rows: what the study shows at length."""
    task = shortest_paths(150, 50, 200, 0, size=3, features=4)
    plain, _, _, layer, _ = run(task, 0, Setting(width=32, epochs=12))
    assert layer["exact"] > plain["exact"]
    assert layer["violations"] == 0 < plain["violations"]


def test_the_page_shows_the_rows():
    page = (ROOT / "docs" / "logic-layers.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    assert table(rows) in page
    assert all(row["violations"] == 0 for row in rows if row["method"].startswith("ConstraintLayer"))
