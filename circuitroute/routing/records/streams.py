"""Records of more tokens than memory holds: written batch by batch, read by mapping the file into memory.

Legend: T tokens, L layers, E experts of a layer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from circuitroute._files import as_path
from circuitroute._validate import as_flag, as_items, int_at_least
from circuitroute.errors import CircuitFileError
from circuitroute.routing.records.frames import (
    DONE,
    HEAD,
    MAGIC,
    MOST_TOKENS,
    PART,
    Head,
    Part,
    Unfinished,
    frame,
    read_frame,
)
from circuitroute.routing.records.layers import Array, LayerRecord, joined
from circuitroute.routing.records.record import RoutingRecord, as_rows

_NONSENSE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


class RecordWriter:
    """Appends records to a file that :class:`RecordFile` reads, holding no more than a chunk of tokens in memory.

    It is written beside its place, as ``PATH.partial``, and moved there when it is complete: on :meth:`close`, or at the
    end of a ``with`` block. Where an exception leaves the block, or the process ends before, PATH is what it was, and
    all complete chunks are in ``PATH.partial``, which ``RecordFile(..., partial=True)`` reads. Nothing is pickled.

    Args:
        path: where the file is to be; one that is there is replaced in one step.
        num_experts: E, one per layer; only needed where there may be no tokens at all. All else that holds for the
            whole file is taken from the first record: layers, temperature, constraints, model, and whether there are
            log-probabilities.
        tokens_per_chunk: how many tokens are written together, with one checksum.

    Raises:
        TypeError, ValueError: arguments of other kinds.
        FileExistsError: there is a ``PATH.partial``, of another writer or of one that was interrupted.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_experts: Sequence[int] | None = None,
        *,
        tokens_per_chunk: int = 4096,
    ) -> None:
        self.path = as_path("path", path)
        self.tokens_per_chunk = int_at_least("tokens_per_chunk", tokens_per_chunk, 1)
        if self.tokens_per_chunk > MOST_TOKENS:
            raise ValueError(f"tokens_per_chunk={self.tokens_per_chunk}: must be at most {MOST_TOKENS}")
        self._experts = None if num_experts is None else _sizes(num_experts)
        self._head: Head | None = None
        self._waiting: list[RoutingRecord] = []
        self._tokens = 0
        self._digest = hashlib.sha256()
        self._target = Path(os.path.realpath(self.path))
        self._beside = self._target.with_name(self._target.name + ".partial")
        try:
            self._file: BinaryIO = self._beside.open("xb")
        except FileExistsError as error:
            remedy = f"read what is in it by RecordFile({str(self._beside)!r}, partial=True), or remove it"
            raise FileExistsError(error.errno, f"another writer's file is there; {remedy}", str(self._beside)) from None

    def append(self, record: RoutingRecord) -> None:
        """Add the tokens of a record; written to the file when there are enough for a chunk.

        Raises:
            TypeError: no record.
            ValueError: the writer is closed; or the record is of other layers, temperature, constraints or model than
                the first one, or has log-probabilities where that has none: nothing of it is added.
            OSError: a chunk cannot be written, as on a full disk: it is taken back, waits in memory, and is written
                again by the next call.
        """
        if not isinstance(record, RoutingRecord):
            raise TypeError(f"record is a {type(record).__name__}: expected a RoutingRecord")
        if self._file.closed:
            raise ValueError(f"the writer of {self.path} is closed: open another one, for another file")
        head = Head.of(record)
        if self._experts not in (None, head.experts):
            raise ValueError(f"record has layers of {list(head.experts)} experts: expected {list(self._experts or ())}")
        if self._head is None:
            self._begin(head)
        else:
            _same(self._head, head)
        if len(record):
            self._waiting.append(record)
            self._tokens += len(record)
        self._write(whole=False)

    def flush(self) -> None:
        """Write what waits in memory, as a chunk of its own, for others to read.

        Raises:
            OSError: it cannot be written.
        """
        self._write(whole=True)
        self._file.flush()

    def close(self) -> None:
        """Complete the file and move it to its place; again does nothing.

        Raises:
            ValueError: there is no record, and no ``num_experts`` says of what layers there is none.
            OSError: it cannot be written; ``PATH.partial`` is left, and what was at the path.
        """
        if self._file.closed:
            return
        if self._head is None and self._experts is None:
            self._abandon()
            self._beside.unlink()
            raise ValueError("nothing was appended: give num_experts, or append a record of no tokens")
        try:
            if self._head is None:
                self._begin(Head(self._experts or (), log_probs=False))
            self._write(whole=True)
            self._put([frame(DONE, {"tokens": self._tokens, "sha256": self._digest.hexdigest()})])
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._abandon()
        os.replace(self._beside, self._target)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the file by now, over the tokens in it; 0 while there are none."""
        written = self._tokens - sum(map(len, self._waiting))
        return self._file.tell() / written if not self._file.closed and written else 0.0

    def __len__(self) -> int:
        """How many tokens were appended."""
        return self._tokens

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            if not self._file.closed:
                self.flush()
        finally:
            self._abandon()

    def __repr__(self) -> str:
        return f"RecordWriter({str(self.path)!r}, {self._tokens} tokens{', closed' if self._file.closed else ''})"

    def _abandon(self) -> None:
        with suppress(OSError):  # what is in Python's buffer: the chunk that could not be written was reported
            self._file.close()

    def _begin(self, head: Head) -> None:
        self._put([head.frame()])
        self._head = head

    def _write(self, *, whole: bool) -> None:
        """Chunks of what waits; of all of it, if that is the whole."""
        waiting = sum(map(len, self._waiting))
        if waiting < self.tokens_per_chunk and not (whole and waiting):
            return
        record = RoutingRecord.cat(self._waiting)
        self._waiting = [record]
        while len(record) >= self.tokens_per_chunk or (whole and len(record)):
            self._put(Part.bytes_of(record[: self.tokens_per_chunk]), counted=True)
            record = record[self.tokens_per_chunk :]
            self._waiting = [record] if len(record) else []

    def _put(self, parts: Any, counted: bool = False) -> None:
        """All parts, or none of them."""
        before = self._file.tell()
        first = b""
        try:
            for part in parts:
                first = first or part
                self._file.write(part)
            self._file.flush()
        except BaseException:
            self._file.seek(before)
            self._file.truncate()
            raise
        if counted:
            self._digest.update(first)


class RecordFile:
    """The records of a file that :class:`RecordWriter` wrote, mapped into memory: only what is asked for is read.

    ``file[start:stop]``, ``file[indices]`` and ``file[mask]`` are :class:`RoutingRecord` of those tokens, in that order,
    copied; ``len(file)`` is T. The checksum of a chunk is compared when the first of its tokens is read, and all of
    them by :meth:`verify`; those of the parts that say what is where are compared here. Nothing in it is executed.

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
        self._data: Array | None = None
        try:
            if self.path.stat().st_size < len(MAGIC):
                raise ValueError("it is too short to be one")
            self._data = np.memmap(self.path, dtype=np.uint8, mode="r")
            self._head, self._parts, self.complete = _contents(self._data)
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
        self._data = None

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
            else [LayerRecord.of(torch.zeros(0, size, dtype=torch.bool)) for size in self.num_experts]
        )
        known = None
        if self.has_log_probs:
            known = torch.cat([torch.zeros(0, len(layers)), *(part for _, part in found if part is not None)])
        record = RoutingRecord(layers, known, self.temperature, constraints=self.constraints, model=self.model)
        ordered = bool((order == np.arange(len(order))).all())
        return record if ordered else record[torch.from_numpy(np.argsort(order))]

    def _rows(self, chunk: int, at: Any) -> tuple[list[LayerRecord], Tensor | None]:
        if self._data is None:
            raise ValueError(f"{self.path} was closed: open it again")
        part = self._parts[chunk]
        try:
            if chunk not in self._checked:
                part.check(self._data)
                self._checked.add(chunk)
            return part.rows(self._data, self.num_experts, at)
        except _NONSENSE as error:
            first = int(self._starts[chunk])
            raise CircuitFileError(
                f"{self.path} is damaged in chunk {chunk}, tokens {first} to {first + part.tokens - 1}: {error}; the "
                "others can be read"
            ) from None


