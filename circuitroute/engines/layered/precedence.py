"""Which of equally probable subsets is the mode: the smaller one, then the one whose increasing indices come first.

Legend: M nodes, N variables, W words.

What a circuit chooses among equals must not depend on its shape, so a subset has a *rank*, W integers that are compared
one after the other, larger ones first: minus its count; then, 64 variables to a word, lower ones in higher bits, which
of them are present. Among subsets of one size the list of indices that comes first in lexicographic order is the one
that holds the lowest variable in which they differ, so it has the larger bits.

Every word of a product is the sum of its factors' words, whichever variables these have, and integers are exact. So the
best rank of a sum is found like its largest value: among the elements that reach that value the first word decides,
among those that reach that as well the second one, and so on. Scores are equal when their float64 sums are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from circuitroute.circuit.graph import Graph, NodeKind, count_ranges

IntArray = npt.NDArray[np.int64]

BITS = 64
# No rank is lower: what elements that are out of the question have.
LOWEST = -(1 << (BITS - 1))


@dataclass(frozen=True)
class Precedence:
    """The words of a circuit's nodes, as far as they do not depend on the logits.

    Attributes:
        words: [W, M] int64, the word of a node where all its subsets share it; zero where there is a choice.
        open: [W, M] bool, where there is a choice.
    """

    words: IntArray
    open: npt.NDArray[np.bool_]

    @staticmethod
    def of(graph: Graph) -> Precedence:
        """Of a smooth, decomposable graph."""
        fewest, most = count_ranges(graph)
        chunks = -(-graph.n // BITS)
        is_literal = (graph.kind == NodeKind.ABSENT) | (graph.kind == NodeKind.PRESENT)
        literals, variable = np.flatnonzero(is_literal), graph.variable[is_literal].astype(np.int64)
        words = np.zeros((1 + chunks, graph.num_nodes), dtype=np.int64)
        mentions = np.zeros((graph.num_nodes, chunks), dtype=np.bool_)
        words[0] = np.where(fewest == most, -fewest, 0)
        words[1 + variable // BITS, literals] = _bits(variable, graph.kind[literals] == NodeKind.PRESENT)
        mentions[literals, variable // BITS] = True
        mentions = graph.fold(mentions, np.logical_or, np.logical_or)
        sums = graph.kind == NodeKind.SUM
        return Precedence(words, np.concatenate([[fewest < most], mentions.T]) & sums)


def _bits(variable: IntArray, present: npt.NDArray[np.bool_]) -> IntArray:
    """What literals add to the word of their variable: a bit if present.

    The highest bit is the sign, and stands for the first variable's absence instead, so that signed numbers compare as
    unsigned ones would.
    """
    place = BITS - 1 - variable % BITS
    sign = place == BITS - 1
    return np.where(sign, np.where(present, 0, LOWEST), np.where(present, np.int64(1) << np.where(sign, 0, place), 0))
