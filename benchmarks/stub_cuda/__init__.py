"""Triton's real CUDA driver and launcher over a libcuda that does nothing: launching without a GPU.

``activate()`` has CPU tensors pass for a GPU's. Kernels are compiled, for sm_90, and what triton checks and converts at
a launch it checks and converts; then nothing runs, and outputs stay as they were allocated. That finds what neither the
interpreter nor compilation ahead of time can: refused launches, wrong numbers of arguments, and recompilation. A cache
that was filled so is one that a machine with a GPU can use (see :mod:`.prewarm`).

It is for a process of its own, without ``TRITON_INTERPRET``; there is no way back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).parent / "libcuda.c"
NAME = "libcuda.so.1"


def compiler() -> str | None:
    """The C compiler, which triton needs too; None if there is none."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """Compile the stub into a folder, under the name by which launchers look for a driver."""
    found = compiler()
    if found is None:
        raise RuntimeError("no C compiler was found (CC, cc, gcc, clang): the stub driver is made of C")
    command = [found, "-shared", "-fPIC", f"-Wl,-soname,{NAME}", "-o", str(folder / NAME), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / NAME


def activate(folder: Path) -> Callable[[], int]:
    """Have triton, and the engine, launch on the stub, built in ``folder``; returns a function that counts launches."""
    path = build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.stub_launches.restype = ctypes.c_long

    from triton.runtime import driver

    from circuitroute.engines.subset.triton import engine
    from circuitroute.keys import folding

    driver.set_active(_Driver())
    engine.launchable = lambda device: True
    engine.current = folding.current = lambda device: contextlib.nullcontext()
    launches: Callable[[], int] = library.stub_launches
    return launches


class _Driver:
    """What triton asks of the active driver; the first two come from triton itself."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self._target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def allocate_default_profile_scratch(self, size: int, align: int, stream: int) -> None:
        return None
