"""Reads how a folder of sentence-transformers scores pairs of texts by the logits of two tokens (LogitScore)."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.sentence_files import (
    LOGIT_SCORE_FILE,
    TRANSFORMER_FILE,
    expect,
    read_file,
    read_optional,
    refuse_others,
)
from ranklet.replicas.model.tokenizer_files import is_id, show

_TOKENS = ("false_token_id", "true_token_id")


@dataclass(frozen=True)
class LogitScore:
    """A causal reranker. Its chat template makes prompts of messages with the roles query and document.

    Attributes:
        tokens: the false and the true token, whose logits are compared.
        prompt: of the system message; "" without one.
        has_parts: whether the contents of messages are lists of parts.
        arguments: of the chat template.
    """

    tokens: tuple[int, int]
    prompt: str = ""
    has_parts: bool = True
    arguments: Mapping[str, Any] = dataclass_field(default_factory=dict, hash=False)

    def messages(self, query: str, document: str) -> list[dict[str, Any]]:
        texts = {"system": self.prompt, "query": query, "document": document}
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if self.has_parts else text}
            for role, text in texts.items()
            if text or role != "system"
        ]


def read_logit_score(folder: Path, prompt: str) -> LogitScore:
    """Read the settings of a folder whose modules are Transformer and LogitScore.

    Args:
        prompt: the folder's default prompt.

    Raises:
        ModelError: a file cannot be read, or a setting is not supported.
    """
    config: dict[str, Any] = read_file(folder, LOGIT_SCORE_FILE, dict)
    refuse_others(LOGIT_SCORE_FILE, config, (*_TOKENS, "module_input_name"))
    expect(LOGIT_SCORE_FILE, config, "module_input_name", (None, "causal_logits"))
    first, second = (config.get(name) for name in _TOKENS)
    if first is None or second is None or not (is_id(first) and is_id(second)) or first == second:
        got = f"{show(first)} and {show(second)}"
        raise ModelError(f"{LOGIT_SCORE_FILE}: {' and '.join(_TOKENS)}: expected two different token ids, got {got}")
    transformer = read_optional(folder, TRANSFORMER_FILE)
    message = _object(transformer.get("modality_config")).get("message")
    form = _object(message).get("format", "structured")
    if form not in ("structured", "flat"):
        raise ModelError(f"{TRANSFORMER_FILE}: modality_config: expected structured or flat messages, got {show(form)}")
    arguments = _object(_object(transformer.get("processing_kwargs")).get("chat_template"))
    return LogitScore((first, second), prompt, form == "structured", arguments)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
