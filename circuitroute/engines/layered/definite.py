"""The graphs that engines run for a circuit: nodes split by their count, where that is cheap and of use.

Nodes of definite count allow the logits to be shifted, which keeps float32 in range when they ask for many more or
fewer variables than the constraint allows, and make the posterior of the count a by-product. Compilers may have merged
nodes of different counts.

A shift moves the expected count into the range of those allowed. Where that is all of 0..N, as with most formulas,
there is none, and splitting would only make the circuit larger: by ten times and more for the class hierarchies of
multi-label classification. Moments then come from the circuit as it is. Samples stay with the split one, whose nodes
number the uniforms that a sample is made of.
"""

from __future__ import annotations

from circuitroute.circuit.counting import has_definite_counts, most_elements_split, split_by_count
from circuitroute.circuit.graph import Graph, count_range

# The split graph may have this many times more elements, or up to SMALL, which cost next to nothing.
MAX_GROWTH = 4
SMALL = 10_000


def evaluated(graph: Graph) -> Graph:
    """The graph, split by count unless it has definite counts already or would grow too much."""
    if has_definite_counts(graph):
        return graph
    affordable = max(MAX_GROWTH * graph.num_edges, SMALL)
    return split_by_count(graph) if most_elements_split(graph) <= affordable else graph


def lean(graph: Graph) -> Graph:
    """The graph for moments alone: :func:`evaluated`, unless shifts are 0 whatever the logits; then as it is."""
    return graph if count_range(graph) == (0, graph.n) else evaluated(graph)
