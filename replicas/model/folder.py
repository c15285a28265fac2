"""Reads the JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.git_lfs import is_pointer, pointer_message
from ranklet.replicas.regular_file import TooLargeError, read_regular

_MAX_BYTES = 64 << 20  # the index of a model with many shards is the largest


def read_json(path: Path, kind: type, name: str = "", most_bytes: int = _MAX_BYTES) -> Any:
    """Read a JSON file whose top level is of the given type.

    Args:
        name: how errors name the file; the path by default.

    Raises:
        ModelError: the file is not valid JSON, is too large, or its top level is of another type.
    """
    name = name or str(path)
    try:
        content = read_regular(path, most_bytes)
        if is_pointer(content):
            raise ModelError(pointer_message(name))
        found = json.loads(content.decode("utf-8"))
    except TooLargeError as error:
        raise ModelError(f"{name}: {error.strerror}") from error
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
