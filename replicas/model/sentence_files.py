"""The files that sentence-transformers saves beside a model or adapter, and how their JSON is read and checked."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.folder import read_json
from ranklet.replicas.model.tokenizer_files import show

MODULES_FILE: Final = "modules.json"
PROMPTS_FILE: Final = "config_sentence_transformers.json"
TRANSFORMER_FILE: Final = "sentence_bert_config.json"
POOLING_FILE: Final = "1_Pooling/config.json"
NORMALIZE_FILE: Final = "2_Normalize/config.json"
DENSE_WEIGHTS_FILE: Final = "model.safetensors"  # in the folder of a Dense layer
DENSE_PICKLE_FILE: Final = "pytorch_model.bin"  # of older versions, which is never read but by `adapters convert`
MAX_DENSE: Final = 4
SETTINGS_FILES: Final = (MODULES_FILE, PROMPTS_FILE, TRANSFORMER_FILE, POOLING_FILE, NORMALIZE_FILE)
LOGIT_SCORE_FILE: Final = "1_LogitScore/config.json"
# An adapter's folder that lists its modules may have these too. Dense layers lie between pooling and normalization.
MODULE_FILES: Final = (
    LOGIT_SCORE_FILE,
    *(f"{2 + index}_Dense/{name}" for index in range(MAX_DENSE) for name in ("config.json", DENSE_WEIGHTS_FILE)),
    *(f"{3 + index}_Normalize/config.json" for index in range(MAX_DENSE)),
)
_MAX_BYTES: Final = 1 << 20


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def read_file(folder: Path, name: str, kind: type) -> Any:
    """Read a JSON file whose top level is of the given type. Raises ModelError."""
    return read_json(folder / name, kind, name, _MAX_BYTES)


def read_optional(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file does not exist. Raises ModelError."""
    return read_file(folder, name, dict) if is_file(folder / name) else {}


def expect(name: str, config: dict[str, Any], field: str, values: Collection[Any]) -> None:
    """Raise ModelError if a field has another value."""
    found = config.get(field)
    if not any(found is each or (type(found) is type(each) and found == each) for each in values):
        expected = " or ".join(repr(each) for each in values if each is not None) or "no value"
        raise ModelError(f"{name}: {field}: expected {expected}, got {show(found)}")


def refuse_others(name: str, config: dict[str, Any], known: Collection[str]) -> None:
    """Raise ModelError if an object has other fields."""
    for field, value in config.items():
        if field not in known and value is not None and value not in ([], {}):
            raise ModelError(f"{name}: {show(field).strip(chr(39))}: not supported; remove it if it changes no vector")
