"""Adapters come and go by name while requests run: load, replace, unload, list. Any gateway does it for all."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from ray.serve.handle import DeploymentHandle

from ranklet.cluster.broadcast import broadcast
from ranklet.cluster.catalog.location import AdapterLocation, name_error
from ranklet.cluster.catalog.overrides import Override, Overrides
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.catalog.source import check_url_allowed, is_remote, pinned_revision
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterReport
from ranklet.replicas.adapters.revision import Revisions, marks_of
from ranklet.replicas.errors import AdapterNotFound, InvalidRequest, RankletError, Unavailable

_RELEASE_TIMEOUT_S = 30.0


class AdapterExists(RankletError):  # noqa: N818  # named as its siblings in replicas/errors.py
    """An adapter of this name is served, and nobody asked to replace it."""

    code, status = "adapter_exists", 409


class LoadRequest(BaseModel):
    """Body of a load, in vLLM's and SGLang's words or plain ones."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str = Field(validation_alias=AliasChoices("lora_name", "name"))
    path: str | None = Field(default=None, validation_alias=AliasChoices("lora_path", "path"))
    replace: bool = Field(default=False, validation_alias=AliasChoices("load_inplace", "replace"))
    pinned: bool = False
    lora_int_id: int | None = None  # vLLM's clients may send one; it means nothing here


