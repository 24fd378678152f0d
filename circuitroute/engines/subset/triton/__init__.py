"""The engine ``triton`` of the count family. All but ``engine`` import triton: for functions that use it."""

from torch import Tensor

# Sizes that kernels take as arguments of their own: triton is told not to compile anew for them, see :mod:`.engine`.
SIZES = ("tokens", "potential_stride")


def aligned(values: Tensor) -> Tensor:
    """Contiguous, at an address that 16 divides; what torch allocates is, and only slices of it are copied."""
    values = values.contiguous()
    return values.clone() if values.data_ptr() % 16 else values
