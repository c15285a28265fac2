"""Bounds on the lengths of prompts and texts, from the model, the settings and the kind of request."""

import torch

from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.cache.tensors import page_bytes
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.dense_settings import width_after
from ranklet.replicas.model.pooling import Pooling


def request_limits(
    config: EngineConfig, architecture: Architecture, pooling: Pooling, dtype: torch.dtype, *, makes_text: bool
) -> RequestLimits:
    """Return the limits of an engine's requests.

    An engine with pages divides prompts of texts, and of embeddings that pool the last token. Other prompts run in one
    step.

    Args:
        makes_text: whether the engine has pages.

    Raises:
        ModelError: `max_model_len` is set to more than the model, or an engine without pages in one step, can compute.
    """
    if architecture.longrope and (config.max_model_len or 0) > architecture.max_position:
        raise ModelError(
            f"max_model_len: expected at most {architecture.max_position}, the original_max_position_embeddings of the "
            f"model; longrope's factors for longer texts are not supported; got {config.max_model_len}"
        )
    embedded = config.max_batch_tokens if not makes_text or pooling.mode != "last" else None
    if not makes_text and config.max_model_len is not None and config.max_model_len > config.max_batch_tokens:
        raise ModelError(
            f"max_model_len: expected at most max_batch_tokens ({config.max_batch_tokens}), since an engine that "
            f"generates no text computes a prompt in one step; got {config.max_model_len}. Raise max_batch_tokens or "
            "lower max_model_len"
        )
    longest = _least(config.max_model_len, architecture.max_position)
    if makes_text and config.max_model_len is None and config.kv_cache_bytes is not None:
        pages = config.kv_cache_bytes // page_bytes(architecture, dtype)
        longest = _least(longest, max(1, pages * PAGE_TOKENS))  # without a page, `pages_that_fit` refuses
    embedding = _least(longest, pooling.max_tokens, embedded)
    width = width_after(pooling.dense, architecture.hidden)
    listed = architecture.matryoshka
    return RequestLimits(
        max_model_len=longest if makes_text else embedding, hidden=architecture.hidden, vocab=architecture.vocab,
        added_tokens=config.added_tokens,
        max_embedding_len=embedding, max_whole_len=min(embedding, config.max_batch_tokens), dense_width=width,
        dimensions=None if listed is None else tuple(each for each in listed if each < width),
    )  # fmt: skip


def _least(*bounds: int | None) -> int:
    return min(bound for bound in bounds if bound is not None)
