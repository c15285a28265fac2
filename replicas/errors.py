"""Everything ranklet can refuse, as one tree; `cluster/gateway.py` maps it to HTTP in one table.

RankletError
├── InvalidRequest      the caller's input is wrong                    400 invalid_request_error
├── UnknownModel        no such base or adapter                        404 model_not_found
├── InvalidAdapter      an adapter folder cannot be served as asked    400 invalid_adapter
├── AdapterNotFound     a registered adapter's folder is gone          404 adapter_not_found
├── Saturated           too much waits already; come back later        503 saturated
├── Unavailable         nothing here can answer now (dying, draining)  503 unavailable
├── StillLoading        the adapter's files take longer than the wait  503 adapter_loading
│   └── AdapterChanged  they change meanwhile; look at them again
├── ModelError          the base model folder cannot be served         (start-up only)
└── InternalError       a defect of ranklet, or the device failed      500 internal_error
"""

from collections.abc import Sequence
from typing import Any


class RankletError(Exception):
    """Base of every refusal. `message` says what was expected, what came, and the remedy."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, vars(self))


def _again(kind: type[RankletError], args: tuple[Any, ...], state: dict[str, Any]) -> RankletError:
    """A refusal from another process, whatever its own arguments were."""
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class InvalidRequest(RankletError):
    """The request itself is wrong; `param` names the field."""

    code = "invalid_request_error"


class UnknownModel(RankletError):
    """`model` names neither the base model nor an adapter."""

    code = "model_not_found"


class InvalidAdapter(RankletError):
    """An adapter folder was refused; `findings` lists every reason, not the first alone."""

    code = "invalid_adapter"

    def __init__(self, name: str, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        listed = "\n".join(f"- {finding}" for finding in self.findings)
        super().__init__(f"adapter {name!r} cannot be served:\n{listed}", param="model")


class AdapterNotFound(RankletError):
    """The folder of a known adapter does not exist (any more)."""

    code = "adapter_not_found"


class Saturated(RankletError):
    """Admission refused the request; `retry_after_s` is the expected wait."""

    code = "saturated"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(RankletError):
    """No engine can answer now; the same request may succeed shortly, or elsewhere."""

    code = "unavailable"


class StillLoading(RankletError):
    """The adapter is on its way and takes longer than a request may wait; the load goes on."""

    code = "adapter_loading"


class AdapterChanged(StillLoading):
    """The adapter's files are not those of the revision that was asked for any more, or change while they are read."""


class ModelError(RankletError):
    """The base model folder is missing, incomplete or of an unsupported architecture."""

    code = "model_error"


class InternalError(RankletError):
    """A defect of ranklet or a device failure; only the batch it hit is lost."""
