"""Reads whether a reranker's scores are its logits or their sigmoid, as sentence-transformers saves it."""

from pathlib import Path
from typing import Any, Final

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.classifier import MODEL_CONFIG_FILE
from ranklet.replicas.model.sentence_files import PROMPTS_FILE, read_optional
from ranklet.replicas.model.tokenizer_files import show

_FIELD: Final = "activation_fn"
_OLD_FIELD: Final = "sbert_ce_default_activation_function"
_SIGMOID, _IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


def scores_are_logits(folder: Path) -> bool:
    """Return False if the folder says nothing.

    Raises:
        ModelError: a file cannot be read, or names another function.
    """
    config = read_optional(folder, MODEL_CONFIG_FILE)
    newer: Any = config.get("sentence_transformers")
    places = (
        (f"{PROMPTS_FILE}: {_FIELD}", read_optional(folder, PROMPTS_FILE).get(_FIELD)),
        (
            f"{MODEL_CONFIG_FILE}: sentence_transformers: {_FIELD}",
            newer.get(_FIELD) if isinstance(newer, dict) else None,
        ),
        (f"{MODEL_CONFIG_FILE}: {_OLD_FIELD}", config.get(_OLD_FIELD)),
    )
    name, found = next((each for each in places if each[1] is not None), ("", _SIGMOID))
    if found not in (_SIGMOID, _IDENTITY):
        raise ModelError(f"{name}: expected {_SIGMOID} or {_IDENTITY}, got {show(found)}")
    return bool(found == _IDENTITY)
