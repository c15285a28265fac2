"""What a gateway tells its router of a call, beside the call itself."""

from dataclasses import dataclass

HINT = "hint"  # the keyword argument of a call that carries it


@dataclass(frozen=True)
class RoutingHint:
    """One attempt at a call.

    Attributes:
        id: unique in this process.
        adapter: its name, None for the base model.
        tokens: of its prompts; 0 for what is no work, such as an order to load.
        avoid: id of the replica that has just failed the call.
        only: id of the replica that it is for; any other serves it where that one has gone.
    """

    id: int
    adapter: str | None = None
    tokens: int = 0
    avoid: str | None = None
    only: str | None = None
