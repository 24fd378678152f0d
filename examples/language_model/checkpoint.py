"""Checkpoints: one safetensors file each, with the rest of the state as JSON in its metadata. Never pickle.

Every file is written whole or not at all, so the last checkpoint stands whatever happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .config import DemoError

FORMAT = 1  # of run.json and results.json
CHECKPOINT_FORMAT = 2  # format 1 kept its state in a JSON file beside the tensors


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` in one step: a reader sees the old file or the new one, never a part.

    A link stays one, to the new file; the permissions stay too."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of this format. Raises DemoError naming the file when it is damaged or of another format."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, str(error)) from None
    return _parsed(path, data, FORMAT)


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Raises OSError where the disk refuses; an earlier checkpoint then stands."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"state": json.dumps({"format": CHECKPOINT_FORMAT, **state}), "sha256": _digest(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def exists(path: Path) -> bool:
    """Whether there is a checkpoint of this name. Raises DemoError where there is one of version 0.1."""
    if not path.exists() and path.with_suffix(".json").exists():
        raise DemoError(
            f"{path.with_suffix('.json')} is of version 0.1, whose models had other parameters: start again without "
            "--resume",
            "resume",
        )
    return path.exists()


def load_state(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors. Raises DemoError when the file is damaged or of another format."""
    return _parsed(path, _metadata(path).get("state", ""), CHECKPOINT_FORMAT)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Raises DemoError when they are missing or not what was saved."""
    recorded = _metadata(path).get("sha256")
    tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    if _digest(tensors) != recorded:
        raise _damaged(path, "its checksum is not the recorded one")
    return tensors


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(path, str(error)) from None


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def _parsed(path: Path, text: str | bytes, expected: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, "not a JSON object")
    if (found := value.get("format")) != expected:
        remedy = "start again without --resume"
        raise DemoError(f"{path} has format {found!r}, this version reads format {expected}: {remedy}", "resume")
    return value


def _damaged(path: Path, reason: str) -> DemoError:
    return DemoError(f"{path} is damaged or missing ({reason}): start again without --resume", "resume")
