"""Activated LoRA (aLoRA): the adapter changes a prompt's tokens from its last invocation on, and the text after it.

The base model computes the tokens before. So their keys and values are the base's, whatever adapter follows.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.findings import show
from ranklet.replicas.adapters.tensor_names import EMBEDDING_MODULE
from ranklet.replicas.model.modules import Module

FIELD: Final = "alora_invocation_tokens"
NEVER: Final = sys.maxsize  # of `first_adapted`: the prompt has no invocation
_MAX_TOKENS = 1024
_TASK = "CAUSAL_LM"
# Of the fields that are served otherwise: those that PEFT refuses beside it, and those that change tokens before it.
_OTHERS = ("use_dora", "velora_config")
_UNCONDITIONAL = ("bias", "trainable_token_indices", "modules_to_save")

Invocation = tuple[int, ...]


def first_adapted(ids: NDArray[np.int32], invocation: Invocation | None) -> int:
    """Return how many leading tokens of a prompt are computed without the adapter, as PEFT counts them.

    Args:
        invocation: of the adapter; None if it changes all tokens.
    """
    if invocation is None:
        return 0
    # As characters from last to first, since `str.find` takes linear time.
    text, wanted = _reversed(ids), _reversed(np.array(invocation, np.int32))
    found = text.find(wanted)
    return NEVER if found < 0 else len(text) - found - len(wanted)


def _reversed(ids: NDArray[np.int32]) -> str:
    return ids[::-1].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def invocation_of(fields: Mapping[str, Any]) -> Invocation | None:
    """Return the invocation of a config; None without one, and for a value that `check_invocation` refuses."""
    value: Any = fields.get(FIELD)
    return tuple(value) if _is_usable(value) else None


def check_invocation(fields: Mapping[str, Any]) -> Iterator[str]:
    """Check the field of a config, and what PEFT does not combine with it."""
    value = fields.get(FIELD)
    if value is None:
        return
    if not _is_usable(value):
        yield f"{FIELD}: expected 1 to {_MAX_TOKENS} token ids, got {show(value)}"
    task = fields.get("task_type")
    if task != _TASK:
        yield f"{FIELD}: expected task_type {_TASK}, since PEFT activates no others, got {show(task)}"
    for name in _OTHERS:
        if fields.get(name):
            yield f"{FIELD}: PEFT does not combine it with {name}; expected one of them"
    for name in _UNCONDITIONAL:
        if fields.get(name) not in (None, "none", [], {}):
            yield f"{FIELD}: expected no {name}, which changes tokens before the invocation, got {show(fields[name])}"


def check_activated(invocation: Invocation | None, modules: Collection[Module], vocab: int) -> Iterator[str]:
    """Compare an invocation with the adapter's modules and the base model's vocabulary."""
    if invocation is None:
        return
    if max(invocation) >= vocab:
        yield f"{FIELD}: expected token ids from 0 to {vocab - 1}, as the base model has, got {max(invocation)}"
    if EMBEDDING_MODULE in modules:
        yield f"{FIELD}: PEFT does not combine it with LoRA on embed_tokens; train it on the layers only"


def _is_usable(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= _MAX_TOKENS
        and all(type(token) is int and 0 <= token <= sys.maxunicode for token in value)
    )
