"""Describes adapters and the replicas that hold them, for `GET /v1/adapters`."""

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.catalog.source import is_remote, pinned_revision
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.names import MAX_NAME_CHARACTERS, normal_name
from ranklet.replicas.adapters.limits import MAX_ADAPTER_BYTES
from ranklet.replicas.adapters.reference import AdapterReport
from ranklet.replicas.adapters.revision import Revisions, marks_of
from ranklet.replicas.errors import RankletError, UnknownModel

_Reports = Sequence[tuple[str, AdapterReport]]  # with the id of the replica


class AdapterCards:
    """Builds one card per adapter, from the registry and from the replicas' reports.

    Args:
        roots: folders that links in an adapter's folder may lead to.
        max_bytes: limit on the size of one adapter.
    """

    def __init__(
        self, registry: Registry, replicas: ReplicasClient, roots: Sequence[Path] = (),
        max_bytes: int = MAX_ADAPTER_BYTES,
    ) -> None:  # fmt: skip
        self._registry = registry
        self._replicas = replicas
        self._revisions = Revisions(roots=roots, max_bytes=max_bytes)

    async def cards(self) -> list[dict[str, Any]]:
        """Return the cards of all adapters.

        The state is registered, loading, ready, failed, or draining: unloaded, but in use by requests in flight. The
        revision of an adapter that no replica has read is None, since reading all files would take too long. Folders
        that are no adapters are failed, with the reason.
        """
        reports = await self._replicas.reports()
        names, skipped = await asyncio.to_thread(lambda: (self._registry.names(), self._registry.skipped()))
        by_name: dict[str, list[tuple[str, AdapterReport]]] = {name: [] for name in names}
        for replica, adapters in reports:
            for report in adapters:
                if report.name in by_name or report.references:
                    by_name.setdefault(report.name, []).append((replica, report))
        pinned, served = self._registry.pins(), set(names)

        def build() -> list[dict[str, Any]]:
            cards = [
                self._card(name, found, pinned=name in pinned, served=name in served) for name, found in by_name.items()
            ]
            cards += [_failed_card(name, reason) for name, reason in skipped.items() if name not in by_name]
            return sorted(cards, key=lambda card: str(card["name"]))

        return await asyncio.to_thread(build)

    async def card(self, name: str) -> dict[str, Any]:
        """Return the card of one adapter, with its revision.

        Raises:
            UnknownModel: there is no adapter of this name.
        """
        name = normal_name(name)
        card = next((card for card in await self.cards() if card["name"] == name), None)
        if card is None:
            await asyncio.to_thread(self._registry.locate, name, "name")  # its error lists similar names
            raise UnknownModel(
                f"name: expected a name that GET /v1/adapters lists, got {name[:MAX_NAME_CHARACTERS]!r}", param="name"
            )
        if card["revision"] is None and card["path"]:
            with contextlib.suppress(RankletError):
                location = AdapterLocation(name, card["path"])
                card["revision"] = await asyncio.to_thread(self._read_revision, location)
        return card

    async def check_revision(self, location: AdapterLocation) -> None:
        """Raise UnknownModel if the request names another revision than the one that is served."""
        if location.requested_revision is not None:
            revision = await asyncio.to_thread(self._read_revision, location)
            if revision is not None:
                location.check_revision(revision)

    def _card(self, name: str, reports: _Reports, *, pinned: bool, served: bool) -> dict[str, Any]:
        path = revision = error = None
        if served:
            try:
                location = self._registry.locate(name)
                path, revision = location.source, self._revision(location, reports)
            except RankletError as refusal:
                error = refusal.message
        current = [report for _, report in reports if report.revision == revision]
        error = error or next((report.error for report in current if report.error), None)
        info = next((report.info for report in current if report.info), None)
        return {
            "name": name, "state": _state(error, current) if served else "draining",
            "revision": revision, "path": path, "pinned": pinned,
            "rank": info.rank if info else None, "target_modules": list(info.modules) if info else None,
            "bytes": info.bytes if info else None, "references": sum(report.references for _, report in reports),
            "replicas": [
                {"replica": replica, "tier": report.where, "revision": report.revision, "references": report.references}
                for replica, report in reports
                if report.where != "refused"
            ],
            "notes": list(info.notes) if info else None, "error": error,
        }  # fmt: skip

    def _revision(self, location: AdapterLocation, reports: _Reports) -> str | None:
        """Return the revision that is served now. Reads files only if replicas have read other versions of them."""
        if is_remote(location.source):
            return self._read_revision(location) or next((report.revision for _, report in reports), None)
        marks = marks_of(location.source)
        revision = next((report.revision for _, report in reports if report.marks == marks), None)
        return revision or (self._read_revision(location) if reports else None)

    def _read_revision(self, location: AdapterLocation) -> str | None:
        """Return the revision of an adapter's files; None for a URL without a revision, which only replicas fetch."""
        if is_remote(location.source):
            return pinned_revision(location.source) or None
        return self._revisions.reference(location.name, location.source).revision


def _failed_card(name: str, error: str) -> dict[str, Any]:
    return {
        "name": name, "state": "failed", "revision": None, "path": None, "pinned": False, "rank": None,
        "target_modules": None, "bytes": None, "references": 0, "replicas": [], "notes": None, "error": error,
    }  # fmt: skip


def _state(error: str | None, current: Iterable[AdapterReport]) -> str:
    tiers = {report.where for report in current}
    if error:
        return "failed"
    return "ready" if "gpu" in tiers else "loading" if "loading" in tiers else "registered"
