"""The bytes of a stream of records: frames, each a little JSON with a checksum, and the numbers of chunks of tokens.

A file is a magic line, a frame ``head``, frames ``part``, each followed by the numbers it tells of, and a frame
``done``. A frame is 4 bytes that name it, the length of its JSON (4 bytes, little-endian), the JSON, and the SHA-256
(32 bytes) of all that. See ``docs/replay.md``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitroute._validate import int_at_least
from circuitroute.routing.records.archive import MAGIC
from circuitroute.routing.records.layers import Array, Form, LayerRecord, bytes_of, checked_layer
from circuitroute.routing.records.record import RoutingRecord

VERSION = 1
HEAD, PART, DONE = b"head", b"part", b"done"
# So that a chunk of decisions that take no bytes, those for nobody, cannot promise more tokens than memory holds.
MOST_TOKENS = 1 << 20
# By the names of NumPy, little-endian wherever the file was written.
_CODES = {torch.uint8: "|u1", torch.int16: "<i2", torch.int32: "<i4"}
_DIGEST = hashlib.sha256().digest_size


class UnfinishedError(ValueError):
    """A file ends before its last frame does: whoever wrote it was interrupted, or the end was lost."""


@dataclass(frozen=True)
class Head:
    """What holds for all tokens: see :class:`RoutingRecord`."""

    experts: tuple[int, ...]
    log_probs: bool
    temperature: float = 1.0
    constraints: tuple[str | None, ...] | None = None
    model: str | None = None

    @staticmethod
    def of(record: RoutingRecord) -> Head:
        """That of a record."""
        known = record.log_probs is not None
        return Head(record.num_experts, known, record.temperature, record.constraints, record.model)

    def frame(self) -> bytes:
        """Its bytes, with those of the magic line."""
        return MAGIC + frame(HEAD, {"version": VERSION, **vars(self)})

    @staticmethod
    def read(told: dict[str, Any]) -> Head:
        """From the JSON of a frame.

        Raises:
            ValueError and others: a newer version, or nonsense.
        """
        if told["version"] != VERSION:
            raise ValueError(
                f"it is of version {told['version']}, and this circuitroute reads version {VERSION}: update it"
            )
        experts = tuple(int_at_least("experts", size, 1) for size in told["experts"])
        empty = [no_tokens(size) for size in experts]
        known = torch.zeros(0, len(experts), device="cpu") if told["log_probs"] else None
        # Which checks the rest.
        record = RoutingRecord(empty, known, told["temperature"], constraints=told["constraints"], model=told["model"])
        return Head.of(record)


@dataclass(frozen=True)
class Part:
    """A chunk of tokens: how its numbers are written, one array after the other.

    Attributes:
        tokens: t.
        layers: form, dtype and width of every layer's array [t, width].
        log_probs: whether [t, L] float32 follow.
        digest: SHA-256 of the numbers, in hexadecimal.
        start: where the numbers are in the file.
    """

    tokens: int
    layers: tuple[tuple[Form, str, int], ...]
    log_probs: bool
    digest: str
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Of the numbers."""
        per_token = sum(width * np.dtype(code).itemsize for _, code, width in self.layers)
        return self.tokens * (per_token + 4 * len(self.layers) * self.log_probs)

    @staticmethod
    def bytes_of(record: RoutingRecord) -> Iterator[bytes]:
        """A record as a frame and its numbers."""
        arrays = [layer.data.numpy().astype(_CODES[layer.data.dtype], copy=False) for layer in record.layers]
        if record.log_probs is not None:
            arrays.append(record.log_probs.numpy().astype("<f4", copy=False))
        numbers = [np.ascontiguousarray(array).tobytes() for array in arrays]
        digest = hashlib.sha256()
        for each in numbers:
            digest.update(each)
        layers = [(x.form, _CODES[x.data.dtype], x.data.shape[1]) for x in record.layers]
        yield frame(PART, {"tokens": len(record), "layers": layers, "sha256": digest.hexdigest()})
        yield from numbers

    @staticmethod
    def read(told: dict[str, Any], head: Head, start: int) -> Part:
        """From the JSON of a frame.

        Raises:
            ValueError and others: nonsense.
        """
        tokens = int_at_least("tokens", told["tokens"], 1)
        if tokens > MOST_TOKENS:
            raise ValueError(f"a chunk of {tokens} tokens is larger than any that is written")
        layers = tuple((form, code, int_at_least("width", width, 0)) for form, code, width in told["layers"])
        if len(layers) != len(head.experts) or any(code not in _CODES.values() for _, code, _ in layers):
            raise ValueError(f"a chunk is written as {layers!r}, for {len(head.experts)} layers")
        return Part(tokens, layers, head.log_probs, str(told["sha256"]), start)

    def check(self, data: memoryview) -> None:
        """Compare the file's bytes with the checksum.

        Raises:
            ValueError: they are not those that were written.
        """
        if hashlib.sha256(data[self.start : self.start + self.nbytes]).hexdigest() != self.digest:
            raise ValueError("its checksum is wrong")

    def rows(self, data: memoryview, experts: Sequence[int], at: Any) -> tuple[list[LayerRecord], Tensor | None]:
        """Some of its tokens, copied out of the file's bytes.

        Raises:
            ValueError: numbers that are none of any decision.
        """
        layers, place = [], self.start
        for i, (size, (form, code, width)) in enumerate(zip(experts, self.layers, strict=True)):
            numbers = _copied(data, place, code, (self.tokens, width), at)
            layers.append(checked_layer(f"layer {i}", numbers, size, form))
            place += self.tokens * width * np.dtype(code).itemsize
        if not self.log_probs:
            return layers, None
        return layers, torch.from_numpy(_copied(data, place, "<f4", (self.tokens, len(layers)), at))


def no_tokens(experts: int) -> LayerRecord:
    """A layer in which nothing was decided."""
    return LayerRecord(experts, "bits", torch.zeros(0, bytes_of(experts), dtype=torch.uint8, device="cpu"))


def _copied(data: memoryview, place: int, code: str, shape: tuple[int, int], at: Any) -> Array:
    dtype = np.dtype(code)
    whole = np.ndarray(shape, dtype, buffer=data, offset=place)
    return np.array(whole[at], dtype=dtype.newbyteorder("="), order="C")


def frame(name: bytes, told: dict[str, Any]) -> bytes:
    """The bytes of a frame."""
    text = json.dumps(told, separators=(",", ":")).encode("ascii")
    body = name + struct.pack("<I", len(text)) + text
    return body + hashlib.sha256(body).digest()


def read_frame(data: memoryview, start: int) -> tuple[bytes, dict[str, Any], int]:
    """The frame that begins at ``start``: its name, its JSON, and where it ends.

    Raises:
        UnfinishedError: the file ends first.
        ValueError: its checksum is wrong.
    """
    if start + 8 > len(data):
        raise UnfinishedError
    name, length = data[start : start + 4].tobytes(), int(struct.unpack("<I", data[start + 4 : start + 8].tobytes())[0])
    stop = start + 8 + length
    if stop + _DIGEST > len(data):
        raise UnfinishedError
    if hashlib.sha256(data[start:stop]).digest() != data[stop : stop + _DIGEST].tobytes():
        raise ValueError(f"the checksum of what begins at byte {start} is wrong")
    told = json.loads(data[start + 8 : stop].tobytes())
    if not isinstance(told, dict):
        raise ValueError(f"what begins at byte {start} is no frame")
    return name, told, stop + _DIGEST
