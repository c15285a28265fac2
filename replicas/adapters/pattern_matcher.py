"""Matches the patterns of adapters' configs without trusting them."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from threading import Lock
from time import monotonic
from typing import Any

from ranklet.replicas.adapters.patterns import Pattern, PatternMatches, PlainPattern, match_plain

_PROGRAM = Path(__file__).with_name("pattern_process.py")
_MEMORY_LIMIT_BYTES = 512 << 20
_CACHED_REPLIES = 256
_CACHED_BYTES = 1 << 16  # longer replies are not cached
_CHUNK_BYTES = 1 << 16
_OVER_CPU_LIMIT = -signal.SIGPROF  # exit status of a helper that reached its CPU limit


class PatternMatcher:
    """Matches plain patterns here and regular expressions in a helper process. Thread-safe.

    The helper starts with the first regular expression and then serves all adapters. It ends, and the next adapter gets
    a new one, when the patterns of one adapter need more CPU time than `cpu_limit_s`, or do not end within `timeout_s`.

    Args:
        cpu_limit_s: CPU time for the patterns of one adapter.
        timeout_s: limit of the wall clock, generous because the machine may be busy.
    """

    def __init__(self, cpu_limit_s: float = 1.0, timeout_s: float = 30.0) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self._replies: OrderedDict[bytes, list[dict[str, Any]]] = OrderedDict()

    def __enter__(self) -> "PatternMatcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The helper's process id, None while there is no helper."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the helper process; a later `match` starts another."""
        with self._lock:
            self._end()

    def match(self, patterns: Iterable[Pattern], names: Sequence[str]) -> PatternMatches:
        """Match every pattern against every name."""
        matches, plain, regexes = PatternMatches(), [], []
        for pattern in patterns:
            parsed = PlainPattern.parse(pattern)
            if parsed is None:
                regexes.append(pattern)
            else:
                plain.append(parsed)
        match_plain(plain, names, matches)
        if regexes:
            self._match_regexes(regexes, names, matches)
        return matches

    def _match_regexes(self, patterns: Sequence[Pattern], names: Sequence[str], matches: PatternMatches) -> None:
        question = {"names": names, "patterns": [(pattern.shape, pattern.regex) for pattern in patterns]}
        request = json.dumps(question).encode() + b"\n"
        replies = self._ask(request, len(patterns))
        for pattern, reply in zip(patterns, replies, strict=False):  # after an error, later patterns have no reply
            if "error" in reply:
                matches.errors[pattern] = reply["error"]
            for index, layer in reply.get("found", ()):
                matches.layers[pattern][names[index]] = layer

    def _ask(self, request: bytes, count: int) -> list[dict[str, Any]]:
        """Replies for each pattern; after the last one that was matched, an error and no further replies."""
        digest = hashlib.sha256(request).digest()
        with self._lock:
            if digest in self._replies:
                self._replies.move_to_end(digest)
                return self._replies[digest]
            deadline_s = monotonic() + self._timeout_s
            received, status = self._exchange(request, count, deadline_s)
            if status not in (0, _OVER_CPU_LIMIT) and monotonic() < deadline_s:  # killed by something else: try again
                received, status = self._exchange(request, count, deadline_s)
            replies = [json.loads(line) for line in received.splitlines(keepends=True) if line.endswith(b"\n")]
            if status:
                replies.append({"error": f"expected to be matched within {self._limit(status)}; use plain names"})
            if len(received) <= _CACHED_BYTES and status in (0, _OVER_CPU_LIMIT):
                self._replies[digest] = replies
                while len(self._replies) > _CACHED_REPLIES:
                    self._replies.popitem(last=False)
            return replies

    def _limit(self, status: int) -> str:
        if status == _OVER_CPU_LIMIT:
            return f"{self._cpu_limit_s:g} s of CPU time"
        return f"{self._timeout_s:g} s and {_MEMORY_LIMIT_BYTES >> 20} MiB"

    def _exchange(self, request: bytes, count: int, deadline_s: float) -> tuple[bytes, int]:
        """Send a request. Returns the reply, and the helper's exit status if it had to end before the last line."""
        received, lines = bytearray(), 0
        try:
            for chunk in _converse(self._started(), request, deadline_s):
                received += chunk
                lines += chunk.count(b"\n")
                if lines == count:
                    return bytes(received), 0
        except BrokenPipeError:
            pass
        finally:
            status = self._end() if lines < count else 0
        return bytes(received), status or 1

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            command = [sys.executable, "-I", str(_PROGRAM), str(self._cpu_limit_s), str(_MEMORY_LIMIT_BYTES)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
        return self._process

    def _end(self) -> int:
        """End the helper; returns its exit status, negative for a signal."""
        process, self._process = self._process, None
        if process is None:
            return 0
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.kill()
        return process.wait()


def _converse(process: subprocess.Popen[bytes], request: bytes, deadline_s: float) -> Iterator[bytes]:
    """Write a request and read the reply in chunks, until the process ends or the deadline passes."""
    assert process.stdin is not None
    assert process.stdout is not None
    rest = memoryview(request)
    with DefaultSelector() as selector:
        selector.register(process.stdin, EVENT_WRITE)
        selector.register(process.stdout, EVENT_READ)
        while ready := selector.select(max(0.0, deadline_s - monotonic())):
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    rest = rest[os.write(key.fd, rest[:_CHUNK_BYTES]) :]
                    if not rest:
                        selector.unregister(process.stdin)
                elif chunk := os.read(key.fd, _CHUNK_BYTES):
                    yield chunk
                else:
                    return
