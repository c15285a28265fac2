"""Reads the JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.git_lfs import is_pointer, pointer_message

_MAX_BYTES = 64 << 20  # the index of a model with many shards is the largest


def read_json(path: Path, kind: type, name: str = "") -> Any:
    """Read a JSON file whose top level is of the given type.

    Args:
        name: how errors name the file; the path by default.

    Raises:
        ModelError: the file is not valid JSON, or its top level is of another type.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if is_pointer(content):
            raise ModelError(pointer_message(name))
        if len(content) > _MAX_BYTES:
            raise ModelError(f"{name}: expected at most {_MAX_BYTES} bytes, got {path.stat().st_size}")
        found = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: expected JSON, got: {error}") from error
    if not isinstance(found, kind):
        raise ModelError(f"{name}: expected a JSON {kind.__name__}, got {type(found).__name__}")
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object. Returns an empty one if the file does not exist.

    Raises:
        ModelError: the file is not valid JSON, or not an object.
    """
    settings: dict[str, Any] = read_json(path, dict) if path.is_file() else {}
    return settings
