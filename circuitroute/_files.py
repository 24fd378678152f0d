"""Writing files so that no reader ever meets half of one."""

from __future__ import annotations

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
