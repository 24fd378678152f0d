"""Sets of variables (or literals) as Python integers, a bit each."""

from __future__ import annotations

from collections.abc import Iterable

from circuitroute.deadline import tick
from circuitroute.errors import CircuitTooLargeError

# The most memory that the bit sets of one circuit may take, in bytes.
MAX_BYTES = 1 << 29


class Pool:
    """Keeps one object per different bit set, and counts their memory."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._bytes = 0

    def shared(self, bits: int) -> int:
        """The object that stands for ``bits``.

        Raises:
            CircuitTooLargeError: all of them together take more than half a gibibyte.
        """
        tick(1 + (bits.bit_length() >> 10))
        known = self._known.setdefault(bits, bits)
        if known is bits:
            self._bytes += bits.bit_length() // 8
            if self._bytes > MAX_BYTES:
                raise CircuitTooLargeError(
                    f"the scopes of the circuit's nodes are {len(self._known)} different sets of variables, more than "
                    f"{MAX_BYTES >> 20} MiB: too large to verify"
                )
        return known


def members(bits: int) -> list[int]:
    """What is in a bit set, increasing."""
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return found


def listed(items: Iterable[int], most: int = 10) -> str:
    """Some numbers as a list, cut short where there are many."""
    shown = list(items)
    dots = ", ..." if len(shown) > most else ""
    return f"[{', '.join(map(str, shown[:most]))}{dots}]"
