"""A picture of a small circuit. Needs the `plot` extra.

The root stands at the top, and every other node just below what uses it: sums show how many variables may be selected
below them, black dots are products, x3 and ¬x3 literals. A product of one factor is the line itself. Nodes over the
same variables stand side by side, in the order of the variables, sums in a grey box that names them. Within a box they
are ordered by barycenters (Sugiyama, Tagawa and Toda, Methods for visual understanding of hierarchical system
structures, 1981); lines across several rows bend in each.
"""

from __future__ import annotations

import io
import os
from importlib import import_module
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from circuitroute._files import as_path, replace_file
from circuitroute.circuit import Compiled
from circuitroute.circuit.verify.properties import node_scopes
from circuitroute.interop.graphs import to_networkx
from circuitroute.plots import COLORS, DPI, new_figure

MAX_ITEMS = 400  # nodes and products: beyond, lines cannot be told apart
SUFFIXES = (".png", ".svg", ".pdf")
SWEEPS = 24
WIDE, NARROW = 1.0, 0.5  # between the centres of two nodes, and of two bends or products
INCHES = 0.62  # per unit of x and of y


def draw(circuit: Compiled, path: str | os.PathLike[str]) -> Path:
    """Draw the circuit, save it in the format of the suffix, and return the path.

    Raises:
        ValueError: another suffix than .png, .svg, .pdf, or more than 400 nodes and products.
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written; what was there before is left as it was.
    """
    target, graph = as_path("path", path), circuit.graph
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path={str(target)!r}: a circuit is drawn to a file ending in {', '.join(SUFFIXES)}")
    if graph.num_nodes + graph.num_edges > MAX_ITEMS:
        raise ValueError(
            f"{circuit.constraint!r} over {circuit.n} variables has {graph.num_nodes} nodes and {graph.num_edges} "
            f"products, and a picture has room for {MAX_ITEMS} of both: draw the constraint over fewer variables, or "
            "look at it with `circuitroute explain` or circuit.to_networkx()"
        )
    view, rows = layout(circuit)
    content = io.BytesIO()
    _paint(view, rows).savefig(content, dpi=DPI, format=target.suffix[1:].lower())
    replace_file(target, content.getvalue())
    return target


def layout(circuit: Compiled) -> tuple[Any, list[list[Any]]]:
    """The graph to draw, its edges between neighbouring rows only, and the rows from the root down, left to right.

    Its nodes are those of :func:`to_networkx` and bends, with their ``scope`` (a bit per variable), ``x`` and ``y``.
    """
    import networkx

    view = _drawn(circuit)
    for upper, lower in list(view.edges):
        bends = [("bend", upper, lower, y) for y in range(view.nodes[upper]["y"] - 1, view.nodes[lower]["y"], -1)]
        view.remove_edge(upper, lower)
        view.add_nodes_from((bend, {**view.nodes[lower], "kind": "bend", "y": bend[-1]}) for bend in bends)
        networkx.add_path(view, [upper, *bends, lower])
    met = list(networkx.dfs_preorder_nodes(view, view.graph["root"]))
    height = view.nodes.data("y").__getitem__
    rows = [list(row) for _, row in groupby(sorted(met, key=height, reverse=True), key=height)]
    _place(view, rows, [view.nodes[item]["variable"] for item in met if "variable" in view.nodes[item]])
    return view, rows


def _drawn(circuit: Compiled) -> Any:
    """The circuit below its root without factors of 1; every node one row below the lowest that uses it."""
    import networkx

    view, scopes = to_networkx(circuit), node_scopes(circuit.graph)
    true = [item for item, kind in view.nodes.data("kind") if kind == "true"]
    view.remove_edges_from([edge for edge in view.in_edges(true) if view.out_degree(edge[0]) > 1])
    view = view.subgraph(networkx.dfs_preorder_nodes(view, view.graph["root"])).copy()
    for row, items in enumerate(networkx.topological_generations(view)):
        for item in items:
            owner = next(view.predecessors(item)) if view.nodes[item]["kind"] == "product" else item
            view.nodes[item].update(y=-row, scope=scopes[owner])
    return view


