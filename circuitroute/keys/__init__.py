"""Counter-based randomness: integers in, integers or uniforms out, no state anywhere.

A sample that is a pure function of its key is the same in any batch, on any number of processes and at every
recomputation (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). The 64-bit mixer is the
finaliser of SplitMix64 (Steele, Lea & Flood 2014); the 32-bit one is the two-multiplication xor-shift-multiply
finaliser found by search (Wellons, hash-prospector).

All arithmetic is on signed integers that wrap; right shifts are made logical by masking.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from circuitroute._tensors import plain
from circuitroute._validate import as_int

_GOLDEN64 = 0x9E3779B97F4A7C15
_GOLDEN32 = 0x9E3779B9


_FACTORS64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def mix64(x: Tensor) -> Tensor:
    """A bijection of int64 that spreads every bit over the whole word."""
    return _mix64_(x.clone())


def _mix64_(x: Tensor) -> Tensor:
    """The same, in place."""
    x = _xor_shift_(x, 30, 64).mul_(_signed(_FACTORS64[0], 64))
    x = _xor_shift_(x, 27, 64).mul_(_signed(_FACTORS64[1], 64))
    return _xor_shift_(x, 31, 64)


def _host_mix64(x: int) -> int:
    """The same of an integer in [0, 2^64)."""
    x = (x ^ (x >> 30)) * _FACTORS64[0] & _WORD
    x = (x ^ (x >> 27)) * _FACTORS64[1] & _WORD
    return x ^ (x >> 31)


def random_key(seed: int | Tensor, *indices: int | Tensor) -> Tensor:
    """Mix integers into sampling keys, e.g. ``random_key(seed, step, layer, torch.arange(tokens))``.

    Integers are mixed on the host, and cost a GPU nothing; a tensor there costs one kernel, where triton is installed.

    Args:
        seed: an integer or integer tensor.
        indices: further integers or integer tensors; all are broadcast together. Order matters.

    Returns:
        int64 tensor of the broadcast shape (a scalar tensor on the CPU when all are integers).

    Raises:
        TypeError: an argument is neither an integer nor an integer tensor.
    """
    parts = [_part("seed", seed)] + [_part(f"indices[{i}]", value) for i, value in enumerate(indices)]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    device = next((part.device for part in [t for t in tensors if t.dim() > 0] + tensors), None)
    key: int | Tensor = 0
    for part in parts:
        key = _fold(key, part if isinstance(part, int) or _is_number(part) else part.to(device))
    return torch.tensor(_signed(key, 64), device="cpu") if isinstance(key, int) else key


def _is_number(part: Tensor) -> bool:
    """Whether the host knows its value: such tensors mix with those of any device."""
    return part.dim() == 0 and part.device.type == "cpu"


def _part(name: str, value: int | Tensor) -> int | Tensor:
    """An integer tensor as it is, any other integer modulo 2^64."""
    if not isinstance(value, Tensor):
        return as_int(name, value) & _WORD
    value = plain(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}: expected an integer tensor")
    return value


def as_key(name: str, value: int | Tensor, device: torch.device | None = None) -> Tensor:
    """An integer of any size (modulo 2^64) or an integer tensor, as int64.

    Args:
        device: where the result is to be; None leaves tensors where they are. An integer gets there without a copy,
            for which the host would wait.

    Raises:
        TypeError: it is neither; the message calls it ``name``.
    """
    part = _part(name, value)
    if isinstance(part, Tensor):
        return part.to(part.device if device is None else device, torch.int64)
    return torch.full((), _signed(part, 64), dtype=torch.int64, device=device)


def _fold(key: int | Tensor, index: int | Tensor) -> int | Tensor:
    """mix64((key ^ mix64(index)) + golden ratio), on the host for integers."""
    if isinstance(key, int) and isinstance(index, int):
        return _host_mix64(((key ^ _host_mix64(index)) + _GOLDEN64) & _WORD)
    if any(isinstance(part, Tensor) and part.is_cuda for part in (key, index)) and _kernels_run():
        from circuitroute.keys.folding import folded

        return folded(*(_signed(part, 64) if isinstance(part, int) else part for part in (key, index)))
    mixed = mix64(index.to(torch.int64)) if isinstance(index, Tensor) else _signed(_host_mix64(index), 64)
    wrapped = mixed ^ (key.to(torch.int64) if isinstance(key, Tensor) else _signed(key, 64))
    assert isinstance(wrapped, Tensor)  # since one of them is
    return _mix64_(wrapped.add_(_signed(_GOLDEN64, 64)))


def _kernels_run() -> bool:
    """Whether CUDA tensors are mixed by a kernel; in traced programs the compiler makes one of its own."""
    return _has_triton() and not torch.compiler.is_compiling()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def drawn_keys(tokens: int, device: torch.device) -> Tensor:
    """[T] int64 keys from torch's global generator, as a decision without keys draws them, for all draws of a layer.

    Drawn once in training, with gradients or without: a recomputation of several layers must leave the generator where
    their first run left it.
    """
    return torch.randint(-(1 << 63), (1 << 63) - 1, (tokens,), dtype=torch.int64, device=device)


def row_keys(
    key: Tensor | int | None, sample_shape: torch.Size, batch_shape: torch.Size, device: torch.device
) -> Tensor:
    """[samples * T] int64 keys of samples of shape sample_shape + batch_shape.

    A key without the sample dimensions is mixed with the sample's index; None draws keys from torch's global generator.

    Raises:
        TypeError: ``key`` is neither an integer nor an integer tensor.
        ValueError: it does not broadcast.
    """
    full = sample_shape + batch_shape
    if key is None:
        return drawn_keys(full.numel(), device)
    given = as_key("key", key, device)
    try:
        if given.dim() <= len(batch_shape):
            given = given.expand(batch_shape)
            if len(sample_shape):
                index = torch.arange(sample_shape.numel(), device=device)
                given = fold_in(given, index.reshape(sample_shape + (1,) * len(batch_shape)))
        return given.expand(full).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"key has shape {tuple(given.shape)}: it must broadcast to the batch {tuple(batch_shape)} or to "
            f"sample_shape + batch {tuple(full)}"
        ) from None


def fold_in(key: Tensor, index: Tensor) -> Tensor:
    """The keys of several draws from one key: both int64, broadcast together."""
    found = _fold(key, index)
    assert isinstance(found, Tensor)  # of tensors
    return found


def uniform(key_T: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """The uniforms number ``first`` to ``first + count - 1`` of every key.

    Args:
        key_T: [T] int64.
        dtype: float64 gives (word + 1/2) / 2^32 exactly, strictly inside (0, 1); float32 its rounding.

    Returns:
        [count, T].
    """
    return uniform_at(key_T, torch.arange(first, first + count, device=key_T.device)[:, None], dtype)


def uniform_at(key_T: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    """The uniforms with these numbers: int64, [..., T] or broadcasting with it; see :func:`uniform`."""
    mixed = mix64(key_T)
    low, high = mixed.to(torch.int32), (mixed >> 32).to(torch.int32)
    x = (number * _GOLDEN32).to(torch.int32) ^ low
    x = _xor_shift_(x, 16, 32).mul_(_signed(0x7FEB352D, 32))
    x = _xor_shift_(x.bitwise_xor_(high), 15, 32).mul_(_signed(0x846CA68B, 32))
    x = _xor_shift_(x, 16, 32)
    return x.to(dtype).add_(0.5).mul_(2.0**-32).add_(0.5)


def _xor_shift_(x: Tensor, shift: int, bits: int) -> Tensor:
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (bits - shift)) - 1))
