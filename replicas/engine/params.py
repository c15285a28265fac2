"""Parameters of requests, one class for each kind of task. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EmbedParams:
    dimensions: int | None = None  # leading values to keep of each vector; None keeps all
