"""Who may do what: API keys in a file, by their hashes, read again when it changes."""

import fnmatch
import hashlib
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ranklet.replicas.errors import InternalError, RankletError

_LOOK_S = 1.0  # between two looks for a changed file
_PREFIX = "rk-"


class Unauthorized(RankletError):  # noqa: N818  # named as its siblings in replicas/errors.py
    """No key, or one that is not known."""

    code, status = "unauthorized", 401


class Forbidden(RankletError):  # noqa: N818
    """The key may not do this."""

    code, status = "forbidden", 403


class ApiKey(BaseModel):
    """One entry of the file.

    Attributes:
        name: for people; it appears in refusals, the key itself nowhere.
        sha256: of the key, in hexadecimal.
        admin: whether it may load and unload adapters, and use all of them.
        adapters: patterns (`legal-*`) of names that requests may use; the base model's own names count too.
        tokens_per_minute: of prompts, over all gateways; None for no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    admin: bool = False
    adapters: tuple[str, ...] = ()
    tokens_per_minute: int | None = Field(default=None, ge=1)

    def may_use(self, name: str) -> bool:
        return self.admin or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.adapters)


class ApiKeys:
    """The keys of one file. Without a file every request may infer, and `open_admin` says whether it may do the rest.

    Raises:
        InternalError: the file is missing or wrong when this is made. Later the last good content stays in force.
    """

    def __init__(self, path: Path | None, *, open_admin: bool = False) -> None:
        self._path = path
        self._open_admin = open_admin
        self._seen: tuple[int, int] | None = None
        self._looked_s = float("-inf")
        self._by_hash: dict[str, ApiKey] = {}
        self.wrong = ""  # why a changed file is not in force
        if path is not None:
            self._refresh(first=True)

    def authenticate(self, headers: Mapping[str, str]) -> ApiKey | None:
        """The key of a request; None where none is needed.

        Raises:
            Unauthorized: it has none, or one that is not known.
        """
        if self._path is None:
            return None
        self._refresh()
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            raise Unauthorized(
                "authorization: expected `Bearer KEY`, got none. Ask whoever runs this service for a key"
            )
        key = self._by_hash.get(hashlib.sha256(given.encode()).hexdigest())
        if key is None:
            raise Unauthorized("authorization: expected a key of this service, got one that is not known")
        return key

    def require_admin(self, headers: Mapping[str, str]) -> None:
        """Raises Unauthorized or Forbidden unless the request may change adapters."""
        key = self.authenticate(headers)
        if key is None and not self._open_admin:
            raise Unauthorized(
                "expected an admin's key: this service is reachable from other machines and has no keys. Set "
                "security.keys_file, or bind http_options.host to 127.0.0.1"
            )
        if key is not None and not key.admin:
            raise Forbidden(f"key {key.name!r}: expected one with admin: true for this call")

    @staticmethod
    def authorize(key: ApiKey | None, name: str) -> None:
        """Raises Forbidden unless the key may use the adapter or base of this name."""
        if key is not None and not key.may_use(name):
            raise Forbidden(
                f"key {key.name!r}: may use {', '.join(key.adapters) or 'nothing'}; got {name!r}", param="model"
            )

    def _refresh(self, *, first: bool = False) -> None:
        assert self._path is not None
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        try:
            status = self._path.stat()
            if (seen := (status.st_size, status.st_mtime_ns)) != self._seen:
                self._by_hash = _read(self._path)
                self._seen, self.wrong = seen, ""
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.wrong = (
                f"security.keys_file {self._path}: expected keys as `ranklet keys new` prints them, got: {error}"
            )
            if first:
                raise InternalError(self.wrong) from error


def _read(path: Path) -> dict[str, ApiKey]:
    content: Any = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or set(content) != {"keys"} or not isinstance(content["keys"], list):
        raise ValueError("expected a map with one entry, `keys`, a list")
    try:
        keys = [ApiKey.model_validate(entry) for entry in content["keys"]]
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return {key.sha256: key for key in keys}


def new_key(
    name: str, *, admin: bool, adapters: tuple[str, ...], tokens_per_minute: int | None = None
) -> tuple[str, ApiKey]:
    """A key that has never been, and its entry for the file."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    entry = ApiKey(name=name, sha256=digest, admin=admin, adapters=adapters, tokens_per_minute=tokens_per_minute)
    return secret, entry
