"""Records of more tokens than memory holds, written batch by batch.

Legend: T tokens, L layers, E experts of a layer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from types import TracebackType

from circuitroute._files import Growing, as_path
from circuitroute._validate import as_items, int_at_least
from circuitroute.routing.records.frames import DONE, MOST_TOKENS, Head, Part, frame
from circuitroute.routing.records.record import RoutingRecord
from circuitroute.routing.records.sources import same_temperature


class RecordWriter:
    """Appends records to a file that :class:`RecordFile` reads, holding no more than a chunk of tokens in memory.

    It is written beside its place, as ``PATH.partial``, and moved there when it is complete: on :meth:`close`, or at
    the end of a ``with`` block. Where an exception leaves the block, or the process ends before, PATH is what it was,
    and all whole chunks are in ``PATH.partial``, which ``RecordFile(..., partial=True)`` reads. Nothing is pickled.

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
        self._tokens = self._written = self._bytes = 0
        self._digest = hashlib.sha256()
        try:
            self._file = Growing(self.path)
        except FileExistsError as error:
            remedy = f"read it by RecordFile({error.filename!r}, partial=True), or remove it"
            raise FileExistsError(error.errno, f"another writer's file is there; {remedy}", error.filename) from None

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
        self._write(least=self.tokens_per_chunk)

    def flush(self) -> None:
        """Write what waits in memory, as a chunk of its own, for others to read.

        Raises:
            OSError: it cannot be written.
        """
        self._write(least=1)

    def close(self) -> None:
        """Complete the file and move it to its place; again does nothing.

        Raises:
            ValueError: there is no record, and no ``num_experts`` says of what layers there is none.
            OSError: it cannot be written; ``PATH.partial`` is left, and what was at the path.
        """
        if self._file.closed:
            return
        if self._head is None and self._experts is None:
            self._file.drop()
            raise ValueError("nothing was appended: give num_experts, or append a record of no tokens")
        try:
            if self._head is None:
                self._begin(Head(self._experts or (), log_probs=False))
            self._write(least=1)
            self._file.put([frame(DONE, {"tokens": self._tokens, "sha256": self._digest.hexdigest()})])
            self._file.complete()
        finally:
            self._file.leave()

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the file over the tokens in it by now; 0 before there are any."""
        return self._bytes / self._written if self._written else 0.0

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
            self._file.leave()

    def __repr__(self) -> str:
        return f"RecordWriter({str(self.path)!r}, {self._tokens} tokens{', closed' if self._file.closed else ''})"

    def _begin(self, head: Head) -> None:
        self._put([head.frame()])
        self._head = head

    def _write(self, least: int) -> None:
        """Chunks of what waits, while there are so many tokens."""
        if self._tokens - self._written < max(least, 1):
            return
        record = RoutingRecord.cat(self._waiting)
        self._waiting = [record]
        while len(record) >= least:
            chunk, record = record[: self.tokens_per_chunk], record[self.tokens_per_chunk :]
            first, *numbers = Part.bytes_of(chunk)
            self._put([first, *numbers])
            self._digest.update(first)
            self._written += len(chunk)
            self._waiting = [record]

    def _put(self, parts: list[bytes]) -> None:
        self._file.put(parts)
        self._bytes = self._file.size


def _sizes(num_experts: object) -> tuple[int, ...]:
    sizes = as_items("num_experts", num_experts, "E of every layer")
    if not sizes:
        raise ValueError("num_experts is empty: a record has one entry per routing layer")
    return tuple(int_at_least(f"num_experts[{i}]", size, 1) for i, size in enumerate(sizes))


def _same(first: Head, other: Head) -> None:
    for name, mine in vars(first).items():
        given = getattr(other, name)
        if given != mine and not (name == "temperature" and same_temperature(given, mine)):
            raise ValueError(
                f"record has {name}={given!r}, and the stream, by its first record, {mine!r}: write it to a file of "
                "its own"
            )
