"""Compares tokenizers: `python -m ranklet.replicas.adapters.tokenizer_process BASE ADAPTER MEMORY_BYTES`.

Parsing the files of a large tokenizer holds the interpreter for half a second, in which a replica would answer nothing
and an engine would launch nothing. The files come with an adapter, so this process of its own has limits. Files that
need no parsing are compared by a process that keeps the base model's tokenizer (`tokenizer_worker`).
"""

import contextlib
import json
import signal
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Event, Lock, Thread

from ranklet.replicas.adapters.content_hash import read_tokenizer_hash
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import check_unchanged
from ranklet.replicas.adapters.tokenizer_check import BaseTokenizer, ComparedTokenizer
from ranklet.replicas.bounded_process import BoundedProcess, child_environment, limit_this_process
from ranklet.replicas.errors import InternalError, Unavailable
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
_THREADS = 64  # as many as loads: files of a disk that hangs must not hold those of others
_ENDED_BY_OTHERS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)  # no files have this effect


class TokenizerComparison:
    """Compares adapters' tokenizer files with those of the base model. Thread-safe.

    Adapters of one training tool often have the same files, so results are kept by the files' content, and equal files
    are compared once.

    Args:
        base: folder of the base model.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._process = BoundedProcess(
            "ranklet.replicas.adapters.tokenizer_worker", "compares tokenizers", time_s=_SIMILAR_S, grace_s=0.0,
            memory_bytes=_MEMORY_BYTES, max_reply_bytes=_MAX_REPLY_BYTES,
        )  # fmt: skip
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ranklet-compare")
        self._lock = Lock()
        self._kept: OrderedDict[str, ComparedTokenizer] = OrderedDict()
        self._running: dict[str, Event] = {}  # set when the comparison has ended, perhaps with an error

    def prepare(self) -> None:
        """Start the process, which then reads the base model's files, on a thread of its own.

        The first comparison does not wait for it then.
        """
        if self._has_file:
            Thread(target=self._prepare, name="ranklet-tokenizers", daemon=True).start()

    def _prepare(self) -> None:
        if self._own is not None:
            self._ask(self._base, self._own)

    def begin(self, adapter: AdapterRef) -> "Future[ComparedTokenizer]":
        """Return a future of `compare`, which another thread completes if files must be read."""
        found = None if adapter.tokenizer is None else self._known(adapter.tokenizer)
        if found is None:
            return self._threads.submit(self.compare, adapter)
        future: Future[ComparedTokenizer] = Future()
        future.set_result(found)
        return future

    def compare(self, adapter: AdapterRef) -> ComparedTokenizer:
        """Return `BaseTokenizer(base).compare(folder)` for an adapter's folder. Blocks.

        Raises:
            AdapterChanged: the folder no longer has the files of the reference.
            Unavailable: it takes too much time.
        """
        content = adapter.tokenizer
        if content is None:
            try:
                content = read_tokenizer_hash(Path(adapter.path))
            except (OSError, UnusableTokenError) as error:
                return ComparedTokenizer((str(error),))
        while (found := self._known(content)) is None:
            with self._lock:
                running = self._running.get(content)
                if running is None:
                    own = self._running[content] = Event()
            if running is None:
                try:
                    self._keep(content, self._compared(adapter, content))
                finally:
                    with self._lock:
                        del self._running[content]
                    own.set()
            else:
                running.wait()
        return found

    def _known(self, content: str) -> ComparedTokenizer | None:
        """Return the result for files that need no comparison, or were compared."""
        if content in ("", self._own):
            return ComparedTokenizer()
        with self._lock:
            if content in self._kept:
                self._kept.move_to_end(content)
            return self._kept.get(content)

    def _keep(self, content: str, found: ComparedTokenizer) -> None:
        with self._lock:
            self._kept[content] = found
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)

    def _compared(self, adapter: AdapterRef, content: str) -> ComparedTokenizer:
        folder = Path(adapter.path)
        _wait_for_disk(folder)
        found, marks = self._ask(folder, content) if self._has_file else (None, "")
        if found is None:
            found, marks = compare_within(self._base, folder), ""
        check_unchanged(adapter, marks)  # the result of other files must not be kept as that of `content`
        return found

    def _ask(self, adapter: Path, content: str) -> tuple[ComparedTokenizer | None, str]:
        """Return the result, None if the files must be parsed, and the marks of the adapter's folder."""
        question = {"base": str(self._base), "adapter": str(adapter)}
        try:
            reply = self._process.ask(content, json.dumps(question).encode())
        except InternalError:  # the process does not start
            return None, ""
        compared = reply.get("compared")
        return None if compared is None else ComparedTokenizer.from_json(compared), str(reply.get("marks"))

    @cached_property
    def _has_file(self) -> bool:
        return (self._base / TOKENIZER_FILE).is_file()

    @cached_property
    def _own(self) -> str | None:
        with contextlib.suppress(OSError, UnusableTokenError):
            return read_tokenizer_hash(self._base)
        return None


def _wait_for_disk(folder: Path) -> None:
    """Read the tokenizer's files once. The process, which answers one question at a time, then waits for no disk."""
    for name in TOKENIZER_FILES:
        with contextlib.suppress(OSError, UnusableTokenError):  # the comparison reports it
            read_within_bounds(folder / name)


def compare_within(
    base: Path, adapter: Path, time_s: float = 30.0, memory_bytes: int = _MEMORY_BYTES
) -> ComparedTokenizer:
    """Return `BaseTokenizer(base).compare(adapter)`, or that the process ended early.

    Raises:
        Unavailable: it takes too much time, perhaps since the machine is busy, or another process ended it.
    """
    command = [sys.executable, "-m", _PROGRAM, str(base), str(adapter), str(memory_bytes)]
    try:
        done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, check=True, timeout=time_s)
        return ComparedTokenizer.from_json(json.loads(done.stdout))
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"comparing the adapter's tokenizer with the base model's takes {time_s:g} s") from error
    except (subprocess.CalledProcessError, ValueError) as error:
        if isinstance(error, subprocess.CalledProcessError) and error.returncode in _ENDED_BY_OTHERS:
            raise Unavailable("comparing the adapter's tokenizer with the base model's was interrupted") from error
        return ComparedTokenizer(
            ("the tokenizer's files: expected files that can be compared with the base model's, got others",)
        )


def main() -> None:
    base, adapter, memory_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    limit_this_process(memory_bytes)
    json.dump(BaseTokenizer(base).compare(adapter).as_json(), sys.stdout)


if __name__ == "__main__":
    main()