def _opened(path: str, partial: bool) -> RecordFile:
    return RecordFile(path, partial=partial)


def _sizes(num_experts: object) -> tuple[int, ...]:
    sizes = as_items("num_experts", num_experts, "E of every layer")
    if not sizes:
        raise ValueError("num_experts is empty: a record has one entry per routing layer")
    return tuple(int_at_least(f"num_experts[{i}]", size, 1) for i, size in enumerate(sizes))


def _same(first: Head, other: Head) -> None:
    for name, mine in vars(first).items():
        given = getattr(other, name)
        if given != mine:
            raise ValueError(
                f"record has {name}={given!r}, and the stream, by its first record, {mine!r}: write it to a file of "
                "its own"
            )


def _as_slice(rows: Array) -> Any:
    """An index of consecutive rows as a slice, which is read without an index."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _contents(data: Array) -> tuple[Head, list[Part], bool]:
    """What is where in a file; and whether its end is there.

    Raises:
        ValueError and others: it is something else, or damaged.
    """
    if data[: len(MAGIC)].tobytes() != MAGIC:
        remedy = "; RoutingRecord.load reads archives" if data[:2].tobytes() == b"PK" else ""
        raise ValueError(f"it is of another kind{remedy}")
    try:
        name, told, place = read_frame(data, len(MAGIC))
    except Unfinished:
        raise ValueError("it ends before it says of which layers it is") from None
    if name != HEAD:
        raise ValueError(f"it begins with {name!r}")
    head, parts, digest = Head.read(told), list[Part](), hashlib.sha256()
    while True:
        start = place
        try:
            name, told, place = read_frame(data, start)
        except Unfinished:
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
