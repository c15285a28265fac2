"""What replicas say about adapters' folders. Gateways have no remote files."""

import pickle
from dataclasses import dataclass, replace
from typing import Final, Protocol
from weakref import WeakValueDictionary

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.model_tokens import ModelTokens, Tokenizers
from ranklet.cluster.message import AdapterText
from ranklet.replicas.errors import InvalidAdapter, ModelError
from ranklet.replicas.model.added_tokens import AddedTokens

_MAX_KEPT: Final = 4096
_MAX_KEPT_BYTES: Final = 64 << 20  # without added tokens; usual descriptions have 5 KB, the largest 2 MB
_MAX_KEPT_TOKENS: Final = 1 << 18  # added tokens of all kept adapters, 0.3 KB each; equal ones count once


class TextDescriber(Protocol):
    """The part of `ReplicasClient` that describes adapters."""

    async def text_description(self, adapter: AdapterLocation) -> AdapterText: ...


@dataclass(frozen=True)
class DescribedAdapter:
    """What one revision of an adapter says, and the tokenizer that its folder asks for."""

    text: AdapterText
    tokens: ModelTokens


class AdapterDescriptions:
    """Keeps the description of each adapter until `forget`: replicas refuse calls that an old one has shaped.

    Args:
        most_bytes: size of all descriptions that are kept; the oldest go first, and are asked for again.

    Attributes:
        tokenizers: of the base model and its adapters.
    """

    def __init__(self, replicas: TextDescriber, tokenizers: Tokenizers, *, most_bytes: int = _MAX_KEPT_BYTES) -> None:
        self.tokenizers = tokenizers
        self._replicas = replicas
        self._most_bytes = most_bytes
        self._kept: dict[tuple[str, str], AdapterText] = {}
        self._sizes: dict[tuple[str, str], int] = {}
        self._added: WeakValueDictionary[str, AddedTokens] = WeakValueDictionary()  # by digest

    def known(self, adapter: AdapterLocation) -> DescribedAdapter | None:
        """Return the description; None if `describe` must come first."""
        text = self._known(adapter)
        tokens = None if text is None else self.tokenizers.known(text.added_tokens)
        return None if text is None or tokens is None else DescribedAdapter(text, tokens)

    async def describe(self, adapter: AdapterLocation, *, again: bool = False) -> DescribedAdapter:
        """Let a replica describe an adapter, and make its tokenizer.

        Args:
            again: ask a replica even if its last description is kept.

        Raises:
            InvalidAdapter: its tokenizer files cannot be used with the base model.
            UnknownModel: another revision was requested.
            RankletError: an error of `ReplicasClient.text_description`.
        """
        text = (None if again else self._known(adapter)) or await self._ask(adapter)
        try:
            return DescribedAdapter(text, await self.tokenizers.make(text.added_tokens))
        except ModelError as error:
            raise InvalidAdapter(adapter.name, (error.message,)) from error

    def _known(self, adapter: AdapterLocation) -> AdapterText | None:
        text = self._kept.get((adapter.name, adapter.source))
        return None if text is None or adapter.requested_revision not in (None, text.revision) else text

    async def _ask(self, adapter: AdapterLocation) -> AdapterText:
        text = await self._replicas.text_description(adapter)
        adapter.check_revision(text.revision)
        if text.findings:  # not kept, so that a corrected folder is noticed
            raise InvalidAdapter(adapter.name, text.findings)
        self.forget(adapter)
        size = len(pickle.dumps(replace(text, added_tokens=AddedTokens())))
        while self._kept and self._is_full(size):
            self._drop(next(iter(self._kept)))
        if text.added_tokens.tokens:
            text = replace(text, added_tokens=self._added.setdefault(text.added_tokens.digest, text.added_tokens))
        self._kept[adapter.name, adapter.source] = text
        self._sizes[adapter.name, adapter.source] = size
        return text

    def _is_full(self, size: int) -> bool:
        """Whether a description of this size must take the place of others."""
        tokens = sum(len(each.tokens) for each in self._added.values())
        is_large = tokens > _MAX_KEPT_TOKENS or sum(self._sizes.values()) + size > self._most_bytes
        return is_large or len(self._kept) >= _MAX_KEPT

    def forget(self, adapter: AdapterLocation) -> None:
        self._drop((adapter.name, adapter.source))

    def _drop(self, key: tuple[str, str]) -> None:
        self._kept.pop(key, None)
        self._sizes.pop(key, None)
