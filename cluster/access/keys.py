"""API keys: a file lists their hashes and rights and is read again when it changes."""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ranklet.cluster.names import matches
from ranklet.cluster.watched_file import WatchedFile
from ranklet.replicas.errors import InternalError, RankletError

_CHECK_INTERVAL_S = 1.0
_PREFIX = "rk-"


class Unauthorized(RankletError):  # noqa: N818  # named as its siblings in replicas/errors.py
    """The request has no key, or an unknown one."""

    code, status = "unauthorized", 401


class Forbidden(RankletError):  # noqa: N818
    """The key does not grant this right."""

    code, status = "forbidden", 403


class ApiKey(BaseModel):
    """One entry of the file.

    Attributes:
        name: shown in error messages instead of the key.
        sha256: hash of the key, in hexadecimal.
        admin: grants the right to load and unload adapters, and to use all models.
        adapters: patterns such as `legal-*` for the models that requests may use, the base model included; see
            `ranklet.cluster.names`.
        tokens_per_minute: quota of prompt tokens over all gateways; None for no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    admin: bool = False
    adapters: tuple[str, ...] = ()
    tokens_per_minute: int | None = Field(default=None, ge=1)

    def may_use(self, *names: str) -> bool:
        """Return whether requests may use the model that has these names."""
        return self.admin or any(matches(pattern, names) for pattern in self.adapters)


class ApiKeys:
    """Authenticates requests by the keys of a file.

    After a faulty change of the file, its last good content stays in force.

    Args:
        path: None lets every request infer without a key.
        open_admin: without a file, lets every request change adapters too.
        clock: monotonic, in seconds.

    Raises:
        InternalError: the file is missing or faulty.
    """

    def __init__(
        self, path: Path | None, *, open_admin: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = WatchedFile(path, _read, InternalError, _CHECK_INTERVAL_S, clock) if path is not None else None
        self._open_admin = open_admin

    def authenticate(self, headers: Mapping[str, str]) -> ApiKey | None:
        """Return the key of a request, or None if the service has no keys. Raises Unauthorized."""
        if self._file is None:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            raise Unauthorized(
                "authorization: expected `Bearer KEY`, got none. Ask whoever runs this service for a key"
            )
        key = self._file.content().get(hashlib.sha256(given.encode()).hexdigest())
        if key is None:
            raise Unauthorized("authorization: expected a key of this service, got an unknown one")
        return key

    def require_admin(self, headers: Mapping[str, str]) -> None:
        """Raise Unauthorized or Forbidden unless the request may change adapters."""
        key = self.authenticate(headers)
        if key is None and not self._open_admin:
            raise Unauthorized(
                "expected an admin's key, but this service has no keys. Set security.keys_file, or set "
                "security.open_admin: true if only trusted clients can reach the service"
            )
        if key is not None and not key.admin:
            raise Forbidden(f"key {key.name!r}: expected one with admin: true for this call")

    @staticmethod
    def authorize(key: ApiKey | None, *names: str) -> None:
        """Raise Forbidden unless the key may use the model that has these names."""
        if key is not None and not key.may_use(*names):
            raise Forbidden(
                f"key {key.name!r}: may use {', '.join(key.adapters) or 'nothing'}; got {names[0]!r}", param="model"
            )


def _read(path: Path) -> dict[str, ApiKey]:
    try:
        return _parse(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InternalError(
            f"security.keys_file {path}: expected keys as `ranklet keys new` prints them, got: {error}"
        ) from error


def _parse(content: Any) -> dict[str, ApiKey]:
    if not isinstance(content, dict) or set(content) != {"keys"} or not isinstance(content["keys"], list):
        raise ValueError("expected a map whose only entry `keys` is a list")
    try:
        keys = [ApiKey.model_validate(entry) for entry in content["keys"]]
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return {key.sha256: key for key in keys}


def new_key(
    name: str, *, admin: bool, adapters: tuple[str, ...], tokens_per_minute: int | None = None
) -> tuple[str, ApiKey]:
    """Return a new random key and its entry for the file."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    entry = ApiKey(name=name, sha256=digest, admin=admin, adapters=adapters, tokens_per_minute=tokens_per_minute)
    return secret, entry
