"""Both constraints held to circuitroute's contract, and how they behave beyond it."""

import sys

import pytest
from circuitroute_parity import Checksum, Parity

import circuitroute as cr
from circuitroute.testing import Case, CompilerContract


def test_the_compiler_is_found_by_its_entry_point():
    """Runs first: nothing here has imported the module."""
    assert "circuitroute_parity.compilers" not in sys.modules
    assert cr.compile(Checksum(9, 0), 8).model_count() == 30  # Varshamov and Tenengolts
    assert "circuitroute_parity.compilers" in sys.modules


class TestParity(CompilerContract):
    def cases(self):
        for n in (1, 5):
            yield Case(Parity(odd=True), n, lambda selected: len(selected) % 2 == 1)
            yield Case(Parity(odd=False), n, lambda selected: len(selected) % 2 == 0)


class TestChecksum(CompilerContract):
    def cases(self):
        for n, modulus, remainder in ((1, 2, 1), (4, 5, 0), (5, 3, 2)):
            yield Case(
                Checksum(modulus, remainder), n, lambda selected, m=modulus, r=remainder: checksum(selected) % m == r
            )
        yield Case(Checksum(9, 7), 3, lambda selected: False)  # 1 + 2 + 3 is at most 6


def checksum(selected):
    return sum(v + 1 for v in selected)


def test_parity_composes_and_stays_small():
    assert cr.compile(Parity(odd=True), 512).model_count() == 2**511
    assert cr.compile(Parity(odd=True), 512).num_nodes < 2100
    both = cr.compile(Parity(odd=False).over(range(8)) & cr.Exactly(3), 16)
    assert both.model_count() == 28 * 8 + 56


def test_a_compiled_type_says_what_composing_needs():
    with pytest.raises(cr.UnsupportedConstraintError, match=r"Checksum the three methods leaf\(var\)"):
        cr.compile(Checksum(5, 0) & cr.Exactly(2), 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: Checksum(0, 0), "modulus=0"), (lambda: Checksum(3, 3), "remainder=3: must lie in 0..2")],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_too_large_is_said_before_it_is_built():
    with pytest.raises(cr.CircuitTooLargeError, match=r"Checksum.* over 1000 .*max_nodes=500"):
        cr.compile(Checksum(1001, 0), 1000, max_nodes=500)
