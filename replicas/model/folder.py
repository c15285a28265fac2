"""JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from ranklet.replicas.errors import ModelError


def read_json(path: Path, kind: type) -> Any:
    """The file's content, of this type.

    Raises:
        ModelError: it is no JSON, or of another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(content, kind):
        raise ModelError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a folder need not have; empty without it.

    Raises:
        ModelError: as `read_json`.
    """
    settings: dict[str, Any] = read_json(path, dict) if path.is_file() else {}
    return settings