def _place(view: Any, rows: list[list[Any]], variables: list[int]) -> None:
    """Sort every row by scope and barycenter, and move all as near to their neighbours as the room in a row allows."""
    place = {variable: i for i, variable in enumerate(dict.fromkeys(variables))}
    scope_of, kind_of = view.nodes.data("scope"), view.nodes.data("kind")
    middle = {scope: np.mean([place.get(v, 0) for v in _variables(scope)] or [0]) for _, scope in scope_of}
    half = {item: (NARROW if kind in ("product", "bend") else WIDE) / 2 for item, kind in kind_of}
    x = {item: float(i) for row in rows for i, item in enumerate(row)}

    def mean(item: Any, *neighbours: Any) -> float:
        return float(np.mean([x[other] for some in neighbours for other in some[item]] or [x[item]]))

    down, up = [(row, view.pred) for row in rows], [(row, view.succ) for row in reversed(rows)]
    for row, fixed in SWEEPS * [*down, *up]:
        row.sort(key=lambda item: (middle[scope_of[item]], scope_of[item], mean(item, fixed)))
        wanted = np.array([mean(item, view.pred, view.succ) for item in row])
        x.update(zip(row, spread(wanted, [half[a] + half[b] for a, b in pairwise(row)]).tolist(), strict=True))
    for item, at in x.items():
        view.nodes[item]["x"] = at


def spread(wanted: Any, room: Any) -> Any:
    """Places near the wanted ones that keep their order and room: half-way between pushing right and pushing left."""
    offset = np.concatenate([[0.0], np.cumsum(room)])
    slack = wanted - offset
    right, left = np.maximum.accumulate(slack), np.minimum.accumulate(slack[::-1])[::-1]
    return (right + left) / 2 + offset


# ---------------------------------------------------------------------------------------------- ink


def _paint(view: Any, rows: list[list[Any]]) -> Any:
    x = [at for _, at in view.nodes.data("x")]
    figure = new_figure(INCHES * (np.ptp(x) + 1.4), INCHES * (len(rows) - 1) + 0.9)
    axes = figure.subplots()
    axes.set_axis_off()
    for row in rows:
        sums = [view.nodes[item] for item in row if view.nodes[item]["kind"] == "sum"]
        for scope, some in groupby(sums, key=lambda data: data["scope"]):
            _box(axes, scope_text(scope), [data["x"] for data in some], sums[0]["y"])
    for ends in view.edges:
        places = [[view.nodes[item][axis] for item in ends] for axis in "xy"]
        axes.plot(*places, color="#666666", linewidth=0.9, solid_capstyle="round", zorder=1)
    for item, data in view.nodes.items():
        if data["kind"] == "product" and view.out_degree(item) == 2:
            axes.plot(data["x"], data["y"], "o", color="black", markersize=4, zorder=3)
        elif data["kind"] not in ("product", "bend"):
            _node(axes, data)
    axes.set(xlim=(min(x) - 0.7, max(x) + 0.7), ylim=(0.3 - len(rows), 0.7))
    return figure


def _box(axes: Any, label: str, x: list[float], y: int) -> None:
    left, width = min(x) - 0.42, np.ptp(x) + 0.84
    style = {"boxstyle": "round,pad=0,rounding_size=0.15", "facecolor": "#f0f0f0", "edgecolor": "#d8d8d8", "zorder": 0}
    axes.add_patch(import_module("matplotlib.patches").FancyBboxPatch((left, y - 0.36), width, 0.72, **style))
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.text(left + 0.04, y + 0.4, label, fontsize=6.5, color="#555555", va="bottom", bbox=clear, zorder=1.5)


def _node(axes: Any, data: Any) -> None:
    kind, (fewest, most) = data["kind"], data["count_range"]
    texts = {"true": "true", "sum": f"{fewest}" if fewest == most else f"{fewest}-{most}"}
    text = texts.get(kind) or f"{'¬' * (kind == 'absent')}x{data['variable']}"
    color = {"sum": COLORS[4], "present": COLORS[5]}.get(kind, "white")
    shape = f"round,pad=0.3,rounding_size={0.6 if kind == 'sum' else 0.15}"
    box = {"boxstyle": shape, "facecolor": color, "edgecolor": "black", "linewidth": 0.8}
    axes.text(data["x"], data["y"], text, ha="center", va="center", fontsize=9, bbox=box, zorder=2)


def scope_text(scope: int) -> str:
    """The variables of a scope, runs shortened: "x0-x3, x8"."""
    runs = [[v for _, v in run] for _, run in groupby(enumerate(_variables(scope)), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"x{run[0]}" if len(run) == 1 else f"x{run[0]}-x{run[-1]}" for run in runs)


def _variables(scope: int) -> list[int]:
    return [v for v in range(scope.bit_length()) if scope >> v & 1]
