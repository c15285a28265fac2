"""What replicas say about adapters' folders. Gateways have no remote files."""

from typing import Protocol

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.message import AdapterText
from ranklet.replicas.errors import InvalidAdapter

_MAX_KEPT = 4096


class TextDescriber(Protocol):
    """The part of `ReplicasClient` that describes adapters."""

    async def text_description(self, adapter: AdapterLocation) -> AdapterText: ...


class AdapterDescriptions:
    """Keeps the description of each adapter until `forget`: replicas refuse calls that an old one has shaped."""

    def __init__(self, replicas: TextDescriber) -> None:
        self._replicas = replicas
        self._kept: dict[tuple[str, str], AdapterText] = {}

    def known(self, adapter: AdapterLocation) -> AdapterText | None:
        """Return the description; None if a replica must describe the adapter first."""
        text = self._kept.get((adapter.name, adapter.source))
        return None if text is None or adapter.requested_revision not in (None, text.revision) else text

    async def describe(self, adapter: AdapterLocation) -> AdapterText:
        """Let a replica describe an adapter.

        Raises:
            InvalidAdapter: its tokenizer files cannot be used with the base model.
            UnknownModel: another revision was requested.
            RankletError: an error of `ReplicasClient.text_description`.
        """
        text = await self._replicas.text_description(adapter)
        adapter.check_revision(text.revision)
        if text.findings:  # not kept, so that a corrected folder is noticed
            raise InvalidAdapter(adapter.name, text.findings)
        self.forget(adapter)
        while len(self._kept) >= _MAX_KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[adapter.name, adapter.source] = text
        return text

    def forget(self, adapter: AdapterLocation) -> None:
        self._kept.pop((adapter.name, adapter.source), None)
