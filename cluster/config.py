"""What an operator writes under `args:` of the application, checked before anything starts."""

import dataclasses
import difflib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from ranklet.replicas.config import EngineConfig

Requests = Literal["all", "refused", "none"]
_SET_ELSEWHERE = {"model_dir": "base.model_dir"}


class _StrictModel(BaseModel):
    """Refuses keys it does not know, and says which ones it does."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            refuse_unknown(values, cls.model_fields)
        return values


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises ValueError naming every key of `values` that is not in `known`, with the nearest one that is."""
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(
            f"unknown {'; unknown '.join(_with_hint(key, known) for key in unknown)}. Known: {', '.join(known)}"
        )


def _with_hint(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _validated(kind: Any, value: Any) -> Any:
    return TypeAdapter(kind).validate_python(value)


class BaseConfig(_StrictModel):
    """The base model."""

    model_dir: Path
    name: str | None = None  # None: the folder's name
    aliases: tuple[str, ...] = ()  # further names requests may call it by


class LimitsConfig(_StrictModel):
    """What one request, and one gateway, may ask."""

    max_body_bytes: int = Field(default=32 << 20, ge=1)
    max_texts_per_request: int = Field(default=2048, ge=1)
    request_timeout_s: float = Field(default=60.0, gt=0)
    no_replica_timeout_s: float = Field(default=6.0, gt=0)  # for a replica to come up; beyond it 503
    body_timeout_s: float = Field(default=30.0, gt=0)  # for a client to send its request
    max_in_flight_requests: int = Field(default=2000, ge=1)  # per gateway; beyond it 503


class MetricsConfig(_StrictModel):
    """Where each process exports its own metrics."""

    host: str = "127.0.0.1"  # 0.0.0.0 when Prometheus runs on another machine
    first_port: int = Field(default=0, ge=0, le=65_535)  # 0: any free port; else the first free one from here on
    top_adapters: int = Field(default=100, ge=1)  # adapters with a label of their own; the rest are "other"


class LogConfig(_StrictModel):
    """What gateways write to Serve's log of each request."""

    requests: Requests = "refused"  # which of them have a line


class SourcesConfig(_StrictModel):
    """Adapters at `s3://`, `gs://`, `hf://` or `https://`. Credentials are where fsspec looks for them."""

    allowed: tuple[str, ...] = ()  # prefixes of URLs that adapters may be loaded from by name, such as s3://models/
    cache_dir: Path = Path(tempfile.gettempdir()) / f"ranklet-sources-{os.getuid()}"  # of each node
    cache_bytes: int = Field(default=64 << 30, ge=0)  # of all together; the least recently used go
    max_adapter_bytes: int = Field(default=4 << 30, ge=1)


class SecurityConfig(_StrictModel):
    """Who may ask, and where adapters may come from."""

    keys_file: Path | None = None  # None: everybody may infer; who may load adapters, see `open_admin`
    open_admin: bool | None = None  # without keys; None: if HTTP is bound to loopback alone
    adapter_roots: tuple[Path, ...] = ()  # folders that adapters may be loaded from by name, beside adapters_dir


class AdapterList(_StrictModel):
    """In `user_config` of both deployments: changed by `serve deploy` without a restart."""

    adapters: dict[str, Path] = Field(default_factory=dict)

    @field_validator("adapters", mode="before")
    @classmethod
    def _map_or_list(cls, value: Any) -> Any:
        """`{name: path}`, or `[{name: ..., path: ...}]`."""
        if isinstance(value, list):
            for entry in value:
                if not isinstance(entry, Mapping) or set(entry) != {"name", "path"}:
                    raise ValueError(
                        f"expected a map of name to path, or a list of {{name, path}}; got entry {entry!r}"
                    )
            value = {entry["name"]: entry["path"] for entry in value}
        value = {} if value is None else value
        if isinstance(value, Mapping):
            for name, path in value.items():
                if "://" in str(path):
                    raise ValueError(f"{name}: expected a folder, got {path}. Load what is elsewhere by name")
        return value


class GatewayUserConfig(AdapterList):
    """`user_config` of the gateway: what may change while requests run."""

    tokens_per_minute: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)  # by pattern of models


class AppArgs(AdapterList):
    """Arguments of `ranklet.cluster.app:build`.

    Relative paths start at the folder Ray was started in.

    Raises:
        ValidationError: an unknown key, or a value of the wrong type or out of range.
    """

    base: BaseConfig
    engine: dict[str, Any] = Field(default_factory=dict)  # fields of EngineConfig
    adapters_dir: Path | None = None
    limits: LimitsConfig = LimitsConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()
    sources: SourcesConfig = SourcesConfig()
    security: SecurityConfig = SecurityConfig()

    @field_validator("engine")
    @classmethod
    def _engine_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
        for key in values.keys() & _SET_ELSEWHERE.keys():
            raise ValueError(f"{key} is set as {_SET_ELSEWHERE[key]}")
        refuse_unknown(values, {name: field for name, field in fields.items() if name not in _SET_ELSEWHERE})
        checked = {}
        for name, value in values.items():
            try:
                checked[name] = _validated(fields[name].type, value)
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg']}, got {value!r}") from None
        return checked

    @model_validator(mode="after")
    def _engine_ranges(self) -> Self:
        self.engine_config()  # raises what EngineConfig raises
        return self

    def engine_config(self) -> EngineConfig:
        """The engine's own settings. An adapter may call its base by any name that requests may."""
        fields = dict(self.engine)
        fields["base_aliases"] = (*fields.get("base_aliases", ()), *self.base_names)
        return EngineConfig(model_dir=self.base.model_dir, **fields)

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names of the base model, the one shown to users first."""
        return (self.base.name or self.base.model_dir.resolve().name, *self.base.aliases)

    def resolved(self) -> "AppArgs":
        """The same with absolute paths, so that they mean the same in every process."""
        return self.model_copy(
            update={
                "base": self.base.model_copy(update={"model_dir": self.base.model_dir.absolute()}),
                "adapters_dir": self.adapters_dir and self.adapters_dir.absolute(),
                "sources": self.sources.model_copy(update={"cache_dir": self.sources.cache_dir.absolute()}),
                "security": self.security.model_copy(
                    update={
                        "keys_file": self.security.keys_file and self.security.keys_file.absolute(),
                        "adapter_roots": tuple(root.absolute() for root in self.security.adapter_roots),
                    }
                ),
                "adapters": {name: path.absolute() for name, path in self.adapters.items()},
            }
        )
