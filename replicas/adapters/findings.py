"""Findings of a verification. A check is a generator: it yields findings and returns the value that it checked."""

from collections.abc import Collection, Generator
from typing import Any, TypeVar

T = TypeVar("T")
Checked = Generator[str, None, T]

MAX_SHOWN_CHARS = 100  # of one value that comes from an adapter's files
_MAX_FINDINGS = 100
_MAX_LISTED = 12


def collect(check: Checked[T]) -> tuple[T | None, list[str]]:
    """Run a check. Returns its value and its findings; after 100 findings the check is abandoned without a value."""
    findings: list[str] = []
    while len(findings) < _MAX_FINDINGS:
        try:
            findings.append(_printable(next(check)))
        except StopIteration as end:
            return end.value, findings
    return None, [*findings, f"{_MAX_FINDINGS} findings are listed; there may be more"]


def _printable(finding: str) -> str:
    """Escape control characters: names in an adapter's files may contain any."""
    return finding if finding.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in finding)


def shorten(text: str) -> str:
    """The text, cut to 100 characters."""
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def show(value: Any) -> str:
    """The value's repr, cut to 100 characters."""
    return shorten(repr(value))


def join(names: Collection[str]) -> str:
    """The first 12 names in alphabetical order, each cut to 100 characters, and the number of the others."""
    listed = ", ".join(shorten(name) for name in sorted(names)[:_MAX_LISTED])
    return listed if len(names) <= _MAX_LISTED else f"{listed}, ... ({len(names) - _MAX_LISTED} more)"
