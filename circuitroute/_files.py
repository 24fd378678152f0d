"""Files that are whole: written in one step, and sealed with the SHA-256 of their content."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO


def as_path(name: str, path: object) -> Path:
    """``path`` as a Path: a str, bytes or anything with ``__fspath__``; nothing in it is expanded.

    Raises:
        TypeError: something else, such as an open file.
        ValueError: an empty path, or one with a NUL.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        remedy = "; give its name, not the open file" if hasattr(path, "read") or hasattr(path, "write") else ""
        kinds = "str, bytes or os.PathLike"
        raise TypeError(f"{name}={path!r}: expected a path ({kinds}), got {type(path).__name__}{remedy}")
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ValueError(f"{name}={text!r}: expected the path of a file, not empty and without NUL characters")
    return Path(text)


def replace_file(path: str | bytes | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``; a file that is there is replaced in one step.

    Through a symbolic link it is the file it leads to that is replaced, or made, and the link stays. A file that is
    replaced keeps its permissions and, where the system lets it, its owner; other hard links keep what it held before.
    What is no file, such as a pipe, is written to.

    Raises:
        TypeError, ValueError: what is no path; see :func:`as_path`.
        OSError: the file cannot be written; what was there before is left as it was.
    """
    given = as_path("path", path)
    try:
        former = _status(given)
        if former is None or stat.S_ISREG(former.st_mode):
            _replace(_behind_links(given), former, content)
        else:
            with given.open("wb") as pipe:
                pipe.write(content)
    except OSError as error:
        if error.errno is None:
            raise
        # By the name that was given, not by that of the file beside it.
        raise OSError(error.errno, error.strerror, str(given)) from error


def _status(path: Path) -> os.stat_result | None:
    """What is at a path, behind links; None if there is nothing."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _behind_links(path: Path) -> Path:
    """Where links lead, also to a file that is not there yet."""
    return Path(os.path.realpath(path))


def _replace(target: Path, former: os.stat_result | None, content: bytes) -> None:
    if former is not None and not os.access(target, os.W_OK):
        # The directory may still allow to replace it; whoever made it read-only did not mean that.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # Written beside its place and moved there when complete. Its own name may be as long as names can be.
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as file:
            if former is not None:
                _take_after(file, former)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


class Growing:
    """A file that is written bit by bit beside its place, as ``NAME.partial``, and moved there when it is complete.

    Raises:
        TypeError, ValueError: what is no path; see :func:`as_path`.
        FileExistsError: there is a ``NAME.partial`` already.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | bytes | os.PathLike[str]) -> None:
        given = as_path("path", path)
        self._target = _behind_links(given)
        former = _status(self._target)
        if former is not None and not (stat.S_ISREG(former.st_mode) and os.access(self._target, os.W_OK)):
            raise PermissionError(errno.EACCES, "there is no file that may be replaced", str(given))
        self.beside = self._target.with_name(self._target.name + ".partial")
        # Without a buffer, in which what could not be written would stay.
        self._file = self.beside.open("xb", buffering=0)
        if former is not None:
            _take_after(self._file, former)

    @property
    def closed(self) -> bool:
        """Whether it is complete, or was left."""
        return self._file.closed

    @property
    def size(self) -> int:
        """Bytes written by now."""
        return self._file.tell()

    def put(self, parts: Iterable[bytes]) -> None:
        """Write all parts, or, where that fails, none of them.

        Raises:
            OSError: it fails.
        """
        before = self._file.tell()
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(before)
            self._file.seek(before)
            raise

    def complete(self) -> None:
        """Move it to its place."""
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.beside, self._target)

    def leave(self) -> None:
        """Close it, and leave it beside its place."""
        self._file.close()

    def drop(self) -> None:
        """Close and remove it."""
        self._file.close()
        self.beside.unlink()


def _take_after(file: IO[bytes], former: os.stat_result) -> None:
    """Give a new file the owner, as far as that is allowed, and the permissions of the one that it replaces."""
    if not hasattr(os, "fchown"):  # Windows
        return
    own = os.fstat(file.fileno())
    if (own.st_uid, own.st_gid) != (former.st_uid, former.st_gid):
        with suppress(PermissionError):
            os.fchown(file.fileno(), former.st_uid, former.st_gid)
    os.fchmod(file.fileno(), stat.S_IMODE(former.st_mode))


def sealed(body: bytes, label: bytes = b"", end: bytes = b"") -> bytes:
    """``body`` and its SHA-256 in hexadecimal, between ``label`` and ``end``."""
    return body + label + hashlib.sha256(body).hexdigest().encode() + end


def unsealed(data: bytes, label: bytes = b"", end: bytes = b"") -> bytes:
    """The body of what :func:`sealed` made.

    Raises:
        ValueError: a byte was changed, lost or added, or it never was sealed.
    """
    body = data[: -len(sealed(b"", label, end))]
    if sealed(body, label, end) != data:
        raise ValueError("its checksum is wrong or missing; get or save it again")
    return body
