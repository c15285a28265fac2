"""API keys: a file lists their hashes and rights and is read again when it changes."""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ranklet.cluster.names import MAX_NAME_CHARACTERS, matches
from ranklet.cluster.settings.settings import Settings
from ranklet.replicas.errors import InternalError, RankletError

_CHECK_INTERVAL_S = 1.0
_PREFIX = "rk-"
_FORM = (
    "The file is a list of the entries that `ranklet keys new NAME` prints, such as "
    f"[{{name: ops, sha256: '{64 * '0'}', admin: true}}], by itself or as `keys`"
)
_EXPECTED = {
    "name": "a text",
    "sha256": "64 hexadecimal digits in quotes, the SHA-256 of the key",
    "admin": "true or false",
    "adapters": "a list of patterns such as 'legal-*'",
    "tokens_per_minute": "a whole number of at least 1",
}


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
        settings: gets the file as the setting "keys_file".
        clock: monotonic, in seconds.

    Raises:
        InternalError: the file is missing or faulty.
    """

    def __init__(
        self, path: Path | None, *, open_admin: bool = False, settings: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        settings = settings or Settings()
        self._file = None
        if path is not None:
            self._file = settings.file("keys_file", path, _read, InternalError, _CHECK_INTERVAL_S, clock)
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
            allowed, got = ", ".join(key.adapters) or "nothing", names[0][:MAX_NAME_CHARACTERS]
            raise Forbidden(f"key {key.name!r}: may use {allowed}; got {got!r}", param="model")


def _read(path: Path) -> dict[str, ApiKey]:
    """Parse the file. The message of an error contains nothing from it: a key may stand there in the wrong place."""
    try:
        return _parse(path.read_text())
    except (OSError, ValueError) as error:
        raise InternalError(f"security.keys_file {path}: {error}. {_FORM}") from error
    except RecursionError as error:
        raise InternalError(
            f"security.keys_file {path}: expected a list of entries, got deep nesting. {_FORM}"
        ) from error


def _parse(text: str) -> dict[str, ApiKey]:
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"line {line}: expected YAML, got: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError("expected YAML, got other characters") from error
    entries = content["keys"] if isinstance(content, dict) and set(content) == {"keys"} else content
    if not isinstance(entries, list) or not (entries or entries is not content):
        raise ValueError(f"expected a list of entries, got {_kind(content)}")
    keys: dict[str, ApiKey] = {}
    for number, entry in enumerate(entries, 1):
        try:
            key = ApiKey.model_validate(entry)
        except ValidationError as error:
            raise ValueError(f"entry {number}: {_fault(error)}") from error
        if key.sha256 in keys:
            raise ValueError(f"entry {number}: expected another key than that of {keys[key.sha256].name!r}")
        keys[key.sha256] = key
    return keys


def _kind(content: Any) -> str:
    if content in (None, []):
        return "an empty file"
    return "a map with other entries than `keys`" if isinstance(content, dict) else f"a {type(content).__name__}"


def _fault(error: ValidationError) -> str:
    first = error.errors()[0]
    field = next((str(part) for part in first["loc"] if part in ApiKey.model_fields), None)
    if field is None:
        return f"expected a map with {', '.join(ApiKey.model_fields)}, got something else"
    if first["type"] == "missing":
        return f"expected {field}, got none"
    return f"{field}: expected {_EXPECTED.get(field, 'another value')}, got something else"


def new_key(
    name: str, *, admin: bool, adapters: tuple[str, ...], tokens_per_minute: int | None = None
) -> tuple[str, ApiKey]:
    """Return a new random key and its entry for the file."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    entry = ApiKey(name=name, sha256=digest, admin=admin, adapters=adapters, tokens_per_minute=tokens_per_minute)
    return secret, entry
