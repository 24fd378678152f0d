"""Constants that are computed with: kept as arrays, and made into tensors on the device where they are needed.

A buffer is memory, and memory can be emptied: ``to_empty``, loading with ``assign=True``, ``skip_init`` and
``from_pretrained`` leave buffers that no checkpoint holds with whatever was there before, or on the meta device. Casts
round them, too. So what is known when a module or an engine is made is no buffer. It is an array, and tensors are
copies of it, one per device, kept where they can be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.compiler import is_compiling

from circuitroute._tensors import lasting as lasting

Array = npt.NDArray[Any]


def constant(array: Array, device: torch.device | str) -> Tensor:
    """A copy of ``array`` on that device, whatever the default device; never an inference tensor, but in a trace."""
    if is_compiling():
        return torch.as_tensor(array, device=device)
    with torch.inference_mode(False):
        return torch.tensor(array, device=device)


class Tables:
    """Named arrays, and tensors of them on any device; immutable, so that copies of a module share them.

    Pickled, only the arrays are: a device may not be there when they are read.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = {name: np.array(array) for name, array in arrays.items()}
        self._made: dict[str, dict[str, Tensor]] = {}

    def on(self, device: torch.device) -> Mapping[str, Tensor]:
        """The tensors on a device; not to be written to."""
        made = self._made.get(_name(device))
        if made is None:
            made = {name: constant(array, device) for name, array in self._arrays.items()}
            if lasting():
                self._made[_name(device)] = made
        return made

    def prepare(self, device: torch.device) -> None:
        """Make them now, so that a program that is traced or captured later finds them there."""
        if lasting():
            self.on(device)

    def __len__(self) -> int:
        return len(self._arrays)

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": self._arrays, "_made": {}}

    def __copy__(self) -> Tables:
        return self

    def __deepcopy__(self, memo: object) -> Tables:
        return self


def _name(device: torch.device) -> str:
    return device.type if device.index is None else f"{device.type}:{device.index}"
