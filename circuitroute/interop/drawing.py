"""A picture of a small circuit. Needs the `plot` extra.

Literals stand at the bottom (x3 selected, ¬x3 not), sums above them, level by level, showing how many variables may be
selected below them; black dots are products. A product of one factor is the line itself. Nodes over the same variables
stand side by side, in the order of the variables, in a grey box that names them. Within a box they are ordered by
barycenters (Sugiyama, Tagawa and Toda, Methods for visual understanding of hierarchical system structures, 1981): edges
across several rows pass through a bend of their own in each, sweeps move every item to the mean of its neighbours, and
the order with the fewest crossings wins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from circuitroute.circuit import Compiled
from circuitroute.circuit.graph import Graph, NodeKind, count_ranges
from circuitroute.circuit.verify.properties import node_scopes
from circuitroute.plots import COLORS, DPI, new_figure

MAX_ITEMS = 400  # nodes and products: beyond, lines cannot be told apart
SUFFIXES = (".png", ".svg", ".pdf")
SWEEPS = 24
WIDE, NARROW = 1.0, 0.5  # between the centres of two nodes, and of two bends or products
ROW = 0.62  # inches
FloatArray = npt.NDArray[np.float64]


def draw(circuit: Compiled, path: str | os.PathLike[str]) -> Path:
    """Draw the circuit, save it in the format of the suffix, and return the path.

    Raises:
        ValueError: another suffix than .png, .svg, .pdf, or more than 400 nodes and products.
        ImportError: matplotlib is not installed.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path={str(path)!r}: a circuit is drawn to a file ending in {', '.join(SUFFIXES)}")
    graph = circuit.graph
    items = graph.num_nodes + graph.num_edges
    if items > MAX_ITEMS:
        raise ValueError(
            f"{circuit.constraint!r} over {circuit.n} variables has {graph.num_nodes} nodes and {graph.num_edges} "
            f"products, and a picture has room for {MAX_ITEMS} of both: draw the constraint over fewer variables, or "
            "look at it with `circuitroute explain` or circuit.to_networkx()"
        )
    layout = _layout(graph)
    figure = _paint(graph, layout)
    figure.savefig(target, dpi=DPI, format=target.suffix[1:].lower())
    return target


# ---------------------------------------------------------------------------------------------- rows and edges


@dataclass
class _Layout:
    """Items in rows from the bottom (literals, products, sums, products, ...) with edges between neighbouring rows.

    Attributes:
        row: the row of each item; an item below the number of circuit nodes is that node.
        scope: the variables below each item, a bit each; a bend has those of the node it leads to.
        lower: for each item, the items of the next lower row that it is joined to.
        bends: items that only carry a line across a row.
        products: items that are products of two factors.
        rows: the items of each row, from left to right.
        x: where each item stands.
    """

    row: list[int]
    scope: list[int]
    lower: list[list[int]]
    bends: set[int] = field(default_factory=set)
    products: set[int] = field(default_factory=set)
    rows: list[list[int]] = field(default_factory=list)
    x: FloatArray = field(default_factory=lambda: np.zeros(0))

    def add(self, row: int, scope: int) -> int:
        self.row.append(row)
        self.scope.append(scope)
        self.lower.append([])
        return len(self.row) - 1

    def join(self, upper: int, lower: int) -> None:
        """An edge, through a bend in every row between the two."""
        for row in range(self.row[upper] - 1, self.row[lower], -1):
            bend = self.add(row, self.scope[lower])
            self.bends.add(bend)
            self.lower[upper].append(bend)
            upper = bend
        self.lower[upper].append(lower)


def _layout(graph: Graph) -> _Layout:
    layout = _rows(graph)
    layout.rows = _fewest_crossings(layout, graph)
    layout.x = _positions(layout)
    return layout


def _rows(graph: Graph) -> _Layout:
    """Sums at even rows, their products just below; the constant true is left out, being a factor of 1."""
    rows = [2 * level for level in graph.level_of.tolist()]
    layout = _Layout(rows, node_scopes(graph), [[] for _ in rows])
    for node in np.flatnonzero(graph.kind == NodeKind.SUM).tolist():
        for e in range(int(graph.first[node]), int(graph.first[node + 1])):
            pair = (int(graph.left[e]), int(graph.right[e]))
            factors = [f for f in pair if graph.kind[f] != NodeKind.TRUE]
            if len(factors) == 2:
                product = layout.add(layout.row[node] - 1, layout.scope[node])
                layout.products.add(product)
                layout.join(node, product)
                for factor in factors:
                    layout.join(product, factor)
            else:
                layout.join(node, (factors or pair)[0])
    return layout


