"""Findings of a verification. A check is a generator: it yields findings and returns the value that it checked."""

from collections.abc import Collection, Generator
from typing import Any, TypeVar

from ranklet.replicas.escape import escape

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
            findings.append(escape(next(check)))
        except StopIteration as end:
            return end.value, findings
    return None, [*findings, f"{_MAX_FINDINGS} findings are listed; there may be more"]


def shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def show(value: Any) -> str:
    return shorten(repr(value))


def join(names: Collection[str]) -> str:
    """List the first 12 names in alphabetical order, and the number of the others."""
    listed = ", ".join(shorten(name) for name in sorted(names)[:_MAX_LISTED])
    return listed if len(names) <= _MAX_LISTED else f"{listed}, ... ({len(names) - _MAX_LISTED} more)"
