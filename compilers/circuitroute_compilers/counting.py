"""The counting compiler: constraints on the number of selected variables.

Their circuit is the balanced tree of truncated convolutions of counts (Poisson-binomial polynomials); marked
with its allowed counts it runs on the fused ``subset`` engines.
"""

from __future__ import annotations

from circuitroute import Circuit, InfeasibleError, register_compiler
from circuitroute.constraints import Count, Over
from circuitroute_compilers.machine import build_graph


@register_compiler(Count)
def compile_count(constraint: Count, n: int, max_nodes: int) -> Circuit:
    """Compile a count over all ``n`` variables."""
    counts = [j for j in range(n + 1) if constraint.allows(j)]
    if not counts:
        raise InfeasibleError(f"{constraint!r} over {n} variables: a subset has 0 to {n} of them, none of it allowed")
    return Circuit(build_graph(constraint, n, max_nodes), constraint, counts)


@register_compiler(Over)
def compile_over(constraint: Over, n: int, max_nodes: int) -> Circuit:
    """Compile a constraint on some of the variables; the others are free."""
    beyond = [v for v in constraint.indices if v >= n]
    if beyond:
        raise ValueError(f"{constraint!r} uses variable {max(beyond)}, but n={n}: indices must be below n")
    inner = constraint.constraint
    scope = len(constraint.indices)
    if not isinstance(inner, Count):
        return Circuit(build_graph(constraint, n, max_nodes), constraint)
    counts = [j for j in range(scope + 1) if inner.allows(j)]
    if not counts:
        raise InfeasibleError(f"{constraint!r}: no count of 0 to {scope} selected variables is allowed")
    return Circuit(build_graph(constraint, n, max_nodes), constraint, counts if scope == n else None)
