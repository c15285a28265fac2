"""What an adapter's config says of rows of the token embedding and the head, as PEFT reads it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ranklet.replicas.adapters.findings import join, show
from ranklet.replicas.adapters.limits import MAX_TOKEN_INDICES
from ranklet.replicas.model.classifier import HEAD_NAMES, is_classifier
from ranklet.replicas.model.modules import EMBED_TOKENS, LM_HEAD

_MATRICES = (EMBED_TOKENS, LM_HEAD)


@dataclass(frozen=True)
class TokenSettings:
    """Fields of an adapter's config, which `wrong_token_fields` and `unsupported_token_fields` have checked.

    Attributes:
        indices: tokens whose rows were trained, by `embed_tokens` and `lm_head`.
        saved: those of the two that were trained whole.
        ensures_tying: whether a tied model's head is trained with the embedding.
    """

    indices: Mapping[str, tuple[int, ...]]
    saved: frozenset[str]
    ensures_tying: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "TokenSettings":
        indices = fields.get("trainable_token_indices") or {}
        if isinstance(indices, list):
            indices = {EMBED_TOKENS: indices}
        return cls(
            {_last(name): tuple(ids) for name, ids in indices.items() if ids},
            frozenset(_MATRICES).intersection(map(_last, fields.get("modules_to_save") or ())),
            bool(fields.get("ensure_weight_tying")),
        )


def wrong_token_fields(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield findings on fields of the wrong type or beyond the limits."""
    saved, indices = fields.get("modules_to_save"), fields.get("trainable_token_indices")
    if not (saved is None or (isinstance(saved, list) and all(isinstance(name, str) for name in saved))):
        yield f"modules_to_save: expected names of modules, got {show(saved)}"
    lists = list(indices.values()) if isinstance(indices, dict) else [] if indices is None else [indices]
    if not all(isinstance(ids, list) and all(type(each) is int for each in ids) for ids in lists):
        yield f"trainable_token_indices: expected a list of token ids, or one for each module, got {show(indices)}"
    elif sum(map(len, lists)) > MAX_TOKEN_INDICES:
        yield f"trainable_token_indices: expected at most {MAX_TOKEN_INDICES} ids, got {sum(map(len, lists))}"


def unsupported_token_fields(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield findings on fields whose values cannot be served."""
    usable = (*_MATRICES, *HEAD_NAMES) if is_classifier(fields) else _MATRICES
    saved, indices = fields.get("modules_to_save") or (), fields.get("trainable_token_indices")
    if saved and fields.get("task_type") == "TOKEN_CLS":
        yield "task_type: TOKEN_CLS: labels of tokens are not computed; expected SEQ_CLS, for labels of texts"
    elif any(_last(name) not in usable for name in saved):
        yield (
            f"modules_to_save: expected {' or '.join(_MATRICES)}, and {' and '.join(HEAD_NAMES)} with the task "
            f"SEQ_CLS, got {show(saved)}; train the adapter without it"
        )
    named = list(indices) if isinstance(indices, dict) else []
    yield from _twice(named)
    if any(_last(name) not in _MATRICES for name in named):
        yield f"trainable_token_indices: expected ids for {' or '.join(_MATRICES)}, got some for {join(named)}"
    settings = TokenSettings.of(fields)
    both = sorted(settings.saved & settings.indices.keys())
    if both:
        yield f"trainable_token_indices: {join(both)} is in modules_to_save too; PEFT refuses both"


def _twice(names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in map(_last, names):
        if name in seen:
            yield f"trainable_token_indices: expected one list for {show(name)}, got two"
        seen.add(name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
