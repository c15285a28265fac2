"""Reads how a folder's Transformer module of sentence-transformers makes tokens of texts."""

from pathlib import Path
from typing import Any, Literal

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.sentence_files import TRANSFORMER_FILE, expect, read_optional, refuse_others
from ranklet.replicas.model.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    UnusableTokenError,
    is_id,
    read_tokenizer_file,
    show,
)

Task = Literal["feature-extraction", "text-generation", "sequence-classification"]
# What the module and the model call their output.
_OUTPUTS: dict[Task, tuple[str, str]] = {
    "feature-extraction": ("token_embeddings", "last_hidden_state"), "text-generation": ("causal_logits", "logits"),
    "sequence-classification": ("scores", "logits"),
}  # fmt: skip
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
_UNBOUNDED = 1 << 31  # transformers writes 1e30 for a tokenizer without a limit


def read_tokenization(
    folder: Path, *, described: bool, may_pad: bool, task: Task = "feature-extraction"
) -> dict[str, Any]:
    """Return the settings of a folder's Transformer module, which are fields of `EmbeddingSettings`.

    Args:
        described: whether the folder lists its modules.
        may_pad: whether the tokenizer may pad prompts.
        task: of the module. For text-generation, a chat template makes the prompts.

    Raises:
        ModelError: a file cannot be read, or a setting is not supported.
    """
    config = read_optional(folder, TRANSFORMER_FILE)
    refuse_others(TRANSFORMER_FILE, config, _TRANSFORMER_FIELDS)
    uses_chats = task == "text-generation"
    default = (None,) if task == "feature-extraction" else ()
    expect(TRANSFORMER_FILE, config, "transformer_task", (*default, task))
    module_output, model_output = _OUTPUTS[task]
    expect(TRANSFORMER_FILE, config, "module_output_name", (None, module_output))
    modalities = config.get("modality_config")
    if not uses_chats and isinstance(modalities, dict) and "message" in modalities:
        raise ModelError(
            f"{TRANSFORMER_FILE}: modality_config: expected text alone, got also message; texts in a chat template are "
            "not supported"
        )
    if not uses_chats:
        text_only = {"text": {"method": "forward", "method_output_name": model_output}}
        expect(TRANSFORMER_FILE, config, "modality_config", (None, text_only))
    loading = {name: _loading(config, name) for name in ("model_kwargs", "processor_kwargs", "config_kwargs")}
    for name, values in loading.items():
        followed = {"model_max_length"} if name == "processor_kwargs" else set[str]()
        refuse_others(f"{TRANSFORMER_FILE}: {name}", values, _HARMLESS_LOADING | followed)
    calling = _calling(config, {"chat_template"} if uses_chats else set())
    if not may_pad:  # sentence-transformers would leave out the prompt with its padding
        field = f"{TRANSFORMER_FILE}: processing_kwargs, beside include_prompt: false"
        expect(field, calling, "padding", (None, True, False, "longest", "do_not_pad"))
        expect(field, calling, "pad_to_multiple_of", (None,))
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


def _calling(config: dict[str, Any], followed: set[str]) -> dict[str, Any]:
    """Return the arguments that sentence-transformers calls the tokenizer with."""
    field = f"{TRANSFORMER_FILE}: processing_kwargs"
    sections = config.get("processing_kwargs") or {}
    if not isinstance(sections, dict) or not all(isinstance(each, dict | None) for each in sections.values()):
        raise ModelError(f"{field}: expected objects by kind of input, got {show(sections)}")
    refuse_others(field, sections, {"text", "common", *_HARMLESS_SECTIONS, *followed})
    found = (sections.get("text") or {}) | (sections.get("common") or {})
    refuse_others(field, found, {"max_length", "add_special_tokens", "truncation", *_HARMLESS_CALLING})
    expect(field, found, "add_special_tokens", (None, True, False))
    expect(field, found, "truncation", (None, *_TRUNCATIONS))
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
