"""Compares tokenizers: `python -m ranklet.replicas.adapters.tokenizer_process BASE ADAPTER MEMORY_BYTES`.

Parsing the files of a large tokenizer holds the interpreter for half a second, in which a replica would answer nothing
and an engine would launch nothing. The files come with an adapter, so this process of its own has limits. Files that
need no parsing are compared by a process that keeps the base model's tokenizer (`tokenizer_worker`).
"""

import contextlib
import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ranklet.replicas.adapters.tokenizer_check import BaseTokenizer, ComparedTokenizer
from ranklet.replicas.bounded_process import BoundedProcess, child_environment, limit_this_process
from ranklet.replicas.errors import InternalError, Unavailable
from ranklet.replicas.model.added_tokens import AddedToken
from ranklet.replicas.model.tokenizer_files import (
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    UnusableTokenError,
    read_within_bounds,
)

_PROGRAM = "ranklet.replicas.adapters.tokenizer_process"
_MEMORY_BYTES = 16 << 30  # of address space; libraries that are never used take some of it
_SIMILAR_S = 10.0
_MAX_REPLY_BYTES = 4 << 20
_MAX_KEPT = 256


class TokenizerComparison:
    """Compares adapters' tokenizer files with those of the base model. Thread-safe.

    Adapters of one training tool often have the same files, so results are kept by the files' content.

    Args:
        base: folder of the base model.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._process = BoundedProcess(
            "ranklet.replicas.adapters.tokenizer_worker", "compares tokenizers", time_s=_SIMILAR_S, grace_s=0.0,
            memory_bytes=_MEMORY_BYTES, max_reply_bytes=_MAX_REPLY_BYTES,
        )  # fmt: skip
        self._kept: dict[bytes, ComparedTokenizer] = {}

    def compare(self, adapter: Path) -> ComparedTokenizer:
        """Return `BaseTokenizer(base).compare(adapter)`. Blocks.

        Raises:
            Unavailable: it takes too much time.
        """
        try:
            content = _digest(adapter)
        except (OSError, UnusableTokenError) as error:
            return ComparedTokenizer((str(error),))
        if content is None or content == self._own:
            return ComparedTokenizer()
        found = self._kept.get(content)
        if found is None:
            found = self._compare_similar(adapter, content) or compare_within(self._base, adapter)
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[content] = found
        return found

    def _compare_similar(self, adapter: Path, content: bytes) -> ComparedTokenizer | None:
        """Return the result for files that need no parsing; None for others."""
        if not (adapter / TOKENIZER_FILE).is_file():
            return None
        question = {"base": str(self._base), "adapter": str(adapter)}
        try:
            compared = self._process.ask(content.hex(), json.dumps(question).encode()).get("compared")
        except InternalError:  # the process does not start
            return None
        return None if compared is None else _restored(compared)

    @cached_property
    def _own(self) -> bytes | None:
        with contextlib.suppress(OSError, UnusableTokenError):
            return _digest(self._base)
        return None


def _digest(folder: Path) -> bytes | None:
    """Return a hash of a folder's tokenizer files; None if there are none."""
    contents = {name: read_within_bounds(folder / name) for name in TOKENIZER_FILES}
    parts = [name.encode() + hashlib.sha256(each).digest() for name, each in contents.items() if each is not None]
    return hashlib.sha256(b"".join(parts)).digest() if parts else None


def compare_within(
    base: Path, adapter: Path, time_s: float = 30.0, memory_bytes: int = _MEMORY_BYTES
) -> ComparedTokenizer:
    """Return `BaseTokenizer(base).compare(adapter)`, or that the process ended early.

    Raises:
        Unavailable: it takes too much time, perhaps since the machine is busy.
    """
    command = [sys.executable, "-m", _PROGRAM, str(base), str(adapter), str(memory_bytes)]
    try:
        done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, check=True, timeout=time_s)
        return _restored(json.loads(done.stdout))
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"comparing the adapter's tokenizer with the base model's takes {time_s:g} s") from error
    except (subprocess.CalledProcessError, ValueError):
        return ComparedTokenizer(
            ("the tokenizer's files: expected files that can be compared with the base model's, got others",)
        )


def _restored(answer: dict[str, Any]) -> ComparedTokenizer:
    return ComparedTokenizer(tuple(answer["findings"]), tuple(AddedToken(**each) for each in answer["added"]))


def main() -> None:
    base, adapter, memory_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    limit_this_process(memory_bytes)
    json.dump(asdict(BaseTokenizer(base).compare(adapter)), sys.stdout)


if __name__ == "__main__":
    main()
