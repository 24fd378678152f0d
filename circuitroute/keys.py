"""Counter-based randomness: integers in, integers or uniforms out, no state anywhere.

A sample that is a pure function of its key is the same in any batch, on any number of processes and at every
recomputation (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). The 64-bit mixer is the
finaliser of SplitMix64 (Steele, Lea & Flood 2014); the 32-bit one is the two-multiplication xor-shift-multiply
finaliser found by search (Wellons, hash-prospector).

All arithmetic is on signed integers that wrap; right shifts are made logical by masking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitroute._validate import as_int

_GOLDEN64 = 0x9E3779B97F4A7C15
_GOLDEN32 = 0x9E3779B9


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _xor_shift(x: Tensor, shift: int, bits: int) -> Tensor:
    return x ^ ((x >> shift) & ((1 << (bits - shift)) - 1))


def mix64(x: Tensor) -> Tensor:
    """A bijection of int64 that spreads every bit over the whole word."""
    x = _xor_shift(x, 30, 64) * _signed(0xBF58476D1CE4E5B9, 64)
    x = _xor_shift(x, 27, 64) * _signed(0x94D049BB133111EB, 64)
    return _xor_shift(x, 31, 64)


def random_key(seed: int | Tensor, *indices: int | Tensor) -> Tensor:
    """Mix integers into sampling keys, e.g. ``random_key(seed, step, layer, torch.arange(tokens))``.

    Args:
        seed: an integer or integer tensor.
        indices: further integers or integer tensors; all are broadcast together. Order matters.

    Returns:
        int64 tensor of the broadcast shape (a scalar tensor when all are integers).

    Raises:
        TypeError: an argument is neither an integer nor an integer tensor.
    """
    parts = [as_key("seed", seed)] + [as_key(f"indices[{i}]", value) for i, value in enumerate(indices)]
    device = next((p.device for p in parts if p.dim() > 0), None)
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        key = mix64((key ^ mix64(part.to(key.device))) + _signed(_GOLDEN64, 64))
    return key


def as_key(name: str, value: int | Tensor) -> Tensor:
    """An integer of any size (modulo 2^64) or an integer tensor, as int64.

    Raises:
        TypeError: it is neither; the message calls it ``name``.
    """
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}: expected an integer tensor")
        return value.to(torch.int64)
    return torch.tensor(_signed(as_int(name, value), 64), dtype=torch.int64)


def drawn_keys(tokens: int, device: torch.device) -> Tensor:
    """[T] int64 keys from torch's global generator, as a decision without keys draws them, for all draws of a layer.

    Drawn once in training, with gradients or without: a recomputation of several layers must leave the generator where
    their first run left it.
    """
    return torch.randint(-(1 << 63), (1 << 63) - 1, (tokens,), dtype=torch.int64, device=device)


def fold_in(key: Tensor, index: Tensor) -> Tensor:
    """The keys of several draws from one key: both int64, broadcast together."""
    return mix64((key ^ mix64(index)) + _signed(_GOLDEN64, 64))


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
    x = _xor_shift_(x, 16) * _signed(0x7FEB352D, 32)
    x = _xor_shift_(x.bitwise_xor_(high), 15).mul_(_signed(0x846CA68B, 32))
    x = _xor_shift_(x, 16)
    return x.to(dtype).add_(0.5).mul_(2.0**-32).add_(0.5)


def _xor_shift_(x: Tensor, shift: int) -> Tensor:
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))
