"""Files of other compilers, and what circuits read from them are held to."""

import random

import numpy as np
import pytest
import torch

import circuitroute as cr
from tests.truth import enumerate_worlds, world_truth

# Exactly one of three variables, three times.
ONE_OF_THREE_C2D = """\
nnf 12 14 3
L 1
L -1
L 2
L -2
L 3
L -3
A 2 2 5
A 2 3 4
O 2 2 6 7
A 2 1 8
A 3 0 3 5
O 1 2 9 10
"""
ONE_OF_THREE_D4 = """\
o 1 0
o 2 0
t 3 0
2 3 1 -2 -3 0
o 4 0
4 3 2 -3 0
4 3 -2 3 0
2 4 -1 0
1 2 0
"""
# What PySDD saves for (a and b) or (c and d), on a balanced vtree.
TWO_PAIRS_SDD = """\
c ids of sdd nodes start at 0
sdd 13
L 2 0 1
L 3 2 -2
L 4 0 -1
T 5
D 1 1 2 2 3 4 5
L 7 4 3
L 8 6 4
L 9 4 -3
F 10
D 6 5 2 7 8 9 10
L 12 2 2
D 11 1 2 2 12 4 10
D 0 3 2 1 6 11 5
"""
BALANCED = "vtree 7\nL 0 1\nL 2 2\nI 1 0 2\nL 4 3\nL 6 4\nI 5 4 6\nI 3 1 5\n"


def hold_to(circuit, accept, n):
    """Everything a circuit says against the worlds that should be allowed."""
    worlds = torch.from_numpy(enumerate_worlds(n))
    assert circuit.n == n
    assert circuit.op == "layered"
    assert circuit.model_count() == int(accept.sum())
    assert torch.equal(circuit.satisfies(worlds), torch.from_numpy(accept))
    circuit.check()
    logits = torch.linspace(-1.5, 1.0, n, dtype=torch.float64)
    truth = world_truth(logits[None], accept)
    dist = circuit(logits)
    np.testing.assert_allclose(dist.log_partition, truth.log_partition[0], atol=1e-10)
    np.testing.assert_allclose(dist.marginals, truth.marginals[0], atol=1e-10)


def with_infeasible(read, accept):
    """What ``read`` returns, or None where it rightly says that nothing is allowed."""
    if accept.any():
        return read()
    with pytest.raises(cr.InfeasibleError, match="the circuit is false"):
        read()
    return None


def _parity_chain(order, nodes, odd):
    """Appends "an odd (or even) number of the variables" as a decision chain in an order; returns the node."""
    states = None
    for v in order:
        nodes += [f"L {v}", f"L {-v}"]
        present, absent = len(nodes) - 2, len(nodes) - 1
        if states is None:
            states = absent, present
            continue
        made = []
        for same, other in (states, states[::-1]):
            nodes += [f"A 2 {absent} {same}", f"A 2 {present} {other}", f"O {v} 2 {len(nodes)} {len(nodes) + 1}"]
            made.append(len(nodes) - 1)
        states = tuple(made)
    return states[odd]


def both_parities(n, second_odd=True):
    """An even number of variables along one order, or an odd one along another: true, and not structured."""
    nodes = []
    even = _parity_chain(range(1, n + 1), nodes, 0)
    odd = _parity_chain([*range(2, n + 1), 1], nodes, int(second_odd))
    nodes.append(f"O 0 2 {even} {odd}")
    return "\n".join([f"nnf {len(nodes)} 0 {n}", *nodes]) + "\n", len(nodes) - 1


def libsdd(pysdd, cnf, n, kind, seed):
    """(manager, node) of a CNF over a vtree of that kind with its variables shuffled."""
    order = random.Random(seed).sample(range(1, n + 1), n)
    manager = pysdd.SddManager.from_vtree(pysdd.Vtree(var_count=n, var_order=order, vtree_type=kind))
    return manager, conjoined(manager, cnf)


def conjoined(manager, cnf):
    """The node of a CNF."""
    formula = manager.true()
    for clause in cnf:
        union = manager.false()
        for literal in clause:
            union = union | manager.literal(literal)
        formula = formula & union
    return formula
