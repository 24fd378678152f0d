"""What holds for all tests: an interpreter stands in for a GPU, and no test changes how the next one validates."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch.distributions import Distribution

# Whether kernels are interpreted is settled when triton is imported, so it cannot wait for the tests that need it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def default_validation() -> Iterator[None]:
    """The first use of torch.compile in a process switches off the default of torch.distributions' validation."""
    default = Distribution._validate_args
    yield
    Distribution.set_default_validate_args(default)
