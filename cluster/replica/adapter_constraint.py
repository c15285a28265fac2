"""Reads what the texts of an adapter must be, from `ranklet.json` beside its weights."""

import json
from pathlib import Path
from typing import Final

from ranklet.replicas.adapters.reference import RANKLET_FILE
from ranklet.replicas.grammar.constraint import RESPONSE_FORMAT, Constraint, refusal, response_format
from ranklet.replicas.regular_file import read_regular

_MAX_BYTES: Final = 1 << 20


def folder_constraint(folder: Path) -> Constraint | None:
    """Return the constraint of an adapter's folder; None if it has none.

    Raises:
        InvalidRequest: the file is not as expected; the message says how.
    """
    path = folder / RANKLET_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(read_regular(path, _MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(RANKLET_FILE, f"expected JSON, got: {error}") from error
    if not isinstance(content, dict):
        raise refusal(RANKLET_FILE, "expected an object")
    unknown = next((name for name in content if name != RESPONSE_FORMAT), None)
    if unknown is not None:
        raise refusal(RANKLET_FILE, f"expected {RESPONSE_FORMAT} only, got {unknown!r:.100}")
    found = content.get(RESPONSE_FORMAT)
    if found is None:
        return None
    field = f"{RESPONSE_FORMAT} of the adapter's {RANKLET_FILE}"
    if not isinstance(found, dict):
        raise refusal(field, "expected an object")
    return response_format(found, field)
