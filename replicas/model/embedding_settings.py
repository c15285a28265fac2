"""Reads how a folder turns texts into vectors: the files that sentence-transformers saves beside a model or adapter.

Every setting that changes a vector is followed, or refused by name. Settings that only shape training, memory or speed
are accepted. An adapter's folder may come from anyone, so its files have limits and its values are checked.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path, PurePosixPath
from typing import Any

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.classifier import Classifier
from ranklet.replicas.model.folder import read_json
from ranklet.replicas.model.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    UnusableTokenError,
    is_id,
    read_tokenizer_file,
    show,
)

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
POOLING_FILE = "1_Pooling/config.json"
NORMALIZE_FILE = "2_Normalize/config.json"
SETTINGS_FILES = (MODULES_FILE, PROMPTS_FILE, TRANSFORMER_FILE, POOLING_FILE, NORMALIZE_FILE)  # of an adapter's folder

_PACKAGE = "sentence_transformers."
_KINDS = ("Transformer", "Pooling", "Normalize")
_MODES = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_FLAGS = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_OLD_NAMES = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
# Fields of TRANSFORMER_FILE that are followed or checked below. The last ones shape queries and documents of
# `encode_query` and `encode_document`, or speed alone.
_TRANSFORMER_FIELDS = {
    "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "processing_kwargs",
    *_OLD_NAMES, *_OLD_NAMES.values(),
    "unpad_inputs", "query_length", "document_length", "query_expansion",
}  # fmt: skip
_HARMLESS_LOADING = {
    "trust_remote_code", "token", "cache_dir", "revision", "local_files_only", "torch_dtype", "dtype", "device_map",
    "attn_implementation", "low_cpu_mem_usage", "use_safetensors", "use_cache", "use_fast", "padding_side",
    "truncation_side", "add_pooling_layer",
}  # fmt: skip
_HARMLESS_CALLING = {
    "padding", "padding_side", "pad_to_multiple_of", "return_tensors", "return_attention_mask", "return_token_type_ids",
    "return_length", "return_offsets_mapping", "return_special_tokens_mask", "verbose",
}  # fmt: skip
_HARMLESS_SECTIONS, _TRUNCATIONS = {"audio", "image", "video"}, (True, "longest_first", "only_first")
_MAX_BYTES = 1 << 20
_UNBOUNDED = 1 << 31  # transformers writes 1e30 for a tokenizer without a limit
_MAX_PROMPT_CHARACTERS = 4096  # of an adapter's prompts, which are put before each text


@dataclass(frozen=True)
class Prompting:
    """What of a folder's settings makes the prompts of a request.

    Attributes:
        name: of the prompt that the request names; None for the default one.
        text: before every input.
        max_tokens: limit on the tokens of a prompt; None for the model's own.
        pools_text: whether pooling reads the tokens of `text`.
    """

    name: str | None = None
    text: str = ""
    max_tokens: int | None = None
    pools_text: bool = True


@dataclass(frozen=True)
class EmbeddingSettings:
    """How texts become vectors.

    Attributes:
        mode: pooling: last, mean or cls.
        normalize: whether vectors have length 1.
        prompt: text before every input.
        prompts: other texts that a request may name instead.
        max_tokens: limit on the tokens of a prompt; None for the model's own.
        lower: whether texts are lowercased.
        special_tokens: whether the tokenizer adds its special tokens.
        pools_prompt: whether pooling reads the tokens of the prompt.
        classifier: an adapter that computes scores instead of vectors.
    """

    mode: str = "last"
    normalize: bool = True
    prompt: str = ""
    prompts: Mapping[str, str] = dataclass_field(default_factory=dict, hash=False)
    max_tokens: int | None = None
    lower: bool = False
    special_tokens: bool = True
    pools_prompt: bool = True
    classifier: Classifier | None = None

    def prompting(self, name: str | None = None) -> Prompting | None:
        """Return how prompts are made for a request that names this prompt; None if the folder has no such prompt."""
        text = self.prompt if name is None else self.prompts.get(name)
        return None if text is None else Prompting(name, text, self.max_tokens, self.pools_prompt or not text)


def read_base_settings(model_dir: Path) -> EmbeddingSettings:
    """Read the settings of a base model's folder.

    Raises:
        ModelError: a file cannot be read, or a setting is not supported.
    """
    try:
        return read_embedding_settings(model_dir)
    except ModelError as error:
        raise ModelError(f"{model_dir}: {error.message}") from error


def read_embedding_settings(folder: Path, base: EmbeddingSettings | None = None) -> EmbeddingSettings:
    """Read the settings of a folder.

    A base model's folder without `modules.json` is pooled as Qwen3-Embedding: last token and L2 norm. What an adapter's
    folder does not say is as in the base model.

    Args:
        base: settings of the base model, for an adapter's folder.

    Raises:
        ModelError: a file cannot be read, or a setting is not supported. The message names the file within the folder.
    """
    described = _is_file(folder / MODULES_FILE)
    settings = base or EmbeddingSettings()
    if described:
        settings = _read_modules(folder, any_path=base is None)
    elif _is_file(folder / POOLING_FILE):
        raise ModelError(f"{POOLING_FILE}: expected {MODULES_FILE} beside it, which says how it is used; it is missing")
    if described or _is_file(folder / PROMPTS_FILE):
        settings = replace(settings, **_prompts(folder, sys.maxsize if base is None else _MAX_PROMPT_CHARACTERS))
    if described or _is_file(folder / TRANSFORMER_FILE):
        has_whole_prompts = settings.pools_prompt or not (settings.prompt or any(settings.prompts.values()))
        settings = replace(settings, **_tokenization(folder, described=described, may_pad=has_whole_prompts))
    return settings


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _read_modules(folder: Path, *, any_path: bool) -> EmbeddingSettings:
    modules = list(_modules(folder))
    unknown = [kind for kind, _ in modules if kind not in _KINDS]
    if unknown:
        raise ModelError(
            f"{MODULES_FILE}: expected {', '.join(_KINDS)} of sentence-transformers, got also "
            f"{', '.join(sorted(set(unknown)))}"
        )
    kinds = tuple(kind for kind, _ in modules)
    if kinds not in (_KINDS, _KINDS[:2]):
        raise ModelError(f"{MODULES_FILE}: expected the order {', '.join(_KINDS)}, got {', '.join(kinds) or 'none'}")
    known = ("", *(str(PurePosixPath(name).parent) for name in (POOLING_FILE, NORMALIZE_FILE)))
    for (kind, path), usual in zip(modules, known, strict=False):
        if path.strip("./") != usual and (kind == "Transformer" or not any_path):
            raise ModelError(f"{MODULES_FILE}: {kind}: expected the path {usual!r}, got {show(path)}")
    paths = dict(modules)
    if "Normalize" in paths:
        _check_normalize(folder, f"{paths['Normalize']}/config.json")
    mode, pools_prompt = _pooling(folder, f"{paths['Pooling']}/config.json")
    return EmbeddingSettings(mode, normalize="Normalize" in paths, pools_prompt=pools_prompt)


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the kind and the path of each module. The kind of one that is not sentence-transformers' is its type."""
    for each in _read(folder, MODULES_FILE, list):
        fields = each if isinstance(each, dict) else {}
        kind, path = fields.get("type"), fields.get("path")
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ModelError(f"{MODULES_FILE}: expected modules with type and path, got: {show(each)}")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or "\0" in path:
            raise ModelError(f"{MODULES_FILE}: expected paths within the folder, got {show(path)}")
        last = kind.rpartition(".")[2]
        yield (last if kind.startswith(_PACKAGE) else show(kind).strip("'")), path


