"""Circuits as pictures, as networkx graphs and as sympy polynomials."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import sympy
import torch

import circuitroute as cr
from circuitroute.circuit import Graph, NodeKind
from circuitroute.circuit.graph import enumerate_models
from circuitroute.inference.circuit import Circuit, scientific
from circuitroute.interop import drawing
from circuitroute.interop.polynomial import MAX_ELEMENTS

GROUPS = cr.ActiveGroups(cr.Groups(2), at_most=1) & cr.Exactly(2)
CASES = [
    (cr.Exactly(1), 1),  # a single literal
    (cr.Exactly(2), 5),
    (GROUPS, 6),
    (cr.AtMost(1).over([0, 2]), 4),  # the constant true
    (cr.Cost([3, 1, 2, 2], at_most=4), 4),
    (~cr.Exactly(1).over([1, 3]) | cr.AtLeast(4), 5),
]
IDS = [repr(constraint) for constraint, _ in CASES]
cases = pytest.mark.parametrize(("constraint", "n"), CASES, ids=IDS)


def factors_the_root() -> Circuit:
    """Exactly(1) of one variable, whose root multiplies the constant true by itself on the way."""
    kinds = [NodeKind.TRUE, NodeKind.PRESENT, NodeKind.SUM, NodeKind.SUM]
    graph = Graph(
        n=1,
        kind=np.array(kinds, dtype=np.uint8),
        variable=np.array([-1, 0, -1, -1], dtype=np.int32),
        first=np.array([0, 0, 0, 1, 2]),
        left=np.array([0, 1], dtype=np.int32),
        right=np.array([0, 2], dtype=np.int32),
    )
    return Circuit(graph, cr.Exactly(1))


# ---------------------------------------------------------------------------------------------- networkx


def model_count(view: Any) -> int:
    """From the networkx graph alone."""
    counts: dict[Any, int] = {}
    for node in reversed(list(networkx.topological_sort(view))):
        match view.nodes[node]:
            case {"kind": "sum"}:
                counts[node] = sum(counts[child] for child in view.successors(node))
            case {"kind": "product", "left": left, "right": right}:
                counts[node] = counts[left] * counts[right]
            case _:
                counts[node] = 1
    return counts[view.graph["root"]]


def arrays(view: Any) -> dict[str, list[int]]:
    """The circuit's arrays, read back."""
    names = range(view.graph["root"] + 1)
    kinds = [NodeKind[view.nodes[i]["kind"].upper()] for i in names]
    products = [sorted(e for kind, e in view.successors(i)) if k == NodeKind.SUM else [] for i, k in enumerate(kinds)]
    elements = [view.nodes["product", e] for e in itertools.chain(*products)]
    return {
        "kind": [int(kind) for kind in kinds],
        "variable": [view.nodes[i].get("variable", -1) for i in names],
        "first": [0, *itertools.accumulate(len(p) for p in products)],
        "left": [element["left"] for element in elements],
        "right": [element["right"] for element in elements],
    }


@cases
def test_networkx_loses_nothing(constraint: cr.Constraint, n: int) -> None:
    circuit = cr.compile(constraint, n)
    view = circuit.to_networkx()
    assert model_count(view) == circuit.model_count()
    for name, values in arrays(view).items():
        assert values == getattr(circuit.graph, name).tolist(), name
    assert view.graph == {"n": n, "root": circuit.num_nodes - 1, "constraint": repr(constraint)}
    assert networkx.is_directed_acyclic_graph(view)


def test_networkx_keeps_a_product_of_a_node_with_itself() -> None:
    circuit = factors_the_root()
    view = circuit.to_networkx()
    assert arrays(view)["left"] == [0, 1]
    assert arrays(view)["right"] == [0, 2]
    assert model_count(view) == 1


def test_networkx_counts_and_levels() -> None:
    circuit = cr.compile(cr.Between(1, 3), 4)
    view = circuit.to_networkx()
    root = view.nodes[view.graph["root"]]
    assert root["count_range"] == (1, 3)
    assert root["level"] == circuit.depth
    for node, child in view.edges:
        upper, lower = view.nodes[node], view.nodes[child]
        assert upper["level"] > lower["level"] or lower["kind"] == "product"
        assert upper["count_range"][1] >= lower["count_range"][1]


