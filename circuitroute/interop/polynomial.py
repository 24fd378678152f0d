"""A circuit as a sympy expression: its network polynomial.

The sum, over all allowed subsets, of the product of one indicator per variable (Darwiche, A differential approach to
inference in Bayesian networks, 2003): ``x3`` where variable 3 is selected, ``x3bar`` where it is not. It is kept as the
circuit factors it, sums of products of shared parts; ``sympy.expand`` lists the allowed subsets one by one. With
``x_i = exp(theta_i)`` and ``x_ibar = 1`` its value is Z, and x_i times its derivative by x_i, over Z, is the
marginal of i.
"""

from __future__ import annotations

from typing import Any

from circuitroute.circuit import Compiled
from circuitroute.circuit.graph import NodeKind

# Beyond this sympy takes minutes for what the engines do in a moment.
MAX_ELEMENTS = 2_000


def to_sympy(circuit: Compiled) -> Any:
    """The network polynomial in the symbols ``x0, x1, ...`` (selected) and ``x0bar, x1bar, ...`` (not selected).

    Shared nodes are shared subexpressions, the same objects: ``sympy.lambdify(..., cse=True)`` keeps them shared, while
    printing writes them out as often as they occur.

    Raises:
        ValueError: the circuit has more than two thousand products.
    """
    edges = circuit.graph.num_edges
    if edges > MAX_ELEMENTS:
        raise ValueError(
            f"{circuit.constraint!r} over {circuit.n} variables has {edges} products, more than sympy "
            f"handles well ({MAX_ELEMENTS}): take a smaller n, or circuit.to_networkx(), which takes a million"
        )
    import sympy

    graph = circuit.graph
    values: list[Any] = []
    for node, kind in enumerate(graph.kind.tolist()):
        if kind == NodeKind.SUM:
            span = range(int(graph.first[node]), int(graph.first[node + 1]))
            terms = [_product(values[graph.left[e]], values[graph.right[e]]) for e in span]
            # Unevaluated: sympy would look for like terms, of which a deterministic circuit has none.
            values.append(sympy.Add(*terms, evaluate=False))
        elif kind == NodeKind.TRUE:
            values.append(sympy.Integer(1))
        else:
            bar = "bar" if kind == NodeKind.ABSENT else ""
            values.append(sympy.Symbol(f"x{graph.variable[node]}{bar}"))
    return values[-1]


def _product(left: Any, right: Any) -> Any:
    import sympy

    factors = [factor for factor in (left, right) if factor != 1]
    return sympy.Mul(*factors, evaluate=False)
