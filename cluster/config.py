"""Settings of the application: `args` and `user_config` in its YAML file."""

import dataclasses
import difflib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ranklet.cluster.names import name_error, normal_name
from ranklet.replicas.config import EngineConfig

Requests = Literal["all", "refused", "none"]
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s*A-Z]+")  # as browsers write it, without a path
_SET_ELSEWHERE = {"model_dir": "base.model_dir", "adapter_roots": "security.adapter_roots"}


def _checked_name(name: str) -> str:
    name = normal_name(name)
    if reason := name_error(name):
        raise ValueError(reason)
    return name


_ModelName = Annotated[str, AfterValidator(_checked_name)]


class _StrictModel(BaseModel):
    """Refuses unknown keys and names the known ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            _check_keys(values, cls.model_fields)
        return values


def _check_keys(values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(
            f"unknown {'; unknown '.join(_with_hint(key, known) for key in unknown)}. Known: {', '.join(known)}"
        )


def _with_hint(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


class BaseConfig(_StrictModel):
    """The base model.

    Attributes:
        model_dir: folder with config.json, safetensors and tokenizer.
        name: its name in requests and answers; None for the folder's name.
        aliases: other names that requests may use.
    """

    model_dir: Path
    name: _ModelName | None = None
    aliases: tuple[_ModelName, ...] = ()


class LimitsConfig(_StrictModel):
    """Limits of each gateway.

    Attributes:
        max_body_bytes: larger bodies get 413.
        max_texts_per_request: requests with more inputs get 400.
        request_timeout_s: time for replicas to answer a request; then 503. For a text, this is the longest time
            without a new token.
        no_replica_timeout_s: time to wait for a replica while there is none; then 503.
        body_timeout_s: time for a client to send its request; then 408.
        max_in_flight_requests: further requests get 503.
        max_waiting_stream_bytes: text that may wait for a client that reads its stream slowly. If more waits, the
            request ends.
        max_tokenising_bytes: bytes of large requests that one gateway parses, renders or tokenises at once. Further
            ones wait, and keys take turns.
        max_held_body_bytes: bodies of large requests that one gateway holds at once. Further ones get 503. Keys, or
            clients' addresses where there are no keys, have fair shares.
    """

    max_body_bytes: int = Field(default=32 << 20, ge=1)
    max_texts_per_request: int = Field(default=2048, ge=1)
    request_timeout_s: float = Field(default=60.0, gt=0)
    no_replica_timeout_s: float = Field(default=6.0, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    max_in_flight_requests: int = Field(default=2000, ge=1)
    max_waiting_stream_bytes: int = Field(default=1 << 20, ge=1)
    max_tokenising_bytes: int = Field(default=8 << 20, ge=1)
    max_held_body_bytes: int = Field(default=512 << 20, ge=1)


class MetricsConfig(_StrictModel):
    """The Prometheus endpoint of each gateway and each replica.

    Attributes:
        host: address to listen on. Prometheus on another machine needs 0.0.0.0.
        first_port: the endpoint takes the first free port from this one on; 0 selects any free port.
        top_adapters: number of adapters with their own label. The others share the label "other".
    """

    host: str = "127.0.0.1"
    first_port: int = Field(default=0, ge=0, le=65_535)
    top_adapters: int = Field(default=100, ge=1)


class LogConfig(_StrictModel):
    """Serve's log of the gateways.

    Attributes:
        requests: requests that are logged, with one line each.
    """

    requests: Requests = "refused"


class TextConfig(_StrictModel):
    """The answers of chats.

    Attributes:
        tool_format: form in which the base model writes calls of tools; None for the one of its chat template.
        separate_reasoning: whether reasoning is apart from the content, as reasoning_content, in answers to requests
            that do not say it.
    """

    tool_format: Literal["hermes", "llama3_json", "mistral"] | None = None
    separate_reasoning: bool = False


class SourcesConfig(_StrictModel):
    """Remote adapters: `s3://`, `gs://`, `hf://`, `https://`. fsspec finds the credentials.

    Attributes:
        allowed: prefixes of the URLs that adapters may be loaded from by name, such as s3://models/.
        cache_dir: folder on each node for downloaded adapters.
        cache_bytes: size of all downloaded adapters. The least recently used ones are deleted.
        max_adapter_bytes: size of one adapter. Larger ones are refused.
    """

    allowed: tuple[str, ...] = ()
    cache_dir: Path = Path(tempfile.gettempdir()) / f"ranklet-sources-{os.getuid()}"
    cache_bytes: int = Field(default=64 << 30, ge=0)
    max_adapter_bytes: int = Field(default=4 << 30, ge=1)


class SecurityConfig(_StrictModel):
    """Access to the service.

    Attributes:
        keys_file: file of API keys. Without one, every client may infer.
        open_admin: without a keys file, lets every client load and unload adapters. `ranklet up` turns it on if it is
            not set and HTTP listens on loopback.
        adapter_roots: folders that adapters may be loaded from by name, besides adapters_dir.
        allowed_origins: origins such as https://app.example.com whose pages may use the API (CORS); `*` allows any.
        host_names: host names of this service, where HTTP listens on loopback only. Requests to other names than these,
            localhost and IP addresses are refused.
        open_ray: lets gateways and replicas start although Ray's token is off, so that everyone who can connect to a
            node can run code on it.
    """

    keys_file: Path | None = None
    open_admin: bool | None = None
    adapter_roots: tuple[Path, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    open_ray: bool = False

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"expected origins such as https://app.example.com:8443, or *; got {origin!r}")
        return origins


class AdapterList(_StrictModel):
    """Folders of adapters by name: `user_config` of the replicas, which load them when they start."""

    adapters: dict[str, Path] = Field(default_factory=dict)

    @field_validator("adapters", mode="before")
    @classmethod
    def _map_or_list(cls, value: Any) -> Any:
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
                    raise ValueError(f"{name}: expected a folder, got {path}. Load remote adapters by name")
            value = {normal_name(name) if isinstance(name, str) else name: path for name, path in value.items()}
        return value


class GatewayUserConfig(AdapterList):
    """`user_config` of the gateways: settings that change without a restart.

    Attributes:
        tokens_per_minute: quotas by pattern of model names, such as `free-*`. Further requests get 429.
    """

    tokens_per_minute: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)

    @field_validator("tokens_per_minute", mode="before")
    @classmethod
    def _numbers_only(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for pattern, tokens in value.items():
                if isinstance(tokens, bool):  # pydantic takes true for 1
                    raise ValueError(f"{pattern}: expected a number of at least 1, got {str(tokens).lower()}")
        return {} if value is None else value


class AppArgs(AdapterList):
    """Arguments of `ranklet.cluster.app:build`. Relative paths start at the folder that `ranklet up` or
    `ranklet deploy` runs in, with `serve deploy` at the one that Ray was started in.

    Attributes:
        engine: fields of EngineConfig.
        adapters_dir: each subfolder is an adapter with the subfolder's name, loaded at its first request.
        adapters: further adapters, by name.

    Raises:
        ValidationError: a key is unknown, or a value has the wrong type or is out of range.
    """

    base: BaseConfig
    engine: dict[str, Any] = Field(default_factory=dict)
    adapters_dir: Path | None = None
    limits: LimitsConfig = LimitsConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()
    sources: SourcesConfig = SourcesConfig()
    security: SecurityConfig = SecurityConfig()
    text: TextConfig = TextConfig()

    @field_validator("engine")
    @classmethod
    def _engine_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(EngineConfig)}
        for name, setting in _SET_ELSEWHERE.items():
            if name in values:
                raise ValueError(f"{name} is set as {setting}")
            del types[name]
        _check_keys(values, types)
        checked = {}
        for name, value in values.items():
            try:
                checked[name] = TypeAdapter(types[name]).validate_python(value)
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg']}, got {value!r}") from None
        return checked

    @model_validator(mode="after")
    def _engine_ranges(self) -> Self:
        self.engine_config()  # EngineConfig checks its own values
        return self

    def engine_config(self) -> EngineConfig:
        """Return the settings of each engine. An adapter may name its base model by any name that requests may use."""
        fields = dict(self.engine)
        fields["base_aliases"] = (*fields.get("base_aliases", ()), *self.base_names)
        if fields.get("max_wait_s") is None:
            fields["max_wait_s"] = self.limits.request_timeout_s
        return EngineConfig(model_dir=self.base.model_dir, adapter_roots=self.adapter_roots, **fields)

    @property
    def adapter_roots(self) -> tuple[Path, ...]:
        """Folders that adapters may be loaded from by name, and that links in an adapter's folder may lead to."""
        return tuple(root for root in (self.adapters_dir, *self.security.adapter_roots) if root is not None)

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names that requests may use for the base model. Answers contain the first one."""
        return (self.base.name or normal_name(self.base.model_dir.resolve().name), *self.base.aliases)

    def resolved(self) -> "AppArgs":
        """Return a copy whose paths are absolute, so that they are valid in every process."""
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
