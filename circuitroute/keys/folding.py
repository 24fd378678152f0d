"""An integer folded into keys on a GPU, in one kernel: see :func:`circuitroute.keys.fold_in`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
# Compiled once for each pair of dtypes, whatever the numbers, sizes and addresses.
VARYING = ("key_number", "index_number", "size")
POINTERS = ("OUT", "KEY", "INDEX")


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=POINTERS)
def fold(
    OUT,
    KEY,
    INDEX,
    key_number: tl.int64,
    index_number: tl.int64,
    size: tl.int64,
    KEYS: tl.constexpr,
    INDICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = mix64((key ^ mix64(index)) + golden ratio); each a tensor, or a number where there is no tensor."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    key = tl.zeros([BLOCK], tl.int64) + key_number
    if KEYS:
        key = tl.load(KEY + at, mask=inside, other=0).to(tl.int64)
    index = tl.zeros([BLOCK], tl.int64) + index_number
    if INDICES:
        index = tl.load(INDEX + at, mask=inside, other=0).to(tl.int64)
    tl.store(OUT + at, _mix64((key ^ _mix64(index)) + -0x61C8864680B583EB), mask=inside)


def folded(key: int | Tensor, index: int | Tensor) -> Tensor:
    """The keys, int64 of the broadcast shape, on the device of the tensors; numbers are signed.

    A scalar on the CPU is a number, too.
    """
    key, index = (
        int(part) if isinstance(part, Tensor) and part.device.type == "cpu" and part.dim() == 0 else part
        for part in (key, index)
    )
    tensors = torch.broadcast_tensors(*(part for part in (key, index) if isinstance(part, Tensor)))
    given = iter([tensor.contiguous() for tensor in tensors])
    out = torch.empty(tensors[0].shape, dtype=torch.int64, device=tensors[0].device)
    if out.numel() == 0:
        return out
    pointers = [next(given) if isinstance(part, Tensor) else None for part in (key, index)]
    numbers = [0 if isinstance(part, Tensor) else part for part in (key, index)]
    launch(-(-out.numel() // BLOCK), (out, *pointers, *numbers, out.numel(), *(p is not None for p in pointers), BLOCK))
    return out


def launch(programs: int, arguments: tuple[Any, ...]) -> None:
    """On the device of the result, its first argument."""
    with current(arguments[0].device):
        fold[(programs,)](*arguments)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """While a device is the one that triton launches on."""
    return torch.cuda.device(device)
