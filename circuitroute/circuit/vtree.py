"""Vtrees: binary trees over the variables, which say where a structured circuit's products split.

A circuit *respects* a vtree if every product's two factors lie in the two halves of one vtree node (Pipatsrisawat &
Darwiche, New compilation languages based on structured decomposability, 2008). Two circuits that respect one vtree are
compatible: their product is a circuit again, of pairs of their nodes (Shen, Choi & Darwiche, Tractable operations for
arithmetic circuits, 2016).

Legend: n variables; a vtree has 2 n - 1 nodes, number v < n the leaf of variable v, the others inner ones, halves
before wholes; the last is the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from circuitroute._validate import as_int, as_items, as_mask, index_tuple, int_at_least
from circuitroute.circuit.clustering import clustered
from circuitroute.circuit.compiled import Compiled
from circuitroute.circuit.separation import Halves, recovered


@dataclass(frozen=True)
class Vtree:
    """A binary tree over the variables 0 to n - 1; immutable and hashable.

    Made by :meth:`balanced`, :meth:`linear`, :meth:`clustered`, :meth:`of_nested`, :meth:`of_circuit`, or of its parts.

    Args:
        n: number of variables.
        halves: the two halves of every inner node: node ``n + i`` has the halves ``halves[i]``, both earlier nodes;
            nodes 0 to n - 1 are the variables, the last node is the root.

    Raises:
        TypeError: something is no integer, or ``halves`` no sequence of pairs.
        ValueError: this is no tree over all variables.
    """

    n: int
    halves: Halves

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", int_at_least("n", self.n, 1))
        pairs = tuple(_pair(i, pair) for i, pair in enumerate(as_items("halves", self.halves, "pairs of nodes")))
        object.__setattr__(self, "halves", pairs)
        for i, pair in enumerate(pairs):
            if max(pair) >= self.n + i:
                raise ValueError(
                    f"halves[{i}]={pair}: node {self.n + i} must come after its halves; number the leaves 0 to "
                    f"{self.n - 1} and the inner nodes from {self.n} on, halves before wholes"
                )
        if sorted(node for pair in pairs for node in pair) != list(range(2 * self.n - 2)):
            raise ValueError(
                f"halves={pairs}: a vtree over n={self.n} variables has {self.n - 1} inner nodes, and every node but "
                "the last is a half of exactly one other"
            )

    @staticmethod
    def balanced(variables: int | Sequence[int]) -> Vtree:
        """The vtree that halves the variables again and again.

        Args:
            variables: how many, in their natural order; or all of them, in the order of the leaves.
        """
        return Vtree.of_nested(_halved(_ordered(variables)))

    @staticmethod
    def linear(variables: int | Sequence[int]) -> Vtree:
        """The right-linear vtree, that of decision diagrams: every left half is a leaf.

        Args:
            variables: how many, in their natural order; or all of them, in the order of the leaves.
        """
        order = _ordered(variables)
        nested: Any = order[-1]
        for variable in reversed(order[:-1]):
            nested = (variable, nested)
        return Vtree.of_nested(nested)

    @staticmethod
    def of_nested(nested: Any) -> Vtree:
        """The vtree that is written as pairs of pairs, such as ``((0, 1), (2, 3))``.

        Raises:
            TypeError, ValueError: it is not made of pairs, or its leaves are not 0 to n - 1, once each.
        """
        leaves: list[int] = []
        inner: list[tuple[int, int]] = []  # leaves as they are, inner node i as ~i, until it is known how many leaves
        done: list[int] = []
        waiting: list[tuple[Any, bool]] = [(nested, False)]
        while waiting:
            part, complete = waiting.pop()
            if complete:
                right, left = done.pop(), done.pop()
                inner.append((left, right))
                done.append(~(len(inner) - 1))
            elif isinstance(part, (tuple, list)):
                if len(part) != 2:
                    raise ValueError(f"nested holds {part!r}: every part must be a variable, or a pair of parts")
                waiting += [(part, True), (part[1], False), (part[0], False)]
            else:
                leaves.append(int_at_least("nested", part, 0))
                done.append(leaves[-1])
        n = len(leaves)
        if sorted(leaves) != list(range(n)):
            raise ValueError(f"nested has the leaves {sorted(leaves)}: give each of the variables 0 to {n - 1} once")
        pairs = tuple((a if a >= 0 else n + ~a, b if b >= 0 else n + ~b) for a, b in inner)
        return Vtree(n, pairs)

    @staticmethod
    def of_circuit(circuit: Compiled) -> Vtree:
        """A vtree that a circuit respects: every compiled constraint's, and that of every SDD.

        Where the circuit leaves open how variables are to be split, they are split in balance.

        Raises:
            CircuitPropertyError: there is none; the message names a node that contradicts the others.
            CircuitTooLargeError: finding it takes too long.
        """
        return Vtree(circuit.n, recovered(circuit.graph))

    @staticmethod
    def clustered(masks: Tensor) -> Vtree:
        """A vtree for data: variables that say much about one another meet low in the tree.

        Args:
            masks: [..., N] observed subsets, bool or 0/1.

        Raises:
            TypeError, ValueError: they are no masks, there are none, or they are over no variable.
        """
        selected = as_mask("masks", masks, masks.shape[-1] if isinstance(masks, Tensor) and masks.dim() else 1)
        n = int_at_least("the last dimension of masks", selected.shape[-1], 1)
        rows = selected.reshape(-1, n).cpu().numpy()
        if not len(rows):
            raise ValueError(f"masks has shape {tuple(masks.shape)}: give at least one mask")
        return Vtree.of_nested(clustered(rows))

    @property
    def num_nodes(self) -> int:
        """2 n - 1: leaves and inner nodes."""
        return 2 * self.n - 1

    @cached_property
    def scopes(self) -> tuple[int, ...]:
        """The variables below each node as bit sets."""
        scopes = [1 << v for v in range(self.n)]
        for left, right in self.halves:
            scopes.append(scopes[left] | scopes[right])
        return tuple(scopes)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The node that each node is a half of; -1 for the root."""
        parents = [-1] * self.num_nodes
        for i, pair in enumerate(self.halves):
            for half in pair:
                parents[half] = self.n + i
        return tuple(parents)

    def place(self, scope: int) -> int:
        """The smallest node whose variables include those of a bit set."""
        node = self.num_nodes - 1
        while node >= self.n:
            inside = [half for half in self.halves[node - self.n] if not scope & ~self.scopes[half]]
            if not inside:
                break
            node = inside[0]
        return node

    def nested(self) -> Any:
        """The vtree as pairs of pairs of variables; see :meth:`of_nested`."""
        parts: list[Any] = list(range(self.n))
        for left, right in self.halves:
            parts.append((parts[left], parts[right]))
        return parts[-1]


def _pair(i: int, pair: object) -> tuple[int, int]:
    items = as_items(f"halves[{i}]", pair, "a pair of nodes")
    if len(items) != 2:
        raise ValueError(f"halves[{i}]={pair!r}: every inner node has two halves")
    left, right = (int_at_least(f"halves[{i}]", half, 0) for half in items)
    return left, right


def _ordered(variables: int | Sequence[int]) -> list[int]:
    """All variables, in the order of the leaves."""
    if getattr(variables, "ndim", 0) == 0 and not isinstance(variables, (list, tuple, range)):
        return list(range(int_at_least("variables", as_int("variables", variables), 1)))
    order = list(index_tuple("variables", variables))  # type: ignore[arg-type]
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"variables={order}: give each of the variables 0 to {len(order) - 1} once")
    return order


def _halved(order: Sequence[int]) -> Any:
    if len(order) == 1:
        return order[0]
    middle = (len(order) + 1) // 2
    return _halved(order[:middle]), _halved(order[middle:])
