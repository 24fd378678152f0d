"""Checkpoints: tensors in safetensors, everything else in JSON, each written whole or not at all. Never
pickle.

The JSON file is the commit point. It names its tensor file and that file's SHA-256, so a stop between the two
writes leaves the previous pair in force.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import DemoError
from .extras import optional

FORMAT = 1


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` in one step: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of this format. Raises DemoError naming the file when it is damaged or of another
    format."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, "not a JSON object")
    if value.get("format") != FORMAT:
        raise DemoError(
            f"{path} has format {value.get('format')!r}, this version reads format {FORMAT}: "
            "start again without --resume",
            "resume",
        )
    return value


def save(directory: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes `name`.json and the tensor file it names, then removes older tensor files of that name."""
    serialised: bytes = optional("safetensors.torch").save({key: t.detach().cpu() for key, t in tensors.items()})
    digest = hashlib.sha256(serialised).hexdigest()
    tensor_file = directory / f"{name}-{digest[:12]}.safetensors"
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(tensor_file, serialised)
    path = directory / f"{name}.json"
    write_json(path, {"format": FORMAT, "tensors": tensor_file.name, "sha256": digest, **state})
    for stale in directory.glob(f"{name}-*.safetensors"):
        if stale != tensor_file:
            stale.unlink()
    return path


def load_tensors(directory: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that a checkpoint's JSON names. Raises DemoError when they are missing or not what was
    saved."""
    path = directory / str(state.get("tensors"))
    try:
        serialised = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    if hashlib.sha256(serialised).hexdigest() != state.get("sha256"):
        raise _damaged(path, "its checksum is not the recorded one")
    tensors: dict[str, Tensor] = optional("safetensors.torch").load(serialised)
    return tensors


def _damaged(path: Path, reason: str) -> DemoError:
    return DemoError(f"checkpoint {path} is damaged or missing ({reason}): start again without --resume", "resume")
