"""Before any test: Triton's interpreter stands in for a GPU where there is none.

Whether kernels are interpreted is settled when triton is imported, so it cannot wait for the tests that need it.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
