"""Text of a run, as bytes: what it trains on, and one or two parts held out. Where it comes from, `texts` says.

Shapes: B sequences, S bytes in each.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import DemoConfig


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text as uint8 vectors, where they come from, and the SHA-256 of all.

    `test` is a second held-out part, for runs that choose their best step on the first; it may be empty.
    """

    train: Tensor
    valid: Tensor
    source: str
    digest: str
    test: Tensor = field(default_factory=lambda: as_tensor(b""))

    def batch(self, config: DemoConfig, step: int) -> Tensor:
        """Training windows of one step, [B, S + 1] int64: a pure function of (text, seed, step), so that resuming needs
        no generator state."""
        if config.passes:
            return self._batch_of_pass(config, step)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{step}".encode()))
        starts_B = torch.randint(self.train.numel() - config.seq_len, (config.batch_size,), generator=generator)
        return _windows(self.train, starts_B, config.seq_len)

    def steps_per_pass(self, config: DemoConfig) -> int:
        """Steps that read the training text once, but for a rest that fills no batch."""
        return (self.train.numel() - config.seq_len) // config.tokens_per_step

    def _batch_of_pass(self, config: DemoConfig, step: int) -> Tensor:
        """Every pass cuts the text into windows at another offset, and reads them in another order."""
        count, length = self.steps_per_pass(config), config.seq_len
        number, place = divmod(step, count)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/pass {number}".encode()))
        offset = int(torch.randint(length, (), generator=generator))
        order = torch.randperm(count * config.batch_size, generator=generator)
        starts_B = offset + length * order[place * config.batch_size : (place + 1) * config.batch_size]
        return _windows(self.train, starts_B, length)

    def validation(self, config: DemoConfig) -> list[Tensor]:
        """The same held-out windows for every router and step: batches [B, S + 1] int64, evenly spread."""
        return _spread(self.valid, config.validation_batches, config)

    def testing(self, config: DemoConfig) -> list[Tensor]:
        """Likewise of the second held-out part."""
        return _spread(self.test, config.test_batches, config) if config.test_batches else []


def make_corpus(train: bytes, valid: bytes, source: str, test: bytes = b"") -> Corpus:
    """A corpus of these texts."""
    held_out = b"\0held out\0".join([valid, test] if test else [valid])
    digest = hashlib.sha256(train + b"\0held out\0" + held_out).hexdigest()
    return Corpus(as_tensor(train), as_tensor(valid), source, digest, as_tensor(test))


def as_tensor(data: bytes) -> Tensor:
    """[bytes] uint8."""
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a bytearray, for a tensor that may be written to


def _spread(text: Tensor, batches: int, config: DemoConfig) -> list[Tensor]:
    count = batches * config.batch_size
    starts = torch.linspace(0, text.numel() - config.seq_len - 1, count, dtype=torch.float64).long()
    return [_windows(text, starts_B, config.seq_len) for starts_B in starts.split(config.batch_size)]


def _windows(text: Tensor, starts_B: Tensor, length: int) -> Tensor:
    return text[starts_B[:, None] + torch.arange(length + 1)].long()
