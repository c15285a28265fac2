"""Reads the JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from ranklet.replicas.errors import ModelError


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file whose top level is of the given type.

    Raises:
        ModelError: the file is not valid JSON, or its top level is of another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(content, kind):
        raise ModelError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """Read the JSON object in an optional file; empty if the file does not exist.

    Raises:
        ModelError: the file is not valid JSON, or not an object.
    """
    settings: dict[str, Any] = read_json(path, dict) if path.is_file() else {}
    return settings
