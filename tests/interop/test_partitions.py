"""Determinism of SDDs by the partitions of their decisions: against brute force, and beyond what pairs can settle."""

import dataclasses
import random
from functools import reduce
from operator import or_

import numpy as np
import pytest

import circuitroute as cr
from circuitroute.circuit.verify.properties import check
from circuitroute.errors import CircuitPropertyError
from circuitroute.interop.partitions import FIELD, Partitions
from tests.foreign import accept_sdd
from tests.interop.files import TWO_PAIRS_SDD, hold_to

DIGESTS = [bytes([i]) * 32 for i in range(3)]


def random_primes(rng, n, partitioned):
    """[nodes, 2^n] truth tables of a random decision's primes; a partition, or one that was spoilt by an assignment."""
    owner = np.array([rng.randrange(1, 5) for _ in range(2**n)])
    primes = np.stack([owner == prime for prime in range(1, 5)])
    if not partitioned:
        at = rng.randrange(2**n)
        primes[rng.randrange(4), at] ^= True
    return primes


def cube(partitions, node, n, table):
    """Add one function as the decisions of its assignments, node ids from ``node`` on; returns the last."""
    partitions.constant(node, False)
    partitions.constant(node + 1, True)
    for v in range(n):
        partitions.literal(node + 2 + 2 * v, v, False)
        partitions.literal(node + 3 + 2 * v, v, True)
    level = [node + int(value) for value in table]
    fresh = node + 2 + 2 * n
    for v in reversed(range(n)):  # the last variable first: neighbours differ in it
        for low, high in zip(level[::2], level[1::2], strict=True):
            partitions.decision(fresh, [node + 2 + 2 * v, low, node + 3 + 2 * v, high])
            fresh += 1
        level = list(range(fresh - len(level) // 2, fresh))
    return level[0], fresh


@pytest.mark.parametrize("digest", DIGESTS, ids=["a", "b", "c"])
@pytest.mark.parametrize("partitioned", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_decision_is_a_partition_iff_every_assignment_has_one_prime(digest, partitioned, seed):
    rng = random.Random(seed)
    n = rng.randrange(1, 6)
    primes = random_primes(rng, n, partitioned)
    partitions, fresh, parts = Partitions(digest), 0, []
    for table in primes:
        prime, fresh = cube(partitions, fresh, n, table)
        parts += [prime, prime]
    assert partitions.all  # a literal and its opposite, all the way down
    partitions.decision(fresh, parts)
    assert partitions.all == bool((primes.sum(0) == 1).all()) == partitioned


def test_the_point_depends_on_the_digest_alone():
    def values(digest):
        partitions = Partitions(digest)
        for v in (0, 1, 65_535):
            partitions.literal(v, v, True)
        return list(partitions._values.values())

    assert values(DIGESTS[0]) == values(DIGESTS[0])
    assert len({*values(DIGESTS[0]), *values(DIGESTS[1])}) == 6
    assert all(0 <= value < FIELD for value in values(DIGESTS[0]))


def test_primes_that_leave_something_out_are_verified_by_pairs(sdd):
    """Some tools omit the elements whose sub is false: no partition, and still deterministic."""
    omitted = TWO_PAIRS_SDD.replace("D 1 1 2 2 3 4 5", "D 1 1 1 2 3").replace("D 11 1 2 2 12 4 10", "D 11 1 1 2 12")
    assert omitted.count("\nD 1") == 2
    hold_to(sdd(omitted), accept_sdd(omitted, 4), 4)


SIX_NODES = "sdd 6\nL 1 0 1\nL 2 0 1\nL 3 2 2\nL 4 2 -2\nT 5\nD {node} 1 {parts}\n"
TWO_LEAVES = "vtree 3\nL 0 1\nL 2 2\nI 1 0 2\n"


@pytest.mark.parametrize(
    ("parts", "node"),
    [
        pytest.param("2 1 3 2 3", 9, id="x0 twice"),
        pytest.param("2 1 3 5 3", 9, id="x0 or true"),
        pytest.param("2 5 3 5 3", 9, id="true twice"),
    ],
)
def test_primes_that_overlap_are_refused_by_name(sdd, parts, node):
    text = SIX_NODES.format(node=node, parts=parts)
    with pytest.raises(CircuitPropertyError, match=rf"not deterministic: two elements of node {node} of .*circuit.sdd"):
        sdd(text, TWO_LEAVES)


def test_primes_that_overlap_may_have_subs_that_do_not(sdd):
    text = SIX_NODES.format(node=9, parts="2 1 3 5 4")  # x0 and x1, or not x1
    hold_to(sdd(text, TWO_LEAVES), accept_sdd(text, 2), 2)


def test_what_is_known_to_be_deterministic_is_still_held_to_the_rest(sdd):
    graph = sdd(TWO_PAIRS_SDD).graph
    check(graph, deterministic=True)
    wider = dataclasses.replace(graph, n=5)
    with pytest.raises(CircuitPropertyError, match="not smooth: the root does not mention variables"):
        check(wider, deterministic=True)


def test_decisions_of_thousands_of_elements_are_read_in_the_default_time(tmp_path):
    """3-CNF over 46 variables on a balanced vtree: comparing primes by pairs is given up after four million."""
    pysdd = pytest.importorskip("pysdd.sdd")
    n, rng = 46, random.Random(0)
    manager = pysdd.SddManager.from_vtree(pysdd.Vtree(var_count=n, vtree_type="balanced"))
    formula = manager.true()
    for _ in range(n // 2):
        formula &= reduce(or_, (manager.literal(rng.choice((1, -1)) * v) for v in rng.sample(range(1, n + 1), 3)))
    formula.save(bytes(tmp_path / "a.sdd"))
    manager.vtree().save(bytes(tmp_path / "a.vtree"))
    circuit = cr.read_sdd(tmp_path / "a.sdd", tmp_path / "a.vtree")
    assert circuit.model_count() == manager.global_model_count(formula) > 2**40
