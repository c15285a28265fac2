"""The tokenizers of a gateway: the base model's, and those with the tokens that adapters add to it."""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

from ranklet.cluster.text.token_bytes import TokenBytes
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.added_tokens import MAX_ADDED_TOKENS, AddedTokens
from ranklet.replicas.model.tokenizer import PromptTokenizer

_MAX_KEPT: Final = 64  # each takes up to 3 MB


class ModelTokens:
    """What becomes of texts and of token ids, for one model.

    Args:
        added: tokens that `tokenizer` has besides the base model's.
        base: of the base model, for an adapter.

    Attributes:
        tokenizer: makes prompts.
    """

    def __init__(
        self, tokenizer: PromptTokenizer, added: AddedTokens | None = None, base: "ModelTokens | None" = None
    ) -> None:
        self.tokenizer = tokenizer
        self._added = added or AddedTokens()
        self._base = base

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        return self.tokenizer.backend

    @property
    def bytes(self) -> TokenBytes:
        """Return the bytes that tokens add to a text."""
        found, problem = self._bytes
        assert found is not None, problem
        return found

    @property
    def problem(self) -> str | None:
        """Return why no text can be made of tokens; None if it can."""
        return self._bytes[1]

    @cached_property
    def _bytes(self) -> tuple[TokenBytes | None, str | None]:
        try:
            if self._base is None:
                return TokenBytes(self.backend), None
            if self._base.problem is not None:
                return None, self._base.problem
            return self._base.bytes.with_added(self.backend, (token.id for token in self._added.tokens)), None
        except ModelError as error:
            return None, error.message

    def special_id(self, text: str) -> int | None:
        """Return the id of a text that is a special token; None for other texts."""
        token = self.backend.token_to_id(text)
        return token if token in self.bytes.special_ids else None

    def limits(self, limits: RequestLimits) -> RequestLimits:
        """Return the limits of requests for the model, whose token ids may go beyond the base model's."""
        return limits if self._added.end <= limits.vocab else replace(limits, vocab=self._added.end)


def widest_limits(limits: RequestLimits) -> RequestLimits:
    """Return the limits of requests for a model that is not described yet."""
    return replace(limits, vocab=limits.vocab + MAX_ADDED_TOKENS)


class Tokenizers:
    """Makes the tokenizers of adapters, and keeps those that were used last. Those with equal tokens share one.

    Attributes:
        base: of the base model.
    """

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self.base = ModelTokens(tokenizer)
        self._kept: OrderedDict[AddedTokens, ModelTokens] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizers")

    def known(self, added: AddedTokens) -> ModelTokens | None:
        """Return the tokenizer with these tokens; None if `make` must come first. Thread-safe."""
        if not added.tokens:
            return self.base
        with self._lock:
            found = self._kept.get(added)
            if found is not None:
                self._kept.move_to_end(added)
            return found

    async def make(self, added: AddedTokens) -> ModelTokens:
        """Return the tokenizer with these tokens.

        Raises:
            ModelError: the tokens get other ids, or the texts of tokens depend on their neighbours.
        """
        if known := self.known(added):
            return known
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._make, added)

    def _make(self, added: AddedTokens) -> ModelTokens:
        if known := self.known(added):
            return known  # it was made while this waited for the thread
        made = ModelTokens(self.base.tokenizer.with_added(added), added, self.base)
        if made.problem is not None and self.base.problem is None:
            raise ModelError(made.problem)
        with self._lock:
            self._kept[added] = made
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return made
