"""Graphs from the nodes of foreign circuits: binary products, smooth sums, no dead branches.

Legend: a *value* is what a foreign node became: None for false, a node, or the two factors of a product that no node
was made for (an element of a sum needs none).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.circuit.verify.bitsets import Pool, members
from circuitroute.deadline import tick
from circuitroute.errors import CircuitTooLargeError

Pair: TypeAlias = tuple[int, int]
# The variables that are absent, and those that are present, as bit sets.
Units: TypeAlias = tuple[int, int]
Value: TypeAlias = int | Pair | None

MAX_VARIABLES = 1 << 16
# Elements are two 32-bit indices; a circuit may have this many of them per allowed node.
EDGES_PER_NODE = 16
TRUE = 0


class Builder:
    """Nodes in the order they are made, children first.

    Args:
        n: number of variables.
        max_nodes: the largest circuit to build.
        source: the name of what is read, for messages.

    Attributes:
        source: the name, as it was given.
        scope: the variables below each node, as bit sets.
        origin: for each node the foreign node it was made for, -1 where smoothing made it.
    """

    def __init__(self, n: int, max_nodes: int, source: str) -> None:
        if n > MAX_VARIABLES:
            raise CircuitTooLargeError(f"{source} has {n} variables, more than the {MAX_VARIABLES} that can be read")
        self.n = n
        self.scope: list[int] = []
        self.origin: list[int] = []
        self._max_nodes = max_nodes
        self.source = source
        self._kind: list[int] = []
        self._variable: list[int] = []
        self._elements: list[Sequence[Pair]] = []
        self._edges = 0
        self._pool = Pool()
        self._literals: dict[Pair, int] = {}
        self._products: dict[Pair, int] = {}
        self._free: dict[int, int] = {}
        self._units: list[Units] = []
        self._bared: dict[int, int] = {}
        self._conditioned: dict[tuple[int, Units], int | None] = {}
        self._add(NodeKind.TRUE, -1, (), 0, -1)

    def _add(self, kind: NodeKind, variable: int, elements: Sequence[Pair], scope: int, origin: int) -> int:
        tick(1 + len(elements))
        self._kind.append(int(kind))
        self._variable.append(variable)
        self._elements.append(elements)
        self.scope.append(self._pool.shared(scope))
        self.origin.append(origin)
        self._edges += len(elements)
        if len(self._kind) > self._max_nodes or self._edges > EDGES_PER_NODE * self._max_nodes:
            raise CircuitTooLargeError(
                f"{self.source} needs more than max_nodes={self._max_nodes} nodes or {EDGES_PER_NODE} times as many "
                f"products, once it is smooth over {self.n} variables; raise max_nodes"
            )
        return len(self._kind) - 1

    def literal(self, variable: int, present: bool) -> int:
        """The node of a literal."""
        key = variable, int(present)
        if key not in self._literals:
            kind = NodeKind.PRESENT if present else NodeKind.ABSENT
            self._literals[key] = self._add(kind, variable, (), 1 << variable, -1)
        return self._literals[key]

    def is_literal(self, node: int) -> bool:
        """Whether a node is a literal."""
        return self._kind[node] in (NodeKind.ABSENT, NodeKind.PRESENT)

    def product(self, left: int, right: int, origin: int) -> int:
        """The product of two nodes, as a node: a sum of one element."""
        if TRUE in (left, right):
            return left or right  # the other one: TRUE is node 0
        key = left, right
        if key not in self._products:
            scope = self.scope[left] | self.scope[right]
            self._products[key] = self._add(NodeKind.SUM, -1, (key,), scope, origin)
        return self._products[key]

    def node(self, value: int | Pair, origin: int) -> int:
        """A node for a value that is not false."""
        return value if isinstance(value, int) else self.product(*value, origin)

    def overlap(self, factors: Sequence[int]) -> int:
        """The variables that two of the nodes share; none if their product is decomposable."""
        seen = shared = 0
        for factor in factors:
            tick()
            shared |= seen & self.scope[factor]
            seen |= self.scope[factor]
        return shared

    def separated(self, factors: Sequence[int]) -> list[int] | None:
        """Factors of the same product, where a variable that one of them decides and others share is in one alone.

        Some compilers write a literal x again below the and-node that it is a part of. Since x and x is x, and
        x and f is x and (f given x), it is kept once and the others are conditioned on it. What factors share otherwise
        they still share; None if they contradict each other.
        """
        rest, decided = list(factors), []
        while shared := self.overlap(rest):
            units = [self._units_of(factor) for factor in rest]
            absent, present = (_union(found[i] for found in units) & shared for i in (0, 1))
            if absent & present:
                return None
            if not absent | present:
                break
            decided += [self.literal(variable, False) for variable in members(absent)]
            decided += [self.literal(variable, True) for variable in members(present)]
            given = [self._given(factor, (absent, present)) for factor in rest]
            rest = [factor for factor in given if factor is not None and factor != TRUE]
            if None in given:
                return None
        return [*decided, *rest]

    def _units_of(self, node: int) -> Units:
        """The literals that a node implies because they are factors of all its elements."""
        for i in range(len(self._units), node + 1):
            if self._kind[i] == NodeKind.SUM:
                pairs = [(self._units[a], self._units[b]) for a, b in self._elements[i]]
                found = [(a[0] | b[0], a[1] | b[1]) for a, b in pairs]
                absent, present = found[0]
                for other in found[1:]:
                    absent, present = absent & other[0], present & other[1]
            else:
                absent = self.scope[i] if self._kind[i] == NodeKind.ABSENT else 0
                present = self.scope[i] if self._kind[i] == NodeKind.PRESENT else 0
            self._units.append((self._pool.shared(absent), self._pool.shared(present)))
        return self._units[node]

    def _given(self, top: int, units: Units) -> int | None:
        """What is left of a node where some literals are true, without their variables; None if that is false."""
        waiting = [(top, self._about(top, units))]
        while waiting:
            node, about = waiting[-1]
            pairs = self._elements[node] if about[0] | about[1] else ()
            parts = [(child, self._about(child, about)) for pair in pairs for child in pair]
            missing = [part for part in parts if part not in self._conditioned]
            waiting += missing
            if not missing:
                waiting.pop()
                if (node, about) not in self._conditioned:
                    self._conditioned[node, about] = self._remainder(node, about, [self._conditioned[p] for p in parts])
        return self._conditioned[top, self._about(top, units)]

    def _about(self, node: int, units: Units) -> Units:
        """Those of the literals whose variables are below a node."""
        return units[0] & self.scope[node], units[1] & self.scope[node]

    def _remainder(self, node: int, about: Units, parts: Sequence[int | None]) -> int | None:
        """A node given literals, some of which are about it, from what is left of its elements' factors."""
        if not about[0] | about[1]:
            return node
        if self._kind[node] != NodeKind.SUM:
            wrong = about[0] if self._kind[node] == NodeKind.PRESENT else about[1]
            return None if wrong else TRUE
        pairs, origin = zip(parts[::2], parts[1::2], strict=True), self.origin[node]
        # What only elements that died mention need not be mentioned any more: the sum is made smooth anew.
        alive = [
            self.product(self._bare(a), self._bare(b), origin) for a, b in pairs if a is not None and b is not None
        ]
        value = self.disjunction(alive, origin)
        return None if value is None else self.node(value, origin)

    def _bare(self, top: int) -> int:
        """A node without those factors that smoothing made, which leave their variables free."""
        waiting = [top]
        while waiting:
            node = waiting.pop()
            if node in self._bared:
                continue
            pairs = self._elements[node]
            if self._free.get(self.scope[node]) == node:
                self._bared[node] = TRUE
            elif len(pairs) != 1:
                self._bared[node] = node
            elif missing := [child for child in pairs[0] if child not in self._bared]:
                waiting += [node, *missing]
            else:
                left, right = (self._bared[child] for child in pairs[0])
                self._bared[node] = self.product(left, right, self.origin[node])
        return self._bared[top]

    def conjunction(self, factors: Sequence[int], origin: int) -> int | Pair:
        """The product of any number of nodes: a balanced tree of products of two, the topmost left open."""
        factors = [factor for factor in factors if factor != TRUE]
        while len(factors) > 2:
            pairs = zip(factors[::2], factors[1::2], strict=False)
            odd = factors[-1:] if len(factors) % 2 else []
            factors = [self.product(a, b, origin) for a, b in pairs] + odd
        if len(factors) == 2:
            return factors[0], factors[1]
        return factors[0] if factors else TRUE

    def sum(self, elements: Sequence[Pair], origin: int) -> int:
        """A sum of products that share one scope."""
        left, right = elements[0]
        return self._add(NodeKind.SUM, -1, elements, self.scope[left] | self.scope[right], origin)

    def disjunction(self, values: Sequence[Value], origin: int) -> Value:
        """The sum of any number of values, made smooth: variables that a value does not mention are free in it."""
        alive = [value for value in values if value is not None]
        if len(alive) < 2:
            return alive[0] if alive else None
        scope = 0
        for value in alive:
            tick()
            scope |= self._scope_of(value)
        return self.sum([self._widened(value, scope, origin) for value in alive], origin)

    def _scope_of(self, value: int | Pair) -> int:
        return self.scope[value] if isinstance(value, int) else self.scope[value[0]] | self.scope[value[1]]

    def _widened(self, value: int | Pair, scope: int, origin: int) -> Pair:
        """A value as an element of a sum over ``scope``."""
        missing = scope & ~self._scope_of(value)
        if not missing and not isinstance(value, int):
            return value
        return self.node(value, origin), self.free(missing)

    def free(self, scope: int) -> int:
        """The product of (x or not x) for all variables of a set.

        Sets are split at the same places, multiples of powers of two, so that they share their equal parts.
        """
        if scope not in self._free:
            low, high = (scope & -scope).bit_length() - 1, scope.bit_length() - 1
            if low < high:
                bit = (low ^ high).bit_length() - 1
                below = scope & (1 << (high >> bit << bit)) - 1
                self._free[scope] = self.product(self.free(below), self.free(scope ^ below), -1)
            else:
                self._free[scope] = self._either(low) if scope else TRUE
        return self._free[scope]

    def _either(self, variable: int) -> int:
        both = [(self.literal(variable, False), TRUE), (self.literal(variable, True), TRUE)]
        return self._add(NodeKind.SUM, -1, both, 1 << variable, -1)

    def finish(self, root: int | Pair, origin: int) -> tuple[Graph, list[int]]:
        """The graph below ``root`` over all variables, and the origin of each of its nodes."""
        missing = (1 << self.n) - 1 & ~self._scope_of(root)
        top = self.product(self.node(root, origin), self.free(missing), origin)
        kept = self._below(top)
        place = dict(zip(kept, range(len(kept)), strict=True))
        elements = [[(place[a], place[b]) for a, b in self._elements[node]] for node in kept]
        kinds, variables = [self._kind[node] for node in kept], [self._variable[node] for node in kept]
        return Graph.of(self.n, kinds, variables, elements), [self.origin[node] for node in kept]

    def _below(self, top: int) -> list[int]:
        """The nodes that ``top`` is made of, children first; itself last."""
        found = {top}
        waiting = [top]
        while waiting:
            tick()
            for pair in self._elements[waiting.pop()]:
                for child in pair:
                    if child not in found:
                        found.add(child)
                        waiting.append(child)
        return sorted(found)


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)
