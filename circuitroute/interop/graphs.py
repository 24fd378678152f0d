"""A circuit as a networkx graph: the nodes and their products, losing nothing.

Arrows point from parents to children: sum -> product -> factor. The nodes of the circuit keep their index as name;
the product of element ``e`` is called ``("product", e)``. So the circuit's arrays can be read back::

    graph.graph["n"], graph.graph["root"]
    graph.nodes[i]["kind"]                   # "true", "absent", "present" or "sum"
    graph.nodes["product", e]["left"]        # and ["right"]: the factors in order, also where both are the same node
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from circuitroute.circuit import Compiled
from circuitroute.circuit.graph import Graph, NodeKind, count_ranges
from circuitroute.deadline import tick, within
from circuitroute.errors import CircuitTooLargeError

# Nodes and products: networkx takes some two kilobytes of each product.
MAX_ITEMS = 1_000_000


def to_networkx(circuit: Compiled) -> Any:
    """A ``networkx.DiGraph`` with a node per node and per product of the circuit.

    Every node has ``kind`` ("true", "absent", "present", "sum", "product"), ``level`` (0 for literals and
    constants; a product has that of its sum) and ``count_range`` (the smallest and the largest number of selected
    variables in what satisfies it). Literals have ``variable``; products have ``element``, ``left`` and ``right``.
    The graph has ``n``, ``root`` and ``constraint`` (its repr).

    Raises:
        CircuitTooLargeError: the circuit has more than a million nodes and products, or it takes too many CPU seconds.
    """
    items = circuit.graph.num_nodes + circuit.graph.num_edges
    if items > MAX_ITEMS:
        raise CircuitTooLargeError(
            f"the circuit over {circuit.n} variables has {items} nodes and products, and networkx takes some two "
            f"kilobytes for each; at most {MAX_ITEMS}: take a smaller n, or read the arrays of circuit.graph"
        )
    with within(doing=lambda: f"making a networkx graph of {items} nodes and products", remedy="take a smaller n"):
        return _view(circuit)


def _view(circuit: Compiled) -> Any:
    import networkx

    graph = circuit.graph
    view = networkx.DiGraph(n=graph.n, root=graph.num_nodes - 1, constraint=repr(circuit.constraint))
    fewest, most = (counts.tolist() for counts in count_ranges(graph))
    levels = graph.level_of.tolist()
    for node, kind in enumerate(graph.kind.tolist()):
        literal = {} if graph.variable[node] < 0 else {"variable": int(graph.variable[node])}
        name, counts = NodeKind(kind).name.lower(), (fewest[node], most[node])
        view.add_node(node, kind=name, level=levels[node], count_range=counts, **literal)
    for parent, element, left, right in elements(graph):
        counts = (fewest[left] + fewest[right], most[left] + most[right])
        tick(8)
        product = ("product", element)
        where = {"level": levels[parent], "element": element, "left": left, "right": right}
        view.add_node(product, kind="product", count_range=counts, **where)
        view.add_edges_from([(parent, product), (product, left), (product, right)])
    return view


def elements(graph: Graph) -> Iterator[tuple[int, int, int, int]]:
    """(sum, element, left, right) of every product."""
    first, left, right = graph.first.tolist(), graph.left.tolist(), graph.right.tolist()
    for node in range(graph.num_nodes):
        for element in range(first[node], first[node + 1]):
            yield node, element, left[element], right[element]
