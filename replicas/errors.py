"""All errors that ranklet reports to clients, as one tree. Each class has an error code and an HTTP status.

RankletError
├── InvalidRequest          the request is malformed or out of range           400 invalid_request_error
├── UnknownModel            no base model or adapter has this name             404 model_not_found
├── InvalidAdapter          an adapter folder cannot be served                 400 invalid_adapter
├── AdapterNotFound         the folder of a registered adapter does not exist  404 adapter_not_found
├── Saturated               too many requests are waiting                      503 saturated
├── Unavailable             no replica can answer now                          503 unavailable
├── StillLoading            loading the adapter exceeds the time limit         503 adapter_loading
│   └── AdapterChanged      the adapter's files changed during the load        503 adapter_loading
├── AdapterLoadCrashed      the engine process died while it loaded the adapter  503 adapter_load_crashed
├── ModelError              the base model folder cannot be served             500 model_error (only at start-up)
└── InternalError           a defect of ranklet, or the device failed          500 internal_error

Other packages subclass `RankletError` next to the code that raises their errors: cluster/access/keys.py (Unauthorized,
Forbidden), cluster/access/quota.py (OverQuota), cluster/catalog/overrides.py (FolderNotWritable), cluster/message.py
(OtherPrompts),
cluster/ingress/lifecycle.py (AdapterExists), cluster/ingress/body.py (BodyTooLarge, BodyTooSlow, UnsupportedEncoding),
cluster/ingress/refusals.py (PathNotFound, MethodNotAllowed), cluster/ingress/browsers.py (ForeignPage, ForeignHost,
WrongContentType).
"""

from collections.abc import Sequence
from typing import Any

from ranklet.replicas.escape import escape

MAX_MESSAGE_CHARS = 16_000  # of all findings of an adapter, see `limits`
_BY_CODE: "dict[str, type[RankletError]]" = {}


class RankletError(Exception):
    """Base class of all reported errors.

    A subclass that sets `code` is registered under it. A subclass that does not shares the code of its parent.

    Attributes:
        code: error code in HTTP answers and between processes.
        status: HTTP status.
        message: states the expected value, the value received and the remedy.
        param: the field of the request that caused the error, if any.
        retry_after_s: when the client should try again, for statuses 429 and 503.

    Raises:
        TypeError: at class creation, if another class has the same code.
    """

    code: str = "internal_error"
    status: int = 500

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        if len(message) > MAX_MESSAGE_CHARS:  # it may quote what clients or adapters' files say
            message = f"{message[:MAX_MESSAGE_CHARS]}... ({len(message)} characters)"
        message = escape(message, keep="\n")
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        code = cls.__dict__.get("code")
        if code is None:
            return
        known = _BY_CODE.setdefault(code, cls)
        # A worker process may import a module again, so classes are compared by name and not by identity.
        if known.__qualname__ != cls.__qualname__:
            raise TypeError(f"{cls.__qualname__}: expected a unique error code, {known.__qualname__} has {code!r} too")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, vars(self))


def error_class(code: str) -> type[RankletError]:
    """Return the class registered under `code`; `InternalError` for an unknown code."""
    return _BY_CODE.get(code, InternalError)


def _restore(kind: type[RankletError], args: tuple[Any, ...], state: dict[str, Any]) -> RankletError:
    # Exception's own unpickling would call __init__ with `args`, which subclasses do not accept.
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class InvalidRequest(RankletError):
    code, status = "invalid_request_error", 400


class UnknownModel(RankletError):
    code, status = "model_not_found", 404


class InvalidAdapter(RankletError):
    """An adapter folder cannot be served; `findings` lists every reason."""

    code, status = "invalid_adapter", 400

    def __init__(self, name: str, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        listed = "\n".join(f"- {finding}" for finding in self.findings)
        super().__init__(f"adapter {name!r} cannot be served:\n{listed}", param="model")


class AdapterNotFound(RankletError):
    code, status = "adapter_not_found", 404


class Saturated(RankletError):
    code, status = "saturated", 503


class Unavailable(RankletError):
    """No replica can answer now. The same request may succeed shortly, or on another replica."""

    code, status = "unavailable", 503


class StillLoading(RankletError):
    """The load continues; only the request has waited for too long."""

    code, status = "adapter_loading", 503


class AdapterChanged(StillLoading):
    """The adapter's files no longer belong to the requested revision, or changed during the load."""


class AdapterLoadCrashed(RankletError):
    """The engine process died while it loaded the adapter.

    The request must not be repeated on another replica, since the adapter may kill that engine as well.
    """

    code, status = "adapter_load_crashed", 503


class ModelError(RankletError):
    code = "model_error"


class InternalError(RankletError):
    code = "internal_error"
