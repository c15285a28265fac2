"""Makes the tasks of text requests, and decides whether an engine generates text."""

import secrets
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.prefix import PrefixRoot
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.generate import GenerateTask
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import SEED_BITS, GenerateParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.heads import TextHead
from ranklet.replicas.model.lm_head import LmHead, MissingHead


@dataclass(frozen=True, slots=True)
class Text:
    """Makes the tasks of one engine's text requests.

    Attributes:
        dtype: of keys and values.
        shares_prefixes: whether requests share pages.
    """

    head: TextHead
    limits: RequestLimits
    dtype: str
    shares_prefixes: bool

    def task(
        self, params: GenerateParams, prompts: Many[NDArray[np.int32]], adapter: AdapterRef | None,
        given: Many[NDArray[np.int32]] = (),
    ) -> GenerateTask:  # fmt: skip
        """Return the task of a request; see `Engine.submit`.

        Raises:
            InvalidRequest: a parameter is out of range, a prompt leaves no space for `max_tokens`, or given tokens do
                not fit the request.
        """
        params.check(self.limits.of(adapter).vocab)
        if params.grammar is not None and self.limits.no_grammar is not None:
            raise InvalidRequest(f"response_format: {self.limits.no_grammar}", param="response_format")
        if params.max_tokens < 1:
            raise InvalidRequest(f"max_tokens: expected at least 1, got {params.max_tokens}", param="max_tokens")
        longest = max(map(len, prompts))
        if longest + params.max_tokens > self.limits.max_model_len:
            raise InvalidRequest(
                f"max_tokens: expected at most {self.limits.max_model_len - longest} beside a prompt of {longest} "
                f"tokens, since prompt and output together may have {self.limits.max_model_len}; got "
                f"{params.max_tokens}. Shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        if given and (len(given) != len(prompts) * params.n or max(map(len, given)) >= params.max_tokens):
            raise InvalidRequest(
                f"expected {len(prompts) * params.n} texts of less than {params.max_tokens} tokens to continue, got "
                f"{len(given)} of up to {max(map(len, given))}"
            )
        root = None
        if self.shares_prefixes:
            revision = "" if adapter is None else adapter.revision
            root = PrefixRoot(self.limits.base_revision, revision, params.cache_salt, self.dtype)
        seed = params.seed if params.seed is not None and params.seed >= 0 else secrets.randbits(SEED_BITS)
        return GenerateTask(params, len(prompts), self.head, self.limits.end_ids, seed, root)


def generates_text(config: EngineConfig) -> bool:
    """Return whether an engine keeps keys and values, which text needs.

    A folder with the modules.json of an embedding model generates no text by default. It often has a language-model
    head all the same, since the head may be tied to the token embedding.
    """
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes > 0
    return not (config.model_dir / "modules.json").is_file()


def why_no_text(config: EngineConfig, lm_head: LmHead | MissingHead) -> str | None:
    """Return why an engine serves embeddings only; None if it generates text."""
    if isinstance(lm_head, MissingHead):
        return lm_head.reason
    if not generates_text(config):
        return (
            "the base model is served for embeddings only: its folder has the modules.json of an embedding model, "
            "or engine.kv_cache_bytes is 0. Set engine.kv_cache_bytes to serve text too"
        )
    return None
