"""Files that are whole: written in one step, and sealed with the SHA-256 of their content."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``; a file that is there is replaced in one step.

    Raises:
        OSError: the file cannot be written; what was there before is left as it was.
    """
    target = Path(path)
    # Written beside its place and moved there when complete.
    beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


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
