"""Loads, replaces and unloads adapters by name while requests run. A change on one gateway holds for all of them."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakValueDictionary

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.overrides import Override, Overrides
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.catalog.source import AllowedSources, check_url_allowed, is_remote, missing_folder
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.names import normal_name, spellings
from ranklet.replicas.errors import (
    AdapterNotFound,
    InvalidAdapter,
    InvalidRequest,
    RankletError,
    Unavailable,
    UnknownModel,
)

_RELEASE_TIMEOUT_S = 30.0
_Name = Annotated[str, AfterValidator(normal_name)]


class AdapterExists(RankletError):  # noqa: N818  # named like its siblings in replicas/errors.py
    """An adapter of this name is served, and the request may not replace it."""

    code, status = "adapter_exists", 409


class LoadRequest(BaseModel):
    """Body of a load. Accepts the field names of vLLM and SGLang as well."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: _Name = Field(validation_alias=AliasChoices("lora_name", "name"))
    path: str | None = Field(default=None, validation_alias=AliasChoices("lora_path", "path"))
    replace: bool = Field(default=False, validation_alias=AliasChoices("load_inplace", "replace"))
    pinned: bool = False
    lora_int_id: int | None = None  # sent by vLLM's clients; ignored


class UnloadRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: _Name = Field(validation_alias=AliasChoices("lora_name", "name"))
    lora_int_id: int | None = None


class Lifecycle:
    """Changes which adapters the application serves.

    Args:
        notify_gateways: makes all gateways read the overrides file again.
        roots: folders that adapters may be loaded from. Relative paths start at the first one, adapters_dir.
        sources: prefixes of URLs that adapters may be loaded from.
    """

    def __init__(
        self, registry: Registry, replicas: ReplicasClient, notify_gateways: Callable[[], Awaitable[object]],
        roots: Sequence[Path], sources: tuple[str, ...],
    ) -> None:  # fmt: skip
        self._registry = registry
        self._replicas = replicas
        self._notify_gateways = notify_gateways
        self._roots = tuple(roots)
        self._sources = sources
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by adapter, while in use

    async def load(self, request: LoadRequest) -> dict[str, Any]:
        """Verify an adapter, load it into a slot, and serve it under its name from now on.

        Requests in flight keep the replaced adapter; every later request uses the new one.

        Raises:
            InvalidRequest: the name is malformed, or the path is not allowed.
            AdapterNotFound: the folder does not exist.
            InvalidAdapter: the adapter cannot be served; `findings` lists every reason.
            AdapterExists: the name is in use.
            FolderNotWritable: the load cannot be recorded.
            Unavailable: no replica answers.
        """
        overrides = self._overrides()
        async with self._lock(request.name):
            await asyncio.to_thread(overrides.check_writable)
            adapter = await asyncio.to_thread(self._locate, request)
            others = [name for name in self._registry.pins() if name != request.name]
            info = await self._replicas.load(adapter, [*others, request.name] if request.pinned else others)
            source = f"{adapter.source}#{info.revision}" if is_remote(adapter.source) else adapter.source
            await asyncio.to_thread(overrides.put, request.name, Override(path=source, pinned=request.pinned))
            await self._publish_overrides()
            await self._replicas.release(request.name, info.revision)
        return {
            "name": info.name, "revision": info.revision, "rank": info.rank, "target_modules": list(info.modules),
            "bytes": info.bytes, "state": "ready", "verified": True, "pinned": request.pinned, "path": source,
            "notes": list(info.notes),
        }  # fmt: skip

    async def unload(self, name: str) -> dict[str, Any]:
        """Stop serving an adapter, and wait until its memory is free. Its files stay.

        Raises:
            UnknownModel: there is no adapter of this name.
            Unavailable: requests still use it after 30 s. Its memory is freed after the last of them.
        """
        overrides, name = self._overrides(), normal_name(name)
        async with self._lock(name):
            await asyncio.to_thread(self._check_exists, name)
            self._refuse_configured(name)
            exists_elsewhere = self._registry.exists_without_override(name)
            await asyncio.to_thread(overrides.put, name, Override() if exists_elsewhere else None)
            await self._publish_overrides()
            if not await self._replicas.release(name, None, _RELEASE_TIMEOUT_S):
                raise Unavailable(
                    f"adapter {name!r} is no longer served, but requests that were sent before still use it, or a "
                    "replica has not answered. Its memory is freed after the last of them"
                )
        return {"name": name, "state": "unloaded"}

    def _check_exists(self, name: str) -> None:
        try:
            location = self._registry.locate(name, "name")
        except (AdapterNotFound, InvalidAdapter):
            return  # it is listed as failed, and may be unloaded all the same
        if location.requested_revision is not None:
            raise UnknownModel(f"name: expected a name without a revision, got {name!r}", param="name")

    def _locate(self, request: LoadRequest) -> AdapterLocation:
        if reason := self._registry.name_error(request.name):
            raise InvalidRequest(f"name: {reason}", param="name")
        self._refuse_configured(request.name)
        if not request.replace:
            self._refuse_existing(request)
        if request.path is None:
            return AdapterLocation(request.name, str(self._allowed_folder(request.name)))
        if is_remote(request.path):
            check_url_allowed(request.path, self._sources)
            return AdapterLocation(request.name, request.path)
        return AdapterLocation(request.name, str(self._allowed_folder(request.path)))

    def _allowed_folder(self, path: str) -> Path:
        folder = self._resolve(path)
        if folder is None or not folder.is_dir():
            raise missing_folder(path, self._sources)
        if reason := AllowedSources(self._roots, self._sources).problem(str(folder)):
            raise InvalidRequest(f"path: {reason}", param="path")
        return folder

    def _resolve(self, path: str) -> Path | None:
        for spelling in spellings(path):
            # It may not exist, or no file may have this name, or it is a loop of links.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                return (self._roots[0] / spelling).resolve(strict=True)
        return None

    def _refuse_existing(self, request: LoadRequest) -> None:
        try:
            served = self._registry.locate(request.name)
        except RankletError:
            return
        moves = request.path is not None and not self._is_same_source(request.path, served.source)
        if moves or self._registry.is_loaded_by_name(request.name):
            raise AdapterExists(
                f"name: expected an unused name, but {request.name!r} is served from {served.source}. "
                "Set load_inplace to replace it (`ranklet adapters load --replace`)",
                param="name",
            )

    def _is_same_source(self, requested: str, served: str) -> bool:
        if is_remote(requested) or is_remote(served):
            return requested == served.partition("#")[0]
        return self._resolve(requested) == Path(served).resolve()

    def _refuse_configured(self, name: str) -> None:
        if self._registry.is_in_user_config(name):
            raise AdapterExists(
                f"name: {name!r} is set by user_config; change it there, and deploy the file", param="name"
            )

    def _overrides(self) -> Overrides:
        if self._registry.overrides is None:
            raise InvalidRequest(
                "expected `adapters_dir` in the application's args, got none: the adapters that are loaded by name are "
                "recorded in that folder"
            )
        return self._registry.overrides

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _publish_overrides(self) -> None:
        await asyncio.gather(self._notify_gateways(), self._replicas.pin(self._registry.pins()))
