"""How far the texts of one call are, for the state that the replica reports."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ranklet.cluster.message import InferenceCall
from ranklet.cluster.replica.state import ReplicaState
from ranklet.cluster.text_prefix import call_pages
from ranklet.replicas.engine.generate import Generation
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.request import AnswerSink
from ranklet.routing.prefix import PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class CallSink(AnswerSink):
    """A sink of the answer and of the first token of each text."""

    on_begun: Callable[[int, int], None] = lambda index, cached_tokens: None

    def begun(self, index: int, cached_tokens: int) -> None:
        self.on_begun(index, cached_tokens)


class TextProgress:
    """Counts the texts of one call. Used in the replica's event loop.

    Only the first text's pages are told to routers: the others of a call begin at the same time.
    """

    def __init__(self, call: InferenceCall[GenerateParams], state: ReplicaState) -> None:
        self._call = call
        self._state = state
        self._prompts = call.prompts()
        self._waiting = call.work  # tokens of prompts whose texts have not begun
        self._texts = call.texts  # texts that have not begun
        self._begun: dict[int, tuple[float, int]] = {}  # by text: when, and its tokens that were in the cache
        self._has_ended = False

    def begin(self, index: int, cached_tokens: int) -> None:
        """Count the first token of text `index`."""
        if self._has_ended or index in self._begun:
            return
        self._begun[index] = time.monotonic(), cached_tokens
        self._texts -= 1
        prompt, choice = divmod(index, self._call.params.n)
        tokens = min(len(self._prompts[prompt]), self._waiting) if choice == 0 else 0
        self._waiting -= tokens
        pages: list[int] = []
        if index == 0:
            known = call_pages(self._call, self._prompts[0])
            found = min(cached_tokens // PAGE_TOKENS, len(known))
            pages = [*known[max(found - 1, 0) : found], *known[-1:]]
        self._state.text_begun(tokens, cached_tokens, pages)

    def complete(self, result: Generation) -> None:
        """Count the texts of the answer."""
        now_s, n = time.monotonic(), self._call.params.n
        for index, choice in enumerate(result.choices):
            if index not in self._begun:
                continue
            began_s, cached_tokens = self._begun.pop(index)
            prompt, output = self._prompts[index // n], choice.tokens
            pages: list[int] = []
            if index == 0:  # keys and values of the last token were never computed
                pages = call_pages(self._call, np.concatenate((prompt, output[:-1])))[-1:]
            kept = len(prompt) + len(output) - cached_tokens
            self._state.text_finished(len(output), max(kept, 0), max(now_s - began_s, 0.001), pages)

    def end(self) -> None:
        """Drop what the call will not do any more."""
        self._has_ended = True
        for _ in self._begun:
            self._state.text_finished(0, 0, 0.0, ())
        self._begun.clear()
        if self._texts:
            self._state.texts_dropped(self._texts, self._waiting)
            self._texts = self._waiting = 0
