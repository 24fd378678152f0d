"""Values that a GPU checks: what is wrong is raised by a later step, once, and nothing waits for it."""

import pytest
import torch

from circuitroute.routing.deferred import Deferred, Sent


class At:
    """An event that is reached when it is said to be."""

    def __init__(self):
        self.reached = False

    def query(self):
        return self.reached


def sent(*bad):
    return Sent(torch.tensor(bad), At())


def test_what_has_arrived_is_raised_once_and_in_order():
    deferred = Deferred()
    good, bad, late = sent(False, False), sent(False, True), sent(True, False)
    for each, what in ((good, "Exactly(2)"), (bad, "Exactly(2) over 6 experts"), (late, "AtMost(3) over 6 experts")):
        deferred.add(each, what)
    deferred.raise_found()
    bad.arrived.reached = True
    deferred.raise_found()  # an earlier one is still on its way
    good.arrived.reached = True
    with pytest.raises(
        ValueError, match=r"earlier routing step, Exactly\(2\) over 6 experts, .*in row 1: .*validate_args=False"
    ):
        deferred.raise_found()
    deferred.raise_found()
    late.arrived.reached = True
    with pytest.raises(ValueError, match=r"AtMost\(3\)"):
        deferred.raise_found()
