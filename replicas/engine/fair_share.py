"""How a room that all share stays open to those who come late."""

_ALPHA = 4  # what one may hold, in what is left free


def share_of_room(limit: int, others: int) -> int:
    """How much one flow may hold of `limit` while others hold `others`: four fifths of what they leave.

    Some room is always free for a newcomer: N flows that each take all they may hold 4N / (4N + 1) of it. These are the
    dynamic thresholds of switches (Choudhury, Hahne 1998).
    """
    return max(0, limit - others) * _ALPHA // (_ALPHA + 1)
