"""Records of more tokens than memory holds, read by mapping the file into memory.

Legend: T tokens, L layers, E experts of a layer.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitroute._files import as_path
from circuitroute._validate import as_flag, int_at_least
from circuitroute.errors import CircuitFileError
from circuitroute.routing.records.archive import MAGIC
from circuitroute.routing.records.frames import DONE, HEAD, PART, Head, Part, UnfinishedError, no_tokens, read_frame
from circuitroute.routing.records.layers import Array, LayerRecord, joined
from circuitroute.routing.records.record import RoutingRecord, as_rows

# What reading nonsense with a right checksum may raise.
_NONSENSE = (ValueError, KeyError, TypeError, OverflowError, RuntimeError, MemoryError)


class RecordFile:
    """The records of a file that :class:`RecordWriter` wrote, mapped into memory: only what is asked for is read.

    ``file[start:stop]``, ``file[indices]`` and ``file[mask]`` are :class:`RoutingRecord` of those tokens, in that
    order, copied; ``len(file)`` is T. The checksum of a chunk is compared when the first of its tokens is read, and all
    of them by :meth:`verify`; those of the parts that say what is where are compared here. Nothing in it is executed.

    Args:
        path: the file.
        partial: also read one that was not completed: its whole chunks.

    Attributes:
        num_experts: E of every layer.
        temperature, constraints, model: see :class:`RoutingRecord`.
        complete: whether the file has its end.

    Raises:
        FileNotFoundError: there is no such file.
        CircuitFileError: the file is damaged, of another kind or a newer version, or was not completed; names the path,
            and how many tokens can be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, partial: bool = False) -> None:
        self.path = as_path("path", path)
        self._partial = as_flag("partial", partial)
        self._map: mmap.mmap | None = None
        try:
            self._map = _mapped(self.path)
            with memoryview(self._map) as data:
                self._head, self._parts, self.complete = _contents(data)
        except _NONSENSE as error:
            raise CircuitFileError(f"{self.path} is not a readable stream of routing records: {error}") from None
        self._starts = np.cumsum([0, *(part.tokens for part in self._parts)])
        self._checked: set[int] = set()
        self.num_experts = self._head.experts
        self.temperature = self._head.temperature
        self.constraints = self._head.constraints
        self.model = self._head.model
        if not (self.complete or self._partial):
            raise CircuitFileError(
                f"{self.path} is not complete: whoever wrote it was interrupted, or its end was lost. "
                f"RecordFile(path, partial=True) reads its first {len(self)} tokens, in {len(self._parts)} whole chunks"
            )

    @property
    def has_log_probs(self) -> bool:
        """Whether log-probabilities were recorded."""
        return self._head.log_probs

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the file over its tokens; 0 if there are none."""
        return self.path.stat().st_size / len(self) if len(self) else 0.0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, tokens: slice | Tensor | Sequence[int]) -> RoutingRecord:
        """Some tokens: a slice, indices or a mask [T].

        Raises:
            IndexError: an index outside 0..T-1, a mask of another length, or something else.
            CircuitFileError: a chunk is damaged; names the path, the chunk and its tokens.
            ValueError: the file is closed.
        """
        if isinstance(tokens, slice):
            return self._gathered(np.arange(*tokens.indices(len(self))))
        at = as_rows(tokens)
        if at.dtype == torch.bool:
            if len(at) != len(self):
                raise IndexError(f"a mask of {len(at)} tokens: the file has {len(self)}")
            at = at.nonzero()[:, 0]
        index = at.numpy().astype(np.int64)
        outside = (index < -len(self)) | (index >= len(self))
        if outside.any():
            raise IndexError(f"index {index[outside][0]} is outside of the file's {len(self)} tokens")
        return self._gathered(np.where(index < 0, index + len(self), index))

    def batches(self, tokens: int) -> Iterator[RoutingRecord]:
        """All tokens in order, ``tokens`` at a time; the last are what is left.

        Raises:
            ValueError: ``tokens`` is not at least 1.
            CircuitFileError: a chunk is damaged.
        """
        size = int_at_least("tokens", tokens, 1)
        return (self[start : start + size] for start in range(0, len(self), size))

    def verify(self) -> None:
        """Read all of it and compare every checksum.

        Raises:
            CircuitFileError: a chunk is damaged; names the path, the chunk and its tokens.
        """
        for chunk in range(len(self._parts)):
            self._rows(chunk, slice(None))

    def close(self) -> None:
        """Let go of the file; records that were read from it stay."""
        if self._map is not None:
            self._map.close()
        self._map = None

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (str(self.path), self._partial)

    def __repr__(self) -> str:
        end = "" if self.complete else ", not complete"
        return f"RecordFile({str(self.path)!r}, {len(self)} tokens, {len(self.num_experts)} layers{end})"

    def _gathered(self, index: Array) -> RoutingRecord:
        """The tokens of an index [t], each within 0..T-1."""
        chunks = np.searchsorted(self._starts, index, side="right") - 1
        order = np.argsort(chunks, kind="stable")
        found = []
        for chunk in np.unique(chunks):
            mine = order[np.searchsorted(chunks[order], chunk) : np.searchsorted(chunks[order], chunk, side="right")]
            found.append(self._rows(int(chunk), _as_slice(index[mine] - self._starts[chunk])))
        layers = (
            [joined([layers[i] for layers, _ in found]) for i in range(len(self.num_experts))]
            if found
            else [no_tokens(size) for size in self.num_experts]
        )
        known = None
        if self.has_log_probs:
            known = torch.cat(
                [torch.zeros(0, len(layers), device="cpu"), *(part for _, part in found if part is not None)]
            )
        record = RoutingRecord(layers, known, self.temperature, constraints=self.constraints, model=self.model)
        ordered = bool((order == np.arange(len(order))).all())
        return record if ordered else record[torch.from_numpy(np.argsort(order))]

    def _rows(self, chunk: int, at: Any) -> tuple[list[LayerRecord], Tensor | None]:
        if self._map is None:
            raise ValueError(f"{self.path} was closed: open it again")
        part = self._parts[chunk]
        try:
            with memoryview(self._map) as data:
                if chunk not in self._checked:
                    part.check(data)
                    self._checked.add(chunk)
                return part.rows(data, self.num_experts, at)
        except _NONSENSE as error:
            first = int(self._starts[chunk])
            raise CircuitFileError(
                f"{self.path} is damaged in chunk {chunk}, tokens {first} to {first + part.tokens - 1}: {error}; the "
                "others can be read"
            ) from None
        finally:
            _let_go(self._map, part)


def _opened(path: str, partial: bool) -> RecordFile:
    return RecordFile(path, partial=partial)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < len(MAGIC):
            raise ValueError("it is too short to be one")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _let_go(mapped: mmap.mmap, part: Part) -> None:
    """Tell the system, where it can be told, that the pages of a chunk need not stay in this process."""
    if hasattr(mmap, "MADV_DONTNEED"):
        begin = part.start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, begin, part.start + part.nbytes - begin)


def _as_slice(rows: Array) -> Any:
    """An index of consecutive rows as a slice, which is read without an index."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _contents(data: memoryview) -> tuple[Head, list[Part], bool]:
    """What is where in a file; and whether its end is there.

    Raises:
        ValueError and others: it is something else, or damaged.
    """
    if data[: len(MAGIC)].tobytes() != MAGIC:
        remedy = "; RoutingRecord.load reads archives" if data[:2].tobytes() == b"PK" else ""
        raise ValueError(f"it is of another kind{remedy}")
    try:
        name, told, place = read_frame(data, len(MAGIC))
    except UnfinishedError:
        raise ValueError("it ends before it says of which layers it is") from None
    if name != HEAD:
        raise ValueError(f"it begins with {name!r}")
    head, parts, digest = Head.read(told), list[Part](), hashlib.sha256()
    while True:
        start = place
        try:
            name, told, place = read_frame(data, start)
        except UnfinishedError:
            return head, parts, False
        if name == DONE:
            break
        if name != PART:
            raise ValueError(f"there is {name!r} at byte {start}")
        part = Part.read(told, head, place)
        if place + part.nbytes > len(data):
            return head, parts, False
        digest.update(data[start:place])
        parts.append(part)
        place += part.nbytes
    _compare(told, parts, digest.hexdigest(), len(data) - place)
    return head, parts, True


def _compare(told: dict[str, Any], parts: Sequence[Part], digest: str, beyond: int) -> None:
    tokens = sum(part.tokens for part in parts)
    if told["tokens"] != tokens or told["sha256"] != digest:
        raise ValueError(f"its chunks, of {tokens} tokens, are not the {told['tokens']} that its end speaks of")
    if beyond:
        raise ValueError(f"{beyond} bytes follow its end")
