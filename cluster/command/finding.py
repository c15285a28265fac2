"""One result of `ranklet doctor`."""

from dataclasses import dataclass
from typing import Literal

FindingState = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The state of one checked subject. `remedy` is empty when the state is "ok"."""

    state: FindingState
    subject: str
    value: str
    remedy: str = ""
