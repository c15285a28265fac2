"""Checks grammars before anything is queued for them, in a process with limits."""

import json
import threading
from collections import OrderedDict
from typing import Final

from ranklet.replicas.bounded_process import BoundedProcess
from ranklet.replicas.grammar.grammar import MAX_GRAMMAR_BYTES, NOT_INSTALLED, Grammar, is_installed

TIME_S: Final = 1.0  # of a check, beside the start of the process
_GRACE_S = 0.25
_MEMORY_BYTES = 2 << 30  # of address space
_MAX_KEPT = 1024
_MAX_KEPT_BYTES = 16 << 20


class GrammarChecker:
    """Knows the grammars that can be enforced. Thread-safe."""

    def __init__(self) -> None:
        self._process = BoundedProcess(
            "ranklet.replicas.grammar.check_worker", "checks grammars", time_s=TIME_S, grace_s=_GRACE_S,
            memory_bytes=_MEMORY_BYTES, max_reply_bytes=1 << 16,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, str | None] = OrderedDict()
        self._kept_bytes = 0

    def quick_refusal(self, grammar: Grammar) -> str | None:
        """Return why a grammar cannot be enforced, as far as that is known without a check."""
        if not is_installed():
            return NOT_INSTALLED
        size = len(grammar.text.encode(errors="surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            return f"expected at most {MAX_GRAMMAR_BYTES} bytes, got {size}"
        try:
            grammar.text.encode()
        except UnicodeEncodeError:
            return "expected a text without half a surrogate pair"
        return self._kept.get(grammar)

    def knows(self, grammar: Grammar) -> bool:
        """Whether `refusal` returns at once."""
        return grammar in self._kept

    def refusal(self, grammar: Grammar) -> str | None:
        """Return why a grammar cannot be enforced; None if it can be. Blocks.

        Raises:
            InternalError: the process that checks does not start.
        """
        quick = self.quick_refusal(grammar)
        if quick is not None or self.knows(grammar):
            return quick
        question = json.dumps({"kind": grammar.kind, "text": grammar.text}).encode()
        reply = self._process.ask(grammar.text, question)
        found = reply["error"]
        if not reply.get("ends"):
            self._keep(grammar, found)
        return None if found is None else str(found)

    def start(self) -> None:
        """Start the process, if llguidance is installed. Blocks."""
        if is_installed():
            self._process.start()

    def stop(self) -> None:
        self._process.stop()

    def _keep(self, grammar: Grammar, found: str | None) -> None:
        with self._lock:
            if grammar not in self._kept:
                self._kept_bytes += len(grammar.text)
            self._kept[grammar] = found
            while len(self._kept) > _MAX_KEPT or self._kept_bytes > _MAX_KEPT_BYTES:
                oldest, _ = self._kept.popitem(last=False)
                self._kept_bytes -= len(oldest.text)
