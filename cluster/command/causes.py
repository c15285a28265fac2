"""Finds the sentence that matters in what Ray writes when something fails."""

import re

_EXCEPTION = re.compile(
    r"^(?:ray::\S+ )?((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|Unavailable|NotFound))\b:? ?(.*)"
)
_MAX_CHARACTERS = 2000


def last_cause(text: str) -> str:
    """Return the message of the last exception in a text with tracebacks, or else its last line."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    for index in range(len(lines) - 1, -1, -1):
        found = _EXCEPTION.match(lines[index])
        if found is None:
            continue
        message = "\n".join([found[2], *_until_frames(lines[index + 1 :])]).strip()
        return (message or found[1])[:_MAX_CHARACTERS]
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_MAX_CHARACTERS]


def _until_frames(lines: list[str]) -> list[str]:
    kept = []
    for line in lines:
        if not line or line.startswith(("Traceback ", "During handling", "The above exception")):
            break
        kept.append(line)
    return kept
