"""Real text that every machine with torch has, with parts held out.

Python: the sources of the standard library, which the demo models are trained on. C++: the headers that come with
torch, plenty of another language. English: the reference topics of Python's help, little of a third.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .config import DemoConfig, DemoError
from .corpus import Corpus, make_corpus

MAX_BYTES = 16_000_000
HELD_OUT_FRACTION = 0.1  # of a text given as one file
# Tests, other people's packages and files that differ from machine to machine. `encodings` is all tables: no
# language to model, and easy enough to compress that it would flatter every router.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
SKIPPED_HEADERS = {"ops"}  # thousands of generated files that differ by a name


class Document(NamedTuple):
    """A part of a text that is held out, or not, as a whole."""

    name: str
    data: bytes


def load_corpus(config: DemoConfig) -> Corpus:
    """The user's text, or that of the configuration's language. Raises DemoError (argument "text") when it is missing
    or too small."""
    if config.text is not None:
        corpus = _from_file(Path(config.text), config)
    elif config.language == "python":
        corpus = _split(
            _standard_library(), 20, f"the standard library of Python {sysconfig.get_python_version()}", config
        )
    elif config.language == "c++":
        corpus = _split(_headers(), 20, f"the C++ headers of torch {torch.__version__}", config)
    else:
        corpus = _split(_topics(), 4, f"the help topics of Python {sysconfig.get_python_version()}", config)
    _require_enough(corpus, config)
    return corpus


def _require_enough(corpus: Corpus, config: DemoConfig) -> None:
    least = config.tokens_per_step + 1
    train, valid, test = corpus.train.numel(), corpus.valid.numel(), corpus.test.numel()
    if min(train, valid, test if config.test_batches else valid) < least:
        held_out = f"{valid:,} + {test:,}" if config.test_batches else f"{valid:,}"
        raise DemoError(
            f"{corpus.source} is too small: {train:,} bytes to train on and {held_out} held out, where each must fill "
            f"a batch of {config.batch_size} x {config.seq_len} bytes ({least:,}): a longer text, or a smaller "
            "--batch-size or --seq-len",
            "text",
        )


def _from_file(path: Path, config: DemoConfig) -> Corpus:
    """Its end is held out."""
    try:
        data = path.read_bytes()[:MAX_BYTES]
    except OSError as error:
        raise DemoError(f"cannot read {str(path)!r}: {error.strerror or error}", "text") from None
    held_out = int(len(data) * HELD_OUT_FRACTION)
    ends = [len(data) - held_out, len(data)]
    if config.test_batches:
        ends = [len(data) - 2 * held_out, len(data) - held_out, len(data)]
    test = data[ends[1] :]
    return make_corpus(data[: ends[0]][: config.text_limit], data[ends[0] : ends[1]], str(path), test)


def _split(documents: Iterable[Document], one_in: int, source: str, config: DemoConfig) -> Corpus:
    """One document in so many is held out, on a hash of its name, so that other versions split those they share alike;
    another one for the second part, where the configuration wants it."""
    parts: tuple[list[bytes], ...] = ([], [], [])
    total = 0
    for document in documents:
        total += len(document.data)
        if total > MAX_BYTES:
            break
        number = zlib.crc32(document.name.encode()) % one_in
        held_out = 1 if number == 0 else 2 if number == 1 and config.test_batches else 0
        parts[held_out].append(document.data)
    train, valid, test = (b"\n".join(part) for part in parts)
    return make_corpus(train[: config.text_limit], valid, source, test)


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _files(root, (".py",), SKIPPED):
        if not path.name.startswith("_sysconfigdata"):
            yield Document(path.relative_to(root).as_posix(), path.read_bytes())


def _headers() -> Iterator[Document]:
    root = Path(torch.__file__).parent / "include"
    for path in _files(root, (".h", ".hpp", ".cuh"), SKIPPED_HEADERS):
        yield Document(path.relative_to(root).as_posix(), path.read_bytes())


def _topics() -> Iterator[Document]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(name, text.encode())


def _files(root: Path, suffixes: Sequence[str], skipped: set[str]) -> Iterator[Path]:
    """Files below `root` in a fixed order, whatever order the file system lists them in."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skipped)  # os.walk goes on into what is left here
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix in suffixes and path.is_file():
                yield path
