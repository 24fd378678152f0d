"""A test suite for your own constraints: a test class inherits it and lists the cases.

    from circuitroute.testing import Case, CompilerContract

    class TestParity(CompilerContract):
        def cases(self):
            yield Case(Parity(odd=True), 6, lambda selected: len(selected) % 2 == 1)

pytest collects one test per check and case. Neither this package nor what it imports needs pytest: the checks are
plain methods that raise ``AssertionError``.
"""

from circuitroute.testing.case import Case as Case
from circuitroute.testing.contract import CompilerContract as CompilerContract
