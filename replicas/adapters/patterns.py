"""Matches the patterns of an adapter's config against module names, under limits of time and memory.

A pattern is a regular expression from an untrusted file: it may backtrack for ever with the GIL held. So each adapter's
patterns are matched in a process of their own, which takes about 30 ms; equal patterns are matched once.
"""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ranklet.replicas.errors import InternalError

# The patterns of a usual adapter need less than 10 ms, one pattern for each of 700 modules 150 ms.
CPU_LIMIT_S = 0.5
TIMEOUT_S = 30.0  # of wall clock, generous because the machine may be busy
_MEMORY_LIMIT_BYTES = 512 << 20
PROGRAM = Path(__file__).with_name("pattern_process.py")
_CACHED_RESULTS = 64


class Pattern(NamedTuple):
    """A pattern and the field of `adapter_config.json` that contains it; the field decides how PEFT matches it."""

    field: str
    text: str


class PatternMatch(NamedTuple):
    """The first pattern of a field that matches a name; `layer` is the layer's number for a `layers_pattern`."""

    text: str
    layer: int


@dataclass(frozen=True)
class PatternMatches:
    """Results for the patterns of one adapter.

    Attributes:
        found: matches by field and name.
        errors: reason for each pattern that cannot be used; patterns after one that needs too much time are not tried.
    """

    found: dict[str, dict[str, PatternMatch]] = field(default_factory=dict)
    errors: dict[Pattern, str] = field(default_factory=dict)


@lru_cache(_CACHED_RESULTS)
def match_patterns(patterns: tuple[Pattern, ...], names: tuple[str, ...]) -> PatternMatches:
    """Match patterns against the full names of modules.

    Raises:
        InternalError: the process failed for a reason that is not in the patterns.
    """
    matches = PatternMatches()
    if not patterns:
        return matches
    replies, over_limit = _run(json.dumps({"names": names, "patterns": patterns}).encode())
    for pattern, reply in zip(patterns, replies, strict=not over_limit):
        if "error" in reply:
            matches.errors[pattern] = reply["error"]
        for index, layer in reply.get("found", ()):
            matches.found.setdefault(pattern.field, {})[names[index]] = PatternMatch(pattern.text, layer)
    if over_limit:
        matches.errors[patterns[len(replies)]] = (
            f"expected to be matched within {CPU_LIMIT_S:g} s of CPU time; use plain names"
        )
    return matches


def _run(request: bytes) -> tuple[list[dict[str, Any]], bool]:
    """Run the process. Returns its replies, and whether it reached the CPU limit before it wrote the last one."""
    command = [sys.executable, "-I", str(PROGRAM), str(CPU_LIMIT_S), str(_MEMORY_LIMIT_BYTES)]
    try:
        ended = subprocess.run(
            command, input=request, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InternalError(f"patterns: expected a result within {TIMEOUT_S:g} s; the machine is too busy") from error
    if ended.returncode not in (0, -signal.SIGPROF):
        raise InternalError(f"patterns: expected a result, the process that matches them ended with {ended.returncode}")
    lines = [line for line in ended.stdout.splitlines(keepends=True) if line.endswith(b"\n")]
    return [json.loads(line) for line in lines], ended.returncode != 0