def _reached(layout: _Layout, root: int) -> list[int]:
    """The items below the root, in the order of a walk that goes down before it goes right."""
    seen, stack, reached = {root}, [root], []
    while stack:
        item = stack.pop()
        reached.append(item)
        fresh = [child for child in dict.fromkeys(layout.lower[item]) if child not in seen]
        seen.update(fresh)
        stack.extend(reversed(fresh))
    return reached


# ---------------------------------------------------------------------------------------------- order


def _fewest_crossings(layout: _Layout, graph: Graph) -> list[list[int]]:
    root = graph.num_nodes - 1
    reached = _reached(layout, root)
    literals = [int(graph.variable[item]) for item in reached if layout.row[item] == 0]
    place = {variable: i for i, variable in enumerate(dict.fromkeys(literals))}
    middle = [_middle(scope, place) for scope in layout.scope]
    rows = [[item for item in reached if layout.row[item] == r] for r in range(layout.row[root] + 1)]
    for row in rows:
        row.sort(key=lambda item: middle[item])
    upper: list[list[int]] = [[] for _ in layout.row]
    for item in reached:
        for child in layout.lower[item]:
            upper[child].append(item)
    best, fewest = [list(row) for row in rows], _crossings(rows, layout.lower)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for r in range(len(rows) - 2, -1, -1) if down else range(1, len(rows)):
            _sort(rows[r], rows[r + 1 if down else r - 1], upper if down else layout.lower, middle)
        crossings = _crossings(rows, layout.lower)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _middle(scope: int, place: dict[int, int]) -> tuple[float, int]:
    """Where the variables of a scope stand on average, and the scope itself, so that no two scopes mix."""
    places = [place[v] for v in _variables(scope) if v in place]
    return (float(np.mean(places)) if places else 0.0), scope


def _sort(
    row: list[int],
    fixed: Sequence[int],
    neighbours: Sequence[Sequence[int]],
    middle: Sequence[tuple[float, int]],
) -> None:
    """Order a row by scope, then by the mean place of the neighbours in the fixed row; ties keep their order."""
    place = {item: i / max(len(fixed) - 1, 1) for i, item in enumerate(fixed)}
    own = {item: i / max(len(row) - 1, 1) for i, item in enumerate(row)}
    row.sort(key=lambda item: (middle[item], np.mean([place[other] for other in neighbours[item]] or [own[item]])))


def _crossings(rows: Sequence[Sequence[int]], lower: Sequence[Sequence[int]]) -> int:
    """Pairs of edges between neighbouring rows whose ends are in opposite order."""
    total = 0
    for below, above in pairwise(rows):
        place = {item: i for i, item in enumerate(below)}
        ends = np.array([(i, place[child]) for i, item in enumerate(above) for child in lower[item]])
        order = np.sign(ends[:, None, :] - ends[None, :, :])
        total += int((order[..., 0] * order[..., 1] < 0).sum()) // 2
    return total


# ---------------------------------------------------------------------------------------------- places


def _positions(layout: _Layout) -> FloatArray:
    """x of every item: as near as the room between neighbours allows to the mean of what it is joined to."""
    x = np.zeros(len(layout.row))
    for row in layout.rows:
        x[row] = _spread(np.zeros(len(row)), _room(layout, row))
    joined: list[list[int]] = [list(children) for children in layout.lower]
    for item, children in enumerate(layout.lower):
        for child in children:
            joined[child].append(item)
    for _ in range(SWEEPS):
        for row in [*layout.rows, *reversed(layout.rows)]:
            wanted = np.array([x[joined[item]].mean() if joined[item] else x[item] for item in row])
            x[row] = _spread(wanted, _room(layout, row))
    return x


def _room(layout: _Layout, row: Sequence[int]) -> FloatArray:
    """The distance wanted between each two neighbours of a row."""
    half = np.array([NARROW if item in layout.bends or item in layout.products else WIDE for item in row]) / 2
    room: FloatArray = half[1:] + half[:-1]
    return room


