"""Tensors as the kernels want them laid out."""

from torch import Tensor


def aligned(values: Tensor) -> Tensor:
    """Contiguous, at an address that 16 divides; what torch allocates is, and only slices of it are copied."""
    values = values.contiguous()
    return values.clone() if values.data_ptr() % 16 else values
