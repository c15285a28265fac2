"""Dynamic threshold of a shared limit (Choudhury and Hahne, 1998): how much of it one flow may hold."""

_ALPHA = 4  # a flow may hold this many times the space that is left free


def fair_share(limit: int, held_by_others: int) -> int:
    """Return how much of `limit` one flow may hold: four fifths of what the others leave free.

    A new flow always finds space: N flows that each hold their maximum hold 4N / (4N + 1) of the limit together.
    """
    return max(0, limit - held_by_others) * _ALPHA // (_ALPHA + 1)
