"""Text files of numbers: lines split into words, errors that name path, line and what was found.

Files come from anywhere. What is read is bounded by the size of the file, never by a number in it, and words become
integers only if they are short runs of ASCII digits.
"""

from __future__ import annotations

import hashlib
import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from typing import NamedTuple

from circuitroute._files import as_path
from circuitroute.deadline import tick
from circuitroute.errors import CircuitFileError

MAX_DIGITS = 18
_DIGITS = b"0123456789-"
_SHOWN = 40


class Line(NamedTuple):
    """A line with content: its number in the file, counted from 1, and its words."""

    number: int
    words: list[bytes]


class TextFile:
    """The lines of a file, without empty ones and comments (lines that start with the word ``c``).

    Lines may end as on any system, and the mark with which some editors begin UTF-8 is passed over.
    """

    def __init__(self, path: str | bytes | os.PathLike[str], name: str = "path") -> None:
        self.path = as_path(name, path)
        self.data = self.path.read_bytes()

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def lines(self, comments: bool = False) -> Iterator[Line]:
        """The lines in order; comments too where they are asked for."""
        for number, line in enumerate(self.data.removeprefix(BOM_UTF8).splitlines(), start=1):
            tick(1 + (len(line) >> 6))
            words = line.split()
            if words and (comments or words[0] != b"c"):
                yield Line(number, words)

    def numbers(self, line: Line, expected: str, skip: int = 1) -> list[int]:
        """The words of a line after the first ``skip`` as integers.

        Raises:
            CircuitFileError: one is not an integer, or has more than 18 digits.
        """
        words = line.words[skip:]
        if not words:
            return []
        if b"".join(words).translate(None, _DIGITS) or max(map(len, words)) > MAX_DIGITS:
            wrong = next(word for word in words if len(word) > MAX_DIGITS or word.translate(None, _DIGITS))
            raise self.error(line.number, wrong, expected)
        try:
            return list(map(int, words))
        except ValueError:  # dashes in odd places
            raise self.error(line.number, b" ".join(words), expected) from None

    def error(self, line: int, found: object, expected: str) -> CircuitFileError:
        """The error for a line: what it holds, and what should be there."""
        return CircuitFileError(f"{self.path}, line {line}: found {shown(found)}, expected {expected}")

    def wrong(self, expected: str) -> CircuitFileError:
        """The error for a file of another kind."""
        return CircuitFileError(f"{self.path} is not {expected}: it looks like {kind_of(self.data)}")


def shown(found: object) -> str:
    """What was found, as short as it can be shown."""
    text = found.decode("ascii", "backslashreplace") if isinstance(found, bytes) else str(found)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


# How files begin that are likely to be mistaken for one another, and what reads them.
_BEGINNINGS = (
    (b"circuitroute circuit ", "a saved circuit (read it with cr.load)"),
    (b"nnf ", "an NNF circuit in c2d's format (read it with cr.read_nnf)"),
    (b"sdd ", "an SDD (read it with cr.read_sdd)"),
    (b"vtree ", "a vtree (give it to cr.read_sdd, beside its SDD)"),
    (b"p cnf", "a CNF (read it with cr.read_cnf, and compile it)"),
    (b"\x1f\x8b", "a file that gzip compressed (unpack it first)"),
    (b"BZh", "a file that bzip2 compressed (unpack it first)"),
    (b"\xfd7zXZ\x00", "a file that xz compressed (unpack it first)"),
    (b"\x28\xb5\x2f\xfd", "a file that zstd compressed (unpack it first)"),
    (BOM_UTF16_LE, "text in UTF-16 (save it as ASCII or UTF-8)"),
    (BOM_UTF16_BE, "text in UTF-16 (save it as ASCII or UTF-8)"),
    (b"PK\x03\x04", "a zip archive, such as torch.save writes"),
    (b"\x80", "a Python pickle"),
)


def kind_of(data: bytes) -> str:
    """A description of what a file looks like."""
    data = data.removeprefix(BOM_UTF8)
    if not data.strip():
        return "an empty file"
    start = next((line for line in data[:4096].splitlines() if line.strip() and line.split()[0] != b"c"), b"")
    for begins, kind in _BEGINNINGS:
        if start.startswith(begins):
            return kind
    if start.split()[:1] in ([b"o"], [b"a"], [b"t"], [b"f"]):
        return "an NNF circuit in d4's format (read it with cr.read_nnf)"
    if b"\0" in data[:4096] or not data[:4096].isascii():
        return "binary data"
    return f"text that begins with {shown(data[:200].strip())}"