def _spread(wanted: FloatArray, room: FloatArray) -> FloatArray:
    """The places nearest to the wanted ones (least squares) that keep order and room.

    With the room taken off this is isotonic regression, done by pooling adjacent violators.
    """
    offset = np.concatenate([[0.0], np.cumsum(room)])
    pools: list[tuple[float, int]] = []  # mean, size
    for value in wanted - offset:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, m), (a, k) = pools.pop(), pools.pop()
            pools.append(((a * k + b * m) / (k + m), k + m))
    places: FloatArray = np.concatenate([np.full(size, mean) for mean, size in pools]) + offset
    return places


# ---------------------------------------------------------------------------------------------- ink


def _paint(graph: Graph, layout: _Layout) -> Any:
    x = layout.x
    drawn = [item for row in layout.rows for item in row]
    height = ROW * (len(layout.rows) - 1)
    figure = new_figure(0.62 * (np.ptp(x[drawn]) + 1.4), height + 0.9)
    axes = figure.subplots()
    axes.set_axis_off()
    for scope, items in _boxes(layout):
        _box(axes, scope, x[items], layout.row[items[0]])
    for item in drawn:
        for child in layout.lower[item]:
            _line(axes, layout, item, child)
    fewest, most = count_ranges(graph)
    for item in drawn:
        at = (x[item], layout.row[item])
        if item in layout.products:
            axes.plot(*at, "o", color="black", markersize=4, zorder=3)
        elif item not in layout.bends:
            _node(axes, graph, item, at, _range_text(int(fewest[item]), int(most[item])))
    axes.set(xlim=(x[drawn].min() - 0.7, x[drawn].max() + 0.7), ylim=(-0.7, len(layout.rows) - 0.3))
    return figure


def _boxes(layout: _Layout) -> Iterator[tuple[int, list[int]]]:
    """(scope, sums) of every run of sums over the same variables in a row."""
    for row in layout.rows[2::2]:
        sums = [item for item in row if item not in layout.bends]
        for scope, items in groupby(sums, key=layout.scope.__getitem__):
            yield scope, list(items)


def _box(axes: Any, scope: int, x: FloatArray, row: int) -> None:
    patches = import_module("matplotlib.patches")
    left, width = x.min() - 0.42, np.ptp(x) + 0.84
    style = "round,pad=0,rounding_size=0.15"
    box = patches.FancyBboxPatch(
        (left, row - 0.36), width, 0.72, boxstyle=style, facecolor="#f0f0f0", edgecolor="#d8d8d8", zorder=0
    )
    axes.add_patch(box)
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    label = scope_text(scope)
    axes.text(left + 0.04, row + 0.4, label, fontsize=6.5, color="#555555", va="bottom", bbox=clear, zorder=1.5)


def scope_text(scope: int) -> str:
    """The variables of a scope, runs shortened: "x0-x3, x8"."""
    runs: list[list[int]] = []
    for v in _variables(scope):
        if runs and v == runs[-1][-1] + 1:
            runs[-1].append(v)
        else:
            runs.append([v])
    return ", ".join(f"x{run[0]}" if len(run) == 1 else f"x{run[0]}-x{run[-1]}" for run in runs)


def _variables(scope: int) -> list[int]:
    return [v for v in range(scope.bit_length()) if scope >> v & 1]


def _line(axes: Any, layout: _Layout, upper: int, lower: int) -> None:
    axes.plot(
        [layout.x[upper], layout.x[lower]],
        [layout.row[upper], layout.row[lower]],
        color="#666666",
        linewidth=0.9,
        solid_capstyle="round",
        zorder=1,
    )


def _node(axes: Any, graph: Graph, node: int, at: tuple[float, int], counts: str) -> None:
    kind = NodeKind(int(graph.kind[node]))
    text = {
        NodeKind.TRUE: "true",
        NodeKind.ABSENT: f"¬x{graph.variable[node]}",
        NodeKind.PRESENT: f"x{graph.variable[node]}",
        NodeKind.SUM: counts,
    }[kind]
    color = {NodeKind.SUM: COLORS[4], NodeKind.PRESENT: COLORS[5]}.get(kind, "white")
    shape = "round,pad=0.3,rounding_size=0.6" if kind == NodeKind.SUM else "round,pad=0.3,rounding_size=0.15"
    box = {"boxstyle": shape, "facecolor": color, "edgecolor": "black", "linewidth": 0.8}
    axes.text(*at, text, ha="center", va="center", fontsize=9, bbox=box, zorder=2)


def _range_text(fewest: int, most: int) -> str:
    return f"{fewest}" if fewest == most else f"{fewest}-{most}"