def _pooling(folder: Path, name: str) -> tuple[str, bool]:
    """Return the mode, and whether pooling reads the prompt's tokens."""
    if not _is_file(folder / name):
        raise ModelError(f"{name}: expected the pooling config that {MODULES_FILE} names; the file is missing")
    config: dict[str, Any] = _read(folder, name, dict)
    flags = [flag for flag, on in config.items() if flag.startswith("pooling_mode_") and on]
    configured = config.get("pooling_mode") or flags
    names = configured if isinstance(configured, list) else [configured]
    known = _MODES | _FLAGS
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in known:
        got = ", ".join(each if isinstance(each, str) else show(each) for each in names) or "none"
        raise ModelError(f"{name}: expected one pooling mode of {', '.join(_MODES)}, got {got}")
    return known[names[0]], bool(config.get("include_prompt", True))


def _check_normalize(folder: Path, name: str) -> None:
    config = _read_optional(folder, name)
    for field in ("module_input_name", "module_output_name"):
        _expect(name, config, field, (None, "sentence_embedding"))


def _prompts(folder: Path, most_characters: int) -> dict[str, Any]:
    """Return the texts that sentence-transformers prepends to inputs: to every one, and by name."""
    config = _read_optional(folder, PROMPTS_FILE)
    _expect(PROMPTS_FILE, config, "model_type", (None, "SentenceTransformer"))
    name, found = config.get("default_prompt_name"), config.get("prompts") or {}
    if not isinstance(found, dict) or not all(isinstance(text, str | None) for text in found.values()):
        raise ModelError(f"{PROMPTS_FILE}: prompts: expected texts by name, got {show(found)}")
    prompts = {each: text or "" for each, text in found.items()}
    longest = sum(map(len, (*prompts, *prompts.values())))
    if longest > most_characters:
        raise ModelError(f"{PROMPTS_FILE}: prompts: expected at most {most_characters} characters, got {longest}")
    if name is not None and (not isinstance(name, str) or name not in prompts):
        raise ModelError(f"{PROMPTS_FILE}: default_prompt_name: expected the name of a prompt, got {show(name)}")
    return {"prompt": "" if name is None else prompts[name], "prompts": prompts}


