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
    """Read a JSON object. Returns an empty one if the file does not exist.

    Raises:
        ModelError: the file is not valid JSON, or not an object.
    """
    settings: dict[str, Any] = read_json(path, dict) if path.is_file() else {}
    return settings


def read_default_prompt(model_dir: Path) -> str:
    """Return the text that sentence-transformers prepends to every input; empty if the folder configures none."""
    config = read_settings(model_dir / "config_sentence_transformers.json")
    name = config.get("default_prompt_name")
    return str((config.get("prompts") or {}).get(name) or "") if name else ""
