"""One result of `ranklet doctor`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The state of one checked subject. `remedy` is empty when the state is "ok"."""

    state: Literal["ok", "warn", "fail"]
    subject: str
    value: str
    remedy: str = ""
