"""What holds for all tests: an interpreter stands in for a GPU, and no test changes how the next one validates.

Kernels are compiled by one process for all others.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.distributions import Distribution

from tests import raises

# Whether kernels are interpreted is settled when triton is imported, so it cannot wait for the tests that need it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "RAISES" in os.environ:
    raises.watch(Path(os.environ["RAISES"]))

VALIDATES = Distribution._validate_args

# Files with tests of half a minute: begun last, one of them would be waited for by an idle process at the end.
FIRST = ("test_triton_launch", "test_gpu_script", "test_study")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes run tests, those that take longest begin first."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(autouse=True)
def default_validation() -> None:
    """The first use of torch.compile in a process, PyJuice's import for one, switches off this default."""
    Distribution.set_default_validate_args(VALIDATES)


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where several processes run tests, each kernel is compiled by one of them, and by the others read from disk."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or importlib.util.find_spec("numba") is None:
        return
    import circuitroute as cr

    circuits = cr.compile(cr.Exactly(1), 2), cr.compile(cr.Exactly(1).over([0, 1]), 3)
    dtypes = [torch.float32, torch.float64]
    for dtype in dtypes if int(worker.removeprefix("gw")) % 2 else dtypes[::-1]:
        with FileLock(tmp_path_factory.getbasetemp().parent / f"{dtype}.lock"):
            for circuit in circuits:
                logits = torch.zeros(1, circuit.n, dtype=dtype, requires_grad=True)
                torch.autograd.grad(circuit.with_engine("numba")(logits).marginals[0, 0], logits)
