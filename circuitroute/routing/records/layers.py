"""The decisions of one layer, in the form that takes fewer bytes.

Legend: T tokens, E experts of a layer, K slots (the largest number of experts any token has in the layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from circuitroute._validate import int_at_least, one_of

Form: TypeAlias = Literal["indices", "bits"]
FORMS: tuple[Form, ...] = get_args(Form)
Array: TypeAlias = npt.NDArray[Any]

# The dtypes of indices, narrowest first, and how many values each tells apart.
_WIDTHS = ((torch.uint8, 1 << 8), (torch.int16, 1 << 15), (torch.int32, 1 << 31))
DTYPES = tuple(dtype for dtype, _ in _WIDTHS)


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """The decisions of one layer.

    Attributes:
        experts: E.
        form: how they are written. ``"indices"``: [T, K] the chosen experts, increasing, then E in unused slots; uint8
            where that fits, else int16 or int32. ``"bits"``: [T, ceil(E / 8)] uint8, expert i being bit i % 8 of byte
            i // 8.
        data: the numbers, on the CPU.
    """

    experts: int
    form: Form
    data: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", int_at_least("experts", self.experts, 1))
        object.__setattr__(self, "form", one_of("form", self.form, FORMS))

    @staticmethod
    def of(mask: Tensor) -> LayerRecord:
        """A mask [T, E] bool in the form that takes less memory (indices where they are equal)."""
        mask = mask.detach().cpu()
        experts = mask.shape[1]
        counts = mask.sum(-1)
        slots, dtype = _narrowest(counts, experts)
        if _bits_are_smaller(slots, dtype, experts):
            return LayerRecord(experts, "bits", pack(mask))
        return LayerRecord(experts, "indices", indices_of(mask, slots).to(dtype))

    @staticmethod
    def of_rows(rows: Tensor, experts: int) -> LayerRecord:
        """The chosen experts [T, K'] int64, increasing and distinct, then E: without a mask, which takes E bytes."""
        counts = (rows < experts).sum(-1)
        slots, dtype = _narrowest(counts, experts)
        kept = LayerRecord(experts, "indices", rows[:, :slots].to(dtype))
        if _bits_are_smaller(slots, dtype, experts):
            return LayerRecord(experts, "bits", pack(kept.mask()))
        return kept

    def mask(self) -> Tensor:
        """[T, E] bool."""
        if self.form == "bits":
            return _unpack(self.data, self.experts)
        # One column more, for unused slots.
        mask = torch.zeros(len(self.data), self.experts + 1, dtype=torch.bool, device="cpu")
        return mask.scatter_(1, self.data.long(), True)[:, : self.experts].contiguous()

    def __getitem__(self, tokens: Any) -> LayerRecord:
        return LayerRecord(self.experts, self.form, self.data[tokens])


def joined(layers: Sequence[LayerRecord]) -> LayerRecord:
    """The tokens of several records of one layer."""
    first = layers[0]
    if len(layers) == 1:
        return first
    if len({(layer.form, layer.data.dtype, layer.data.shape[1]) for layer in layers}) == 1:
        return LayerRecord(first.experts, first.form, torch.cat([layer.data for layer in layers]))
    return LayerRecord.of(torch.cat([layer.mask() for layer in layers]))


def checked_layer(name: str, array: Array, experts: int, form: Form) -> LayerRecord:
    """A layer from a file whose checksum is right; whatever wrote the file may still have written nonsense.

    Raises:
        ValueError: the numbers are not those of E experts in this form.
    """
    experts = int_at_least("experts", experts, 1)
    if array.ndim != 2 or form not in FORMS:
        raise ValueError(f"{name} has shape {array.shape} and form {form!r}")
    data = torch.from_numpy(array)
    if form == "bits":
        fits = data.dtype == torch.uint8 and data.shape[1] == bytes_of(experts)
    else:
        low, high = (int(data.min()), int(data.max())) if data.numel() else (0, 0)
        fits = data.dtype in DTYPES and low >= 0 and high <= experts
    if not fits:
        raise ValueError(f"{name} does not hold {form} of {experts} experts")
    return LayerRecord(experts, form, data)


def indices_of(mask: Tensor, slots: int) -> Tensor:
    """[T, slots] int64: the chosen experts, increasing, then E."""
    token, expert = mask.nonzero(as_tuple=True)
    counts = mask.sum(-1)
    start = counts.cumsum(0) - counts
    rows = torch.full((len(mask), slots), mask.shape[1], device="cpu")
    rows[token, torch.arange(len(token), device="cpu") - start[token]] = expert
    return rows


def pack(mask: Tensor) -> Tensor:
    """[T, ceil(E / 8)] uint8."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def bytes_of(experts: int) -> int:
    """Bytes of one token's bits."""
    return -(-experts // 8)


def _unpack(bits: Tensor, experts: int) -> Tensor:
    """[T, E] bool."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=experts, bitorder="little")).bool()


def _narrowest(counts: Tensor, experts: int) -> tuple[int, torch.dtype]:
    """K of the counts [T] of chosen experts, and the narrowest dtype of the slots, with a mark if any is unused."""
    slots = int(counts.max()) if len(counts) else 0
    full = not len(counts) or int(counts.min()) == slots
    values = experts if full else experts + 1
    return slots, next(dtype for dtype, limit in _WIDTHS if values <= limit)


def _bits_are_smaller(slots: int, dtype: torch.dtype, experts: int) -> bool:
    return slots * dtype.itemsize > bytes_of(experts)