# ---------------------------------------------------------------------------------------------- sympy


def monomial(mask: np.ndarray[Any, Any]) -> Any:
    return sympy.Mul(*(sympy.Symbol(f"x{i}" if selected else f"x{i}bar") for i, selected in enumerate(mask)))


@cases
def test_sympy_expands_to_exactly_the_models(constraint: cr.Constraint, n: int) -> None:
    circuit = cr.compile(constraint, n)
    models = sympy.Add(*(monomial(mask) for mask in enumerate_models(circuit.graph)))
    assert sympy.expand(circuit.to_sympy()) == models


@cases
def test_sympy_is_the_partition_function(constraint: cr.Constraint, n: int) -> None:
    circuit = cr.compile(constraint, n)
    theta = torch.linspace(-1.5, 2.0, n, dtype=torch.float64)
    weights = {f"x{i}": float(x.exp()) for i, x in enumerate(theta)} | {f"x{i}bar": 1.0 for i in range(n)}
    polynomial = circuit.to_sympy()
    value = float(polynomial.subs(weights))
    assert value == pytest.approx(float(circuit(theta).log_partition.exp()), rel=1e-12)
    x0 = sympy.Symbol("x0")
    marginal = float((x0 * polynomial.diff(x0)).subs(weights)) / value
    assert marginal == pytest.approx(float(circuit(theta).marginals[0]), rel=1e-12)


def test_sympy_of_constant_factors() -> None:
    assert factors_the_root().to_sympy() == sympy.Symbol("x0")


def test_sympy_refuses_large_circuits() -> None:
    with pytest.raises(ValueError, match=rf"has \d+ products, more than sympy handles well \({MAX_ELEMENTS}\)"):
        cr.compile(cr.Exactly(20), 128).to_sympy()


# ---------------------------------------------------------------------------------------------- pictures


@cases
def test_draw(constraint: cr.Constraint, n: int, tmp_path: Path) -> None:
    path = tmp_path / "circuit.svg"
    assert cr.compile(constraint, n).draw(path) == path
    picture = path.read_text(encoding="utf-8")
    for variable in range(n):
        assert f"<!-- x{variable} -->" in picture