class UnloadRequest(BaseModel):
    """Body of an unload."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str = Field(validation_alias=AliasChoices("lora_name", "name"))
    lora_int_id: int | None = None


class Lifecycle:
    """One gateway's hand on the adapters of the whole application.

    Args:
        gateways: the handle of its own deployment, made when first needed.
        roots: folders that adapters may be loaded from.
        sources: prefixes of URLs that they may be loaded from.
    """

    def __init__(
        self,
        registry: Registry,
        replicas: ReplicasClient,
        gateways: "Callable[[], DeploymentHandle[Any]]",
        roots: Sequence[Path],
        sources: tuple[str, ...] = (),
    ) -> None:
        self._registry = registry
        self._replicas = replicas
        self._gateways = gateways
        self._roots = tuple(roots)
        self._sources = sources
        self._revisions = Revisions()
        self._locks: dict[str, asyncio.Lock] = {}

    async def load(self, asked: LoadRequest) -> dict[str, Any]:
        """Verify an adapter, bring it into a slot, and serve it from now on under its name.

        Replaced ones answer what is in flight for them; every later request gets the new one.

        Raises:
            RankletError: InvalidRequest (name, path), AdapterNotFound, InvalidAdapter with all findings, AdapterExists.
        """
        book = self._book()
        async with self._lock(asked.name):
            adapter = await asyncio.to_thread(self._wanted, asked)
            pins = {name: place for name, place in self._registry.pins().items() if name != asked.name}
            info = await self._replicas.load(adapter, (*pins, asked.name) if asked.pinned else tuple(pins))
            place = f"{adapter.source}#{info.revision}" if is_remote(adapter.source) else adapter.source
            if asked.pinned:
                pins[asked.name] = place
            await asyncio.to_thread(book.put, asked.name, Override(path=place, pinned=asked.pinned))
            await self._tell(pins)
            await self._replicas.release(asked.name, info.revision)
        return {
            **_described(info),
            "state": "ready",
            "verified": True,
            "pinned": asked.pinned,
            "path": place,
        }

    async def unload(self, name: str) -> dict[str, Any]:
        """Serve an adapter no more, and return when no request uses it and its memory is free. Its files stay.

        Raises:
            UnknownModel: there is none. Unavailable: requests still use it after half a minute; it goes with the last.
        """
        book = self._book()
        async with self._lock(name):
            await asyncio.to_thread(self._registry.locate, name, "name")
            self._refuse_configured(name)
            found_elsewhere = self._registry.exists_without_override(name)
            await asyncio.to_thread(book.put, name, Override() if found_elsewhere else None)
            await self._tell(self._registry.pins())
            if not await self._replicas.release(name, None, _RELEASE_TIMEOUT_S):
                raise Unavailable(
                    f"adapter {name!r} is served no more, but requests that were sent before still use it, or a "
                    "replica has not answered. Its memory is freed with the last of them"
                )
        return {"name": name, "state": "unloaded"}

    async def list(self) -> list[dict[str, Any]]:
        """Every adapter with its state: registered, loading, ready, failed, or draining, which requests in flight still
        use and no other may. The revision of one that no replica has looked at is None: nothing is read for a list.
        """
        reports = await self._replicas.reports()
        names = await asyncio.to_thread(self._registry.names)
        by_name: dict[str, list[tuple[str, AdapterReport]]] = {name: [] for name in names}
        for replica, found in reports:
            for each in found:
                if each.name in by_name or each.references:
                    by_name.setdefault(each.name, []).append((replica, each))
        pinned, served = self._registry.pins(), set(names)

        def cards() -> list[dict[str, Any]]:
            return [
                self._card(name, known, pinned=name in pinned, served=name in served)
                for name, known in sorted(by_name.items())
            ]

        return await asyncio.to_thread(cards)

    async def show(self, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            UnknownModel: there is none.
        """
        found = [card for card in await self.list() if card["name"] == name]
        if not found:
            self._registry.locate(name, "name")  # says why
        card = found[0]
        if card["revision"] is None and card["path"]:
            with contextlib.suppress(AdapterNotFound):
                card["revision"] = await asyncio.to_thread(self._read, AdapterLocation(name, card["path"]))
        return card

    async def check(self, known: AdapterLocation) -> None:
        """Raises UnknownModel if another revision was asked for than the one that is served."""
        if known.requested_revision is not None:
            revision = await asyncio.to_thread(self._read, known)
            if revision is not None:
                known.check_revision(revision)

    def _card(
        self, name: str, reports: Sequence[tuple[str, AdapterReport]], *, pinned: bool, served: bool
    ) -> dict[str, Any]:
        path = revision = error = None
        if served:
            try:
                known = self._registry.locate(name)
                path, revision = known.source, self._revision(known, reports)
            except RankletError as refusal:
                error = refusal.message
        current = [each for _, each in reports if each.revision == revision]
        error = error or next((each.error for each in current if each.error), None)
        info = next((each.info for each in current if each.info), None)
        return {
            "name": name, "state": _state(error, current) if served else "draining",
            "revision": revision, "path": path, "pinned": pinned,
            "rank": info.rank if info else None, "target_modules": list(info.modules) if info else None,
            "bytes": info.bytes if info else None, "references": sum(each.references for _, each in reports),
            "replicas": [
                {"replica": replica, "tier": each.where, "revision": each.revision, "references": each.references}
                for replica, each in reports
                if each.where != "refused"
            ],
            "error": error,
        }  # fmt: skip

    def _revision(self, known: AdapterLocation, reports: Sequence[tuple[str, AdapterReport]]) -> str | None:
        """What would be served now. Files are read only if no replica read them as they are; None if none has any."""
        if is_remote(known.source):
            return self._read(known) or next((each.revision for _, each in reports), None)
        marks = marks_of(known.source)
        read = next((each.revision for _, each in reports if each.marks == marks), None)
        return read or (self._read(known) if reports else None)

    def _read(self, known: AdapterLocation) -> str | None:
        """What would be served now, by its files; None of what only nodes that fetch it can tell."""
        if is_remote(known.source):
            return pinned_revision(known.source) or None
        return self._revisions.reference(known.name, known.source).revision

    def _wanted(self, asked: LoadRequest) -> AdapterLocation:
        """The adapter that a load means."""
        reason = name_error(asked.name)
        if reason or "@" in asked.name:
            raise InvalidRequest(f"name: {reason or 'expected a name without @'}", param="name")
        self._refuse_configured(asked.name)
        served = None
        with contextlib.suppress(RankletError):
            served = self._registry.locate(asked.name)
        if served is not None and not asked.replace:
            moves = asked.path is not None and not _same(asked.path, served.source)
            if moves or self._registry.is_loaded_by_name(asked.name):
                raise AdapterExists(
                    f"name: an adapter {asked.name!r} is served, from {served.source}. Set load_inplace to replace it",
                    param="name",
                )
        if asked.path is None:
            return AdapterLocation(asked.name, str(self._allowed(self._roots[0] / asked.name)))
        if is_remote(asked.path):
            check_url_allowed(asked.path, self._sources)
            return AdapterLocation(asked.name, asked.path)
        return AdapterLocation(asked.name, str(self._allowed(Path(asked.path))))

    def _allowed(self, path: Path) -> Path:
        """The folder that a path leads to."""
        roots = [root.resolve() for root in self._roots]
        absolute = path if path.is_absolute() else roots[0] / path
        try:
            folder = absolute.resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            folder = None
        if folder is None or not folder.is_dir():
            raise AdapterNotFound(f"path: expected a folder, {str(path)!r} does not exist", param="path")
        if not any(folder.is_relative_to(root) for root in roots):
            raise InvalidRequest(
                f"path: expected a folder under {', '.join(map(str, roots))} (adapters_dir, security.adapter_roots), "
                f"got {str(path)!r}",
                param="path",
            )
        return folder

    def _refuse_configured(self, name: str) -> None:
        if self._registry.is_in_user_config(name):
            raise AdapterExists(
                f"name: {name!r} is set by user_config; change it there, with `serve deploy`", param="name"
            )

    def _book(self) -> Overrides:
        if self._registry.overrides is None:
            raise InvalidRequest(
                "expected `adapters_dir` in the application's args: what is loaded by name is written down there"
            )
        return self._registry.overrides

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _tell(self, pins: Mapping[str, str]) -> None:
        """All gateways look at the book, all replicas learn what is pinned."""
        told = broadcast(self._gateways(), "book_changed")
        await asyncio.gather(told, self._replicas.pin(pins))


def _same(asked: str, place: str) -> bool:
    if is_remote(asked) or is_remote(place):
        return asked == place.partition("#")[0]
    return Path(asked).resolve() == Path(place).resolve()


def _described(info: AdapterInfo) -> dict[str, Any]:
    return {
        "name": info.name, "revision": info.revision, "rank": info.rank, "target_modules": list(info.modules),
        "bytes": info.bytes,
    }  # fmt: skip


def _state(error: str | None, current: Iterable[AdapterReport]) -> str:
    tiers = {each.where for each in current}
    if error:
        return "failed"
    return "ready" if "gpu" in tiers else "loading" if "loading" in tiers else "registered"
