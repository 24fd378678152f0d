"""Words for what cannot be built: which parts contradict each other, which part costs most, and what would help."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, islice

from circuitroute import CircuitTooLargeError, Constraint
from circuitroute.constraints import And, Cost, Count, Logic, Over
from circuitroute_compilers.lowering import flattened, joined
from circuitroute_compilers.prediction import Choice

# How many combinations of parts are tried to name the smallest contradiction.
MAX_BLAMED = 200


def contradiction(constraint: Constraint, n: int, is_feasible: Callable[[Constraint, int], bool | None]) -> str | None:
    """The smallest set of parts of a conjunction that nothing satisfies, in words."""
    parts = joined(flattened(constraint, n), n)
    tried = (some for size in range(1, len(parts)) for some in combinations(parts, size))
    for some in islice(tried, MAX_BLAMED):
        if is_feasible(And(some), n) is False:
            named = " and ".join(map(repr, some))
            verb = "is impossible" if len(some) == 1 else "contradict each other"
            return f"{named} {verb} over {n} variables, so {constraint!r} has no solution"
    return None


def too_large(constraint: Constraint, n: int, max_nodes: int, choice: Choice, needs: str) -> CircuitTooLargeError:
    """The error for a circuit over the limits: what it would take, which part costs most, and what would help."""
    predicted = choice.prediction
    return CircuitTooLargeError(
        f"{constraint!r} over {n} variables needs {needs}, more than max_nodes={max_nodes} allows; predicted before "
        f"building: estimated width {_about(predicted.width)}, at most {_about(predicted.nodes)} nodes and "
        f"{_about(predicted.edges)} elements, some {predicted.seconds:.2g} seconds. {predicted.culprit!r} costs most: "
        f"{_remedy(predicted.culprit)}, or raise max_nodes"
    )


def _about(number: int) -> str:
    return str(number) if number < 10**7 else f"10^{int(number.bit_length() * 0.30103)}"


def _remedy(culprit: Constraint) -> str:
    inner = culprit.constraint if isinstance(culprit, Over) else culprit
    if isinstance(inner, Count):
        return "lower its largest count, or give it a scope that lies inside or apart from those of the other parts"
    if isinstance(inner, Cost):
        return "lower its limit, use coarser costs, or give it a smaller scope"
    if isinstance(inner, Logic):
        return "split it into rules over fewer variables"
    return "give its machine fewer states, or a scope that lies inside or apart from those of the other parts"