def test_draw_shows_a_constant_that_stands_alone(tmp_path: Path) -> None:
    assert "<!-- true -->" in factors_the_root().draw(tmp_path / "circuit.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_draw_takes_the_format_from_the_suffix(suffix: str, magic: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"circuit{suffix}"
    assert cr.compile(cr.Exactly(2), 5).draw(str(path)) == path
    assert path.read_bytes().startswith(magic)


def test_draw_names_literals_counts_and_scopes(tmp_path: Path) -> None:
    path = cr.compile(cr.AtMost(1).over([0, 2]), 4).draw(tmp_path / "circuit.svg")
    texts = {line.strip()[5:-4] for line in path.read_text(encoding="utf-8").splitlines() if "<!--" in line}
    assert {"x0", "¬x0", "0-3", "0-1", "x0-x3", "x0, x2"} <= texts


@cases
def test_layout(constraint: cr.Constraint, n: int) -> None:
    """Every node but the constant once; edges between neighbouring rows; room between neighbours."""
    graph = cr.compile(constraint, n).graph
    view, rows = drawing.layout(cr.compile(constraint, n))
    drawn = [item for row in rows for item in row]
    assert len(set(drawn)) == len(drawn) == len(view)
    nodes = {item for item in drawn if isinstance(item, int)}
    assert nodes == set(np.flatnonzero(graph.kind != NodeKind.TRUE))
    for row in rows:
        assert (np.diff([view.nodes[item]["x"] for item in row]) >= drawing.NARROW - 1e-9).all()
        assert len({view.nodes[item]["y"] for item in row}) == 1
        scopes = [scope for scope, _ in itertools.groupby(row, key=view.nodes.data("scope").__getitem__)]
        assert len(set(scopes)) == len(scopes), "nodes over the same variables stand together"
    for upper, lower in view.edges:
        assert view.nodes[upper]["y"] == view.nodes[lower]["y"] + 1
    assert not any(kind == "bend" for _, kind in view.nodes.data("kind")), "compiled circuits follow one tree"


def test_layout_bends_lines_across_rows() -> None:
    """(x0 & ~x1) & x2 | (x1 & ~x2) & x0: x0 is a factor of the root's products and of what they multiply."""
    literals = [(0, True), (1, False), (1, True), (2, False), (2, True)]
    kinds = [*(NodeKind.PRESENT if present else NodeKind.ABSENT for _, present in literals), *[NodeKind.SUM] * 3]
    graph = Graph(
        n=3,
        kind=np.array(kinds, dtype=np.uint8),
        variable=np.array([*(variable for variable, _ in literals), -1, -1, -1], dtype=np.int32),
        first=np.array([0, 0, 0, 0, 0, 0, 1, 2, 4]),
        left=np.array([0, 2, 5, 6], dtype=np.int32),
        right=np.array([1, 3, 4, 0], dtype=np.int32),
    )
    view, rows = drawing.layout(Circuit(graph, cr.Exactly(2)))
    assert [len(row) for row in rows] == [1, 2, 4, 3, 4]
    assert all(view.nodes[upper]["y"] == view.nodes[lower]["y"] + 1 for upper, lower in view.edges)
    assert sum(kind == "bend" for _, kind in view.nodes.data("kind")) == 2


def test_ordering_removes_crossings() -> None:
    """Two sums over x0, x1 that are met the wrong way round."""
    view = networkx.DiGraph([("c", 1), ("c", 2), ("a", "x0"), ("b", "x1"), (1, "b"), (2, "a")])
    for item in view:
        view.nodes[item].update(kind="sum", scope=3)
    view.nodes["x0"]["scope"], view.nodes["x1"]["scope"] = 1, 2
    rows: list[list[Any]] = [["c"], [1, 2], ["a", "b"], ["x0", "x1"]]
    drawing._place(view, rows, [0, 1])
    assert (rows[1], rows[2]) in [([1, 2], ["b", "a"]), ([2, 1], ["a", "b"])]


def test_spread_keeps_order_and_room_near_the_wanted_places() -> None:
    places = drawing.spread(np.array([0.0, 0.0, 5.0]), np.array([1.0, 1.0]))
    np.testing.assert_allclose(places, [-0.5, 0.5, 5.0])


def test_draw_refuses_large_circuits(tmp_path: Path) -> None:
    circuit = cr.compile(cr.Exactly(8), 64)
    sizes = f"has {circuit.num_nodes} nodes and {circuit.num_edges} products"
    with pytest.raises(ValueError, match=rf"{sizes}, and a picture has room for 400 of both: .*to_networkx"):
        circuit.draw(tmp_path / "circuit.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["circuit", "circuit.gif", "png"])
def test_draw_refuses_other_formats(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a file ending in \.png, \.svg, \.pdf"):
        cr.compile(cr.Exactly(2), 5).draw(tmp_path / name)


def test_draw_names_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'circuitroute\[plot\]'"):
        cr.compile(cr.Exactly(2), 5).draw(tmp_path / "circuit.png")


# ---------------------------------------------------------------------------------------------- large counts


@pytest.mark.parametrize("exponent", [15, 16, 22, 23, 305, 5000])
@pytest.mark.parametrize(("leading", "shown"), [(10**6, "1.000"), (9_999_999, "9.999"), (4_242_424, "4.242")])
def test_scientific(exponent: int, leading: int, shown: str) -> None:
    count = leading * 10 ** (exponent - 6)
    for near in (count, count + 1):
        assert scientific(near) == f"{shown}e{exponent}"


def test_the_summary_of_a_count_too_long_to_print() -> None:
    summary = cr.compile(cr.AtMost(1).over([0, 1]), 15_000).summary()
    assert "models" in summary
    assert "e4515" in summary  # 3/4 of 2^15000
