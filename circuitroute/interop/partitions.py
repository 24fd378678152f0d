"""Whether the primes of every decision node of an SDD are a partition, from values at one random point.

A node stands for a function of assignments, 0 or 1, which is the multilinear polynomial that agrees with it there: x
for a literal, 1 - x for its opposite, a product of prime and sub for an element, their sum for a decision. The primes
of a decision exclude one another and leave nothing out if and only if their polynomials add up to 1. Two
polynomials of degree d that differ take the same value at a random point of a field of P elements with a chance of at
most d / P (Schwartz, Fast Probabilistic Algorithms for Verification of Polynomial Identities, 1980; for diagrams Blum,
Chandra & Wegman, Equivalence of Free Boolean Graphs Can Be Decided Probabilistically in Polynomial Time, 1980). Here P
is a prime of 127 bits, the degree at most the number of variables, and the point comes from the digest of the files, so
that the answer to a file is always the same. The time is linear in the size of the diagram, where comparing primes by
pairs is quadratic.

That the elements of a decision exclude one another follows, since their primes do. The other way round it does not:
primes may exclude one another and leave something out, in diagrams of tools that omit elements whose sub is false.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from circuitroute.deadline import tick

# A Mersenne prime.
FIELD = (1 << 127) - 1


class Partitions:
    """The values of a diagram's nodes at one point, children first.

    Args:
        digest: of what the diagram was read from; decides the point.

    Attributes:
        all: whether the primes of every decision so far add up to 1.
    """

    def __init__(self, digest: bytes) -> None:
        self._digest = digest
        self._point: dict[int, int] = {}
        self._values: dict[int, int] = {}
        self.all = True

    def constant(self, node: int, value: bool) -> None:
        """Add true or false."""
        self._values[node] = int(value)

    def literal(self, node: int, variable: int, present: bool) -> None:
        """Add a literal."""
        if variable not in self._point:
            drawn = hashlib.sha256(self._digest + variable.to_bytes(8, "big")).digest()
            self._point[variable] = int.from_bytes(drawn, "big") % FIELD
        x = self._point[variable]
        self._values[node] = x if present else (1 - x) % FIELD

    def decision(self, node: int, parts: Sequence[int]) -> None:
        """Add a decision of the nodes prime, sub, prime, sub, ..."""
        tick(1 + len(parts) // 2)
        primes = [self._values[prime] for prime in parts[::2]]
        subs = [self._values[sub] for sub in parts[1::2]]
        self.all &= sum(primes) % FIELD == 1
        self._values[node] = sum(prime * sub for prime, sub in zip(primes, subs, strict=True)) % FIELD
