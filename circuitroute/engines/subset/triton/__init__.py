"""The engine ``triton`` of the count family. All but ``engine`` import triton: for functions that use it."""

# Sizes that kernels take as arguments of their own: triton is told not to compile anew for them, see :mod:`.engine`.
SIZES = ("tokens", "potential_stride")
