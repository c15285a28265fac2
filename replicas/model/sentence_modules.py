"""Reads the modules that a folder of sentence-transformers lists: pooling, Dense layers and normalization."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.dense_settings import DenseSettings, read_dense_settings
from ranklet.replicas.model.sentence_files import (
    LOGIT_SCORE_FILE,
    MAX_DENSE,
    MODULES_FILE,
    expect,
    is_file,
    read_file,
    read_optional,
)
from ranklet.replicas.model.tokenizer_files import show

_PACKAGE: Final = "sentence_transformers."
_KINDS: Final = ("Transformer", "Pooling", "Dense", "Normalize")
_MODES: Final = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_FLAGS: Final = {
    "pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"
}  # fmt: skip


def read_modules(folder: Path, *, any_path: bool) -> dict[str, Any]:
    """Return what the modules of a folder say, which are fields of `EmbeddingSettings`.

    Args:
        any_path: whether a module's folder may have any name. Those of adapters have the usual ones, since their files
            belong to the adapter's revision.

    Raises:
        ModelError: a file cannot be read, or a setting is not supported.
    """
    modules = list(_modules(folder))
    _check_order([kind for kind, _ in modules])
    for index, (kind, path) in enumerate(modules):
        usual = "." if kind == "Transformer" else f"{index}_{kind}"
        if path != usual and (kind == "Transformer" or not any_path):
            raise ModelError(f"{MODULES_FILE}: {kind}: expected the path {usual!r}, got {show(path)}")
    dense: list[DenseSettings] = []
    found: dict[str, Any] = {"normalize": False}
    for kind, path in modules:
        if kind == "Pooling":
            found["mode"], found["pools_prompt"] = _pooling(folder, f"{path}/config.json")
        elif kind == "Dense":
            dense.append(read_dense_settings(folder, path))
        elif kind == "Normalize":
            _check_normalize(folder, f"{path}/config.json")
            found["normalize"] = True
    return {**found, "dense": tuple(dense)}


def is_logit_score(folder: Path) -> bool:
    """Return whether a folder's modules are those of a causal reranker. Raises ModelError."""
    return list(_modules(folder)) == [("Transformer", "."), ("LogitScore", str(PurePosixPath(LOGIT_SCORE_FILE).parent))]


def is_cross_encoder(folder: Path) -> bool:
    """Return whether a folder's modules are those of a reranker with a head. Raises ModelError."""
    return list(_modules(folder)) == [("Transformer", ".")]


def _check_order(kinds: list[str]) -> None:
    unknown = sorted(set(kinds).difference(_KINDS))
    if unknown:
        raise ModelError(
            f"{MODULES_FILE}: expected {', '.join(_KINDS)} of sentence-transformers, got also {', '.join(unknown)}"
        )
    count = kinds.count("Dense")
    if count > MAX_DENSE:
        raise ModelError(f"{MODULES_FILE}: expected at most {MAX_DENSE} Dense layers, got {count}")
    ordered = ["Transformer", "Pooling", *["Dense"] * count, "Normalize"]
    if kinds not in (ordered, ordered[:-1]):
        raise ModelError(f"{MODULES_FILE}: expected the order {', '.join(_KINDS)}, got {', '.join(kinds) or 'none'}")


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the kind and the path of each module. The kind of one that is not sentence-transformers' is its type."""
    for each in read_file(folder, MODULES_FILE, list):
        fields = each if isinstance(each, dict) else {}
        kind, path = fields.get("type"), fields.get("path")
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ModelError(f"{MODULES_FILE}: expected modules with type and path, got: {show(each)}")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or "\0" in path:
            raise ModelError(f"{MODULES_FILE}: expected paths within the folder, got {show(path)}")
        last = kind.rpartition(".")[2]
        yield (last if kind.startswith(_PACKAGE) else show(kind).strip("'")), str(PurePosixPath(path))


def _pooling(folder: Path, name: str) -> tuple[str, bool]:
    """Return the mode, and whether pooling reads the prompt's tokens."""
    if not is_file(folder / name):
        raise ModelError(f"{name}: expected the pooling config that {MODULES_FILE} names; the file is missing")
    config: dict[str, Any] = read_file(folder, name, dict)
    flags = [flag for flag, on in config.items() if flag.startswith("pooling_mode_") and on]
    configured = config.get("pooling_mode") or flags
    names = configured if isinstance(configured, list) else [configured]
    known = _MODES | _FLAGS
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in known:
        got = ", ".join(each if isinstance(each, str) else show(each) for each in names) or "none"
        raise ModelError(f"{name}: expected one pooling mode of {', '.join(_MODES)}, got {got}")
    return known[names[0]], bool(config.get("include_prompt", True))


def _check_normalize(folder: Path, name: str) -> None:
    config = read_optional(folder, name)
    for field in ("module_input_name", "module_output_name"):
        expect(name, config, field, (None, "sentence_embedding"))
