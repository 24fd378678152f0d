"""Files of whole records: NumPy archives with a checksum, in which nothing is pickled."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from circuitroute._files import sealed, unsealed
from circuitroute.routing.records.layers import Array

KIND = "circuitroute routing record"
# A record made at temperature 1 is written as version 1, which has no temperature. Constraints and model are an array
# of their own, which readers that do not know it leave alone.
VERSION = 2
SEAL = b"sha256 "
# How streams of records begin, which are files of another kind.
MAGIC = b"circuitroute routing stream\n"


def packed(arrays: dict[str, Array], header: dict[str, Any]) -> bytes:
    """The bytes of a file."""
    return sealed_archive(arrays | {"header": as_json(header)})


def as_json(value: Any) -> Array:
    """JSON as uint8."""
    return np.frombuffer(json.dumps(value).encode("ascii"), dtype=np.uint8)


def sealed_archive(arrays: dict[str, Array]) -> bytes:
    """A NumPy archive whose comment is the checksum of all bytes before the checksum's digits."""
    content, digits = io.BytesIO(), len(sealed(b""))
    np.savez(content, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = SEAL + b"0" * digits
    return sealed(content.getvalue()[:-digits])


def read(source: Path) -> bytes:
    """All bytes of an archive; not those of a stream, of which there may be too many.

    Raises:
        ValueError: it is a stream.
        OSError: it cannot be read.
    """
    with source.open("rb") as file:
        begin = file.read(len(MAGIC))
        if begin == MAGIC:
            raise ValueError("it is a stream of records, which RecordFile reads")
        return begin + file.read()


def unpacked(data: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays and the header of what :func:`packed` made.

    Raises:
        ValueError and others: it is damaged, of another kind or of a newer version.
    """
    body = unsealed(data)
    if not (body.startswith(b"PK") and body.endswith(SEAL)):
        raise ValueError("it is not an archive with its checksum as the comment")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # As packed() writes it, so that what is read takes no more memory than the file.
        if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > len(data) for part in archive.infolist()):
            raise ValueError("it holds compressed arrays, or larger ones than itself")
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    header = json.loads(array_in(arrays, "header").tobytes())
    if header["kind"] != KIND:
        raise ValueError(f"it is of kind {header['kind']!r}")
    if header["version"] not in range(1, VERSION + 1):
        raise ValueError(
            f"it is of version {header['version']}, and this circuitroute reads versions 1 to {VERSION}: update it"
        )
    return arrays, header


def array_in(arrays: dict[str, Array], name: str) -> Array:
    """One array of an archive.

    Raises:
        ValueError: it is missing.
    """
    if name not in arrays:
        raise ValueError(f"it lacks the array {name!r}")
    return arrays[name]
