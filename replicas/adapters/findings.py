"""Findings of a verification. A check is a generator: it yields findings and returns the value that it checked."""

from collections.abc import Collection, Generator
from typing import Any, TypeVar

from ranklet.replicas.adapters.limits import MAX_FINDING_CHARS, MAX_FINDINGS, MAX_FINDINGS_CHARS, MAX_SHOWN_CHARS
from ranklet.replicas.escape import escape

T = TypeVar("T")
Checked = Generator[str, None, T]

_MAX_LISTED = 12


def collect(check: Checked[T]) -> tuple[T | None, list[str]]:
    """Run a check. Returns its value and its findings. After too many, the check is abandoned without a value."""
    findings: list[str] = []
    while len(findings) < MAX_FINDINGS and sum(map(len, findings)) < MAX_FINDINGS_CHARS:
        try:
            findings.append(escape(shorten(next(check), MAX_FINDING_CHARS)))
        except StopIteration as end:
            return end.value, findings
    return None, [*findings, f"{len(findings)} findings are listed; there may be more"]


def shorten(text: str, most_chars: int = MAX_SHOWN_CHARS) -> str:
    return text if len(text) <= most_chars else f"{text[: most_chars - 3]}..."


def show(value: Any) -> str:
    return shorten(repr(value))


def join(names: Collection[str]) -> str:
    """List the first 12 names in alphabetical order, and the number of the others."""
    listed = ", ".join(shorten(name) for name in sorted(names)[:_MAX_LISTED])
    return listed if len(names) <= _MAX_LISTED else f"{listed}, ... ({len(names) - _MAX_LISTED} more)"
