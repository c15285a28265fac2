"""Tags within texts that arrive in pieces."""


def overlap(text: str, tag: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a tag, but not the whole tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