def _tokenization(folder: Path, *, described: bool, may_pad: bool) -> dict[str, Any]:
    """Return the settings of a folder's Transformer module."""
    config = _read_optional(folder, TRANSFORMER_FILE)
    _refuse_others(TRANSFORMER_FILE, config, _TRANSFORMER_FIELDS)
    _expect(TRANSFORMER_FILE, config, "transformer_task", (None, "feature-extraction"))
    _expect(TRANSFORMER_FILE, config, "module_output_name", (None, "token_embeddings"))
    modalities = config.get("modality_config")
    if isinstance(modalities, dict) and "message" in modalities:
        raise ModelError(
            f"{TRANSFORMER_FILE}: modality_config: expected text alone, got also message; texts in a chat template are "
            "not supported"
        )
    _expect(TRANSFORMER_FILE, config, "modality_config", (None, _TEXT_ONLY))
    loading = {name: _loading(config, name) for name in ("model_kwargs", "processor_kwargs", "config_kwargs")}
    for name, values in loading.items():
        followed = {"model_max_length"} if name == "processor_kwargs" else set[str]()
        _refuse_others(f"{TRANSFORMER_FILE}: {name}", values, _HARMLESS_LOADING | followed)
    calling = _calling(config)
    if not may_pad:  # sentence-transformers would leave out the prompt with its padding
        field = f"{TRANSFORMER_FILE}: processing_kwargs, beside include_prompt: false"
        _expect(field, calling, "padding", (None, True, False, "longest", "do_not_pad"))
        _expect(field, calling, "pad_to_multiple_of", (None,))
    limits = [
        (f"{TRANSFORMER_FILE}: processing_kwargs: max_length", calling.get("max_length")),
        (
            f"{TRANSFORMER_FILE}: processor_kwargs: model_max_length",
            loading["processor_kwargs"].get("model_max_length"),
        ),
        (f"{TRANSFORMER_FILE}: max_seq_length", config.get("max_seq_length")),
    ]  # the first that is set wins
    if described:
        limits.append((f"{TOKENIZER_CONFIG_FILE}: model_max_length", _tokenizer_limit(folder)))
    return {
        "max_tokens": next((_limit(name, value) for name, value in limits if value is not None), None),
        "lower": bool(config.get("do_lower_case")),
        "special_tokens": calling.get("add_special_tokens", True) is not False,
    }


def _loading(config: dict[str, Any], name: str) -> dict[str, Any]:
    old = next(old for old, new in _OLD_NAMES.items() if new == name)
    value = config[old] if old in config else config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"{TRANSFORMER_FILE}: {name}: expected an object, got {show(value)}")
    return value or {}


def _calling(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that sentence-transformers calls the tokenizer with."""
    field = f"{TRANSFORMER_FILE}: processing_kwargs"
    sections = config.get("processing_kwargs") or {}
    if not isinstance(sections, dict) or not all(isinstance(each, dict | None) for each in sections.values()):
        raise ModelError(f"{field}: expected objects by kind of input, got {show(sections)}")
    _refuse_others(field, sections, {"text", "common", *_HARMLESS_SECTIONS})
    found = (sections.get("text") or {}) | (sections.get("common") or {})
    _refuse_others(field, found, {"max_length", "add_special_tokens", "truncation", *_HARMLESS_CALLING})
    _expect(field, found, "add_special_tokens", (None, True, False))
    _expect(field, found, "truncation", (None, *_TRUNCATIONS))
    return found


def _tokenizer_limit(folder: Path) -> Any:
    try:
        return read_tokenizer_file(folder / TOKENIZER_CONFIG_FILE).get("model_max_length")
    except UnusableTokenError as error:
        raise ModelError(str(error)) from error


def _limit(name: str, value: Any) -> int | None:
    if isinstance(value, float) and value >= _UNBOUNDED:
        return None
    if not is_id(value) or value < 1:
        raise ModelError(f"{name}: expected a number of tokens, got {show(value)}")
    return None if value >= _UNBOUNDED else int(value)


def _expect(name: str, config: dict[str, Any], field: str, values: Collection[Any]) -> None:
    found = config.get(field)
    if not any(found is each or (type(found) is type(each) and found == each) for each in values):
        expected = " or ".join(repr(each) for each in values if each is not None) or "no value"
        raise ModelError(f"{name}: {field}: expected {expected}, got {show(found)}")


def _refuse_others(name: str, config: dict[str, Any], known: Collection[str]) -> None:
    for field, value in config.items():
        if field not in known and value is not None and value not in ([], {}):
            raise ModelError(f"{name}: {show(field).strip(chr(39))}: not supported; remove it if it changes no vector")


def _read_optional(folder: Path, name: str) -> dict[str, Any]:
    return _read(folder, name, dict) if _is_file(folder / name) else {}


def _read(folder: Path, name: str, kind: type) -> Any:
    return read_json(folder / name, kind, name, _MAX_BYTES)
