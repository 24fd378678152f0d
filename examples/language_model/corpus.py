"""Real text that every machine has: the sources of Python's standard library, as bytes, with a held-out part.

Shapes: B sequences, S bytes in each.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import DemoConfig, DemoError

MAX_BYTES = 16_000_000
HELD_OUT_FILES = 20  # one file in so many is held out
HELD_OUT_FRACTION = 0.1  # of a text given as one file
# Tests, other people's packages and files that differ from machine to machine. `encodings` is all tables: no
# language to model, and easy enough to compress that it would flatter every router.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text as uint8 vectors, where they come from, and the SHA-256 of both."""

    train: Tensor
    valid: Tensor
    source: str
    digest: str

    def batch(self, config: DemoConfig, step: int) -> Tensor:
        """Training windows of one step, [B, S + 1] int64: a pure function of (text, seed, step), so that resuming needs
        no generator state."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{step}".encode()))
        starts_B = torch.randint(self.train.numel() - config.seq_len, (config.batch_size,), generator=generator)
        return _windows(self.train, starts_B, config.seq_len)

    def validation(self, config: DemoConfig) -> list[Tensor]:
        """The same held-out windows for every router and step: batches [B, S + 1] int64, evenly spread."""
        count = config.validation_batches * config.batch_size
        starts = torch.linspace(0, self.valid.numel() - config.seq_len - 1, count, dtype=torch.float64).long()
        return [_windows(self.valid, starts_B, config.seq_len) for starts_B in starts.split(config.batch_size)]


def load_corpus(config: DemoConfig) -> Corpus:
    """The user's text or the standard library. Raises DemoError (argument "text") when it is missing or too small."""
    corpus = _standard_library() if config.text is None else _from_file(Path(config.text))
    least = config.tokens_per_step + 1
    train, valid = corpus.train.numel(), corpus.valid.numel()
    if min(train, valid) < least:
        raise DemoError(
            f"{corpus.source} is too small: {train:,} bytes to train on and {valid:,} held out, where each must fill "
            f"a batch of {config.batch_size} x {config.seq_len} bytes ({least:,}): a longer text, or a smaller "
            "--batch-size or --seq-len",
            "text",
        )
    return corpus


def _from_file(path: Path) -> Corpus:
    try:
        data = path.read_bytes()[:MAX_BYTES]
    except OSError as error:
        raise DemoError(f"cannot read {str(path)!r}: {error.strerror or error}", "text") from None
    split = len(data) - int(len(data) * HELD_OUT_FRACTION)
    return _corpus(data[:split], data[split:], str(path))


def _standard_library() -> Corpus:
    """Held out by file, on a hash of its name, so that other versions of Python split the files they share alike."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    total = 0
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(root):
        data = path.read_bytes()
        total += len(data)
        if total > MAX_BYTES:
            break
        name = path.relative_to(root).as_posix()
        parts[zlib.crc32(name.encode()) % HELD_OUT_FILES == 0].append(data)
    version = f"the standard library of Python {sysconfig.get_python_version()}"
    return _corpus(b"\n".join(parts[False]), b"\n".join(parts[True]), version)


def _sources(root: Path) -> Iterator[Path]:
    """Python files below `root` in a fixed order, whatever order the file system lists them in."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)  # os.walk goes on into what is left here
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py" and not name.startswith("_sysconfigdata") and path.is_file():
                yield path


def _corpus(train: bytes, valid: bytes, source: str) -> Corpus:
    digest = hashlib.sha256(train + b"\0held out\0" + valid).hexdigest()
    return Corpus(_as_tensor(train), _as_tensor(valid), source, digest)


def _as_tensor(data: bytes) -> Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a bytearray, for a tensor that may be written to


def _windows(text: Tensor, starts_B: Tensor, length: int) -> Tensor:
    return text[starts_B[:, None] + torch.arange(length + 1)].long()
