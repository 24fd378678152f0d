"""What a GPU is given to do, held to ceilings: operations forward and back, and how often the host waits."""

import pytest
import torch

import circuitroute as cr
from benchmarks import device_ops

pytest.importorskip("triton", minversion="3.4")

# (forward, backward, waits), at T = 4096, (64, 8). Lower them when there are fewer; nothing may come on top.
CEILINGS = {
    "route": (7, 3, 0),
    "route validated": (8, 3, 0),
    "padded": (4, 3, 0),
    "balance": (9, 3, 0),
    "random_key": (1, 0, 0),
    "evaluation": (4, 0, 0),
    "router": (9, 6, 0),
}


@pytest.mark.parametrize("call", device_ops.CALLS)
def test_operations_stay_below_their_ceilings(call):
    forward, backward = device_ops.count(call)
    found = len(forward), len(backward), (forward + backward).count("wait")
    assert all(many <= ceiling for many, ceiling in zip(found, CEILINGS[call], strict=True)), (found, forward, backward)


def test_the_engine_that_is_counted_is_triton():
    forward, backward = device_ops.count("route")
    assert [name for name in forward + backward if name.startswith("triton")]
    assert not torch.zeros(1).is_cuda
    assert cr.compile(cr.Exactly(2), 6).engine_for("cpu") != "triton"


def test_waits_copies_and_operations_are_told_apart():
    with device_ops.counting() as operations:
        x = torch.zeros(3)
        operations.log.clear()
        assert not (x.view(3, 1)[1:] + 1 > 2).any()
        torch.tensor([1.0, 2.0])
    assert operations.log == ["add", "gt", "any", "wait", "copy"]
