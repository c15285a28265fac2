"""What replicas say about adapters' folders. Gateways have no remote files."""

from dataclasses import dataclass, replace
from typing import Final, Protocol
from weakref import WeakValueDictionary

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.model_tokens import ModelTokens, Tokenizers
from ranklet.cluster.message import AdapterText
from ranklet.replicas.errors import InvalidAdapter, ModelError
from ranklet.replicas.model.added_tokens import AddedTokens

_MAX_KEPT: Final = 4096
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

    Attributes:
        tokenizers: of the base model and its adapters.
    """

    def __init__(self, replicas: TextDescriber, tokenizers: Tokenizers) -> None:
        self.tokenizers = tokenizers
        self._replicas = replicas
        self._kept: dict[tuple[str, str], AdapterText] = {}
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
        while len(self._kept) >= _MAX_KEPT or (self._kept and self._kept_tokens() > _MAX_KEPT_TOKENS):
            self._kept.pop(next(iter(self._kept)))
        if text.added_tokens.tokens:
            text = replace(text, added_tokens=self._added.setdefault(text.added_tokens.digest, text.added_tokens))
        self._kept[adapter.name, adapter.source] = text
        return text

    def _kept_tokens(self) -> int:
        return sum(len(each.tokens) for each in self._added.values())

    def forget(self, adapter: AdapterLocation) -> None:
        self._kept.pop((adapter.name, adapter.source), None)
