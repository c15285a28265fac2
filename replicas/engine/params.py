"""Parameters of a request beside its prompts: one frozen class a task. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EmbedParams:
    """Parameters of an embedding request.

    Attributes:
        dimensions: leading values to keep of each vector; None keeps all.
    """

    dimensions: int | None = None
