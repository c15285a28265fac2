"""Computes which tokens texts with a grammar may go on with, on threads beside those that launch and read steps.

The mask of a text's next token depends on its last one, which the CPU reads when its step has ended. By then the next
step is launched. So a text with a grammar pauses after each of its steps: it is in no plan until its token was read and
its mask is there. Other texts are in every step.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread
from time import perf_counter
from typing import TYPE_CHECKING

from ranklet.replicas.engine.generate import GenerateTask
from ranklet.replicas.engine.grammars import grammars_of
from ranklet.replicas.engine.holders import Holders
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.request import Request
from ranklet.replicas.engine.sequence import Sequence as TokenSequence
from ranklet.replicas.errors import InternalError, RankletError
from ranklet.replicas.grammar.grammar import not_enforced

if TYPE_CHECKING:
    from ranklet.replicas.grammar.compiler import GrammarCompiler

_COMPILING = 2  # threads
_LEAD_S = 0.0015  # in which the next step must be launched before the running one ends
_NEWEST = 0.1  # weight of the last masks in how long they usually take

logger = logging.getLogger(__name__)


class Masks:
    """The threads that compute masks for one engine.

    Args:
        lock: of the engine; notified when texts can go on.
        drop: removes a sequence that cannot go on from the engine. Called under the lock.
    """

    def __init__(self, lock: Condition, drop: Callable[[Sequence[TokenSequence]], None]) -> None:
        self._lock = lock
        self._drop = drop
        self._compiler: GrammarCompiler | None = None
        self._waiting: deque[TokenSequence] = deque()
        self._ready: deque[TokenSequence] = deque()
        self._computing = 0
        self._step_s = self._free_s = 0.0
        self._asked_s = 0.0  # when masks were asked for last
        self._usual_s = 0.0  # from then until they are there
        self._changed = Condition()
        self._is_stopping = False
        self._compilers = ThreadPoolExecutor(_COMPILING, thread_name_prefix="ranklet-grammar")
        self._thread = Thread(target=self._run, name="ranklet-masks", daemon=True)

    def prepare(self, model_dir: Path, limits: RequestLimits) -> RequestLimits:
        """Get ready for the tokens of a base model. Returns the limits with `no_grammar`."""
        made = grammars_of(model_dir, limits)
        if isinstance(made, str):
            return replace(limits, no_grammar=made)
        self._compiler = made
        return limits

    def start(self) -> None:
        if self._compiler is not None:
            self._thread.start()

    def stop(self) -> None:
        self._compilers.shutdown()
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def begin(self, task: GenerateTask, request: Request, queue: Callable[[], None]) -> None:
        """Compile the grammar of a request and `queue` it, on a thread. An error fails the request."""
        compiler = self._compiler
        assert compiler is not None, "the limits name what is missing"

        def run() -> None:
            try:
                task.begin_grammars(compiler, request.sequences)
                queue()
            except RankletError as error:
                request.fail(error)
            except Exception as error:
                logger.exception("a grammar failed")
                request.fail(InternalError(f"the engine failed on this grammar: {type(error).__name__}: {error}"))

        self._compilers.submit(run)

    # Called under the engine's lock

    def go_on(self, sequences: Sequence[TokenSequence]) -> None:
        """Compute the masks that follow the last tokens of sequences."""
        if not sequences:
            return
        for sequence in sequences:
            sequence.awaits_mask = True
        self._asked_s = perf_counter()
        with self._changed:
            self._waiting.extend(sequences)
            self._changed.notify()

    def resume(self, holders: Holders) -> None:
        """Let the sequences go on whose masks are there."""
        while self._ready:
            sequence = self._ready.popleft()
            sequence.awaits_mask = False
            holders.resume(sequence)

    def on_step(self, device_s: float, finished_s: float) -> None:
        """Record a step's end and duration, which tell when the running one should end."""
        # The running step may be shorter: beside it no prompt is computed.
        self._free_s = finished_s + min(device_s, self._step_s)
        self._step_s = device_s

    def patience_s(self) -> float:
        """Return how long the next step may wait for masks while another runs, so that the device never waits.

        It does not wait for masks that will hardly be there in time.
        """
        last_s = self._free_s - _LEAD_S
        if not (self._computing or self._waiting) or self._asked_s + self._usual_s > last_s:
            return 0.0
        return max(0.0, last_s - perf_counter())

    # The thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping:
                    return
                sequences = list(self._waiting)
                self._computing = len(sequences)
                self._waiting.clear()
                asked_s = self._asked_s
            self._compute(sequences)
            self._usual_s += _NEWEST * (perf_counter() - asked_s - self._usual_s)

    def _compute(self, sequences: list[TokenSequence]) -> None:
        assert self._compiler is not None, "requests with a grammar come after `start`"
        texts = [each.grammar for each in sequences if each.grammar is not None]
        problem: RankletError | None = None
        try:
            self._compiler.go_on(texts, [int(each.ids[-1]) for each in sequences])
        except Exception as error:
            logger.exception("the masks of a step failed")
            problem = InternalError(f"the engine failed on this grammar: {type(error).__name__}: {error}")
        failed = [
            (sequence, problem or not_enforced(text.problem or ""))
            for sequence, text in zip(sequences, texts, strict=True)
            if problem is not None or text.problem is not None
        ]
        with self._lock:
            self._computing = 0
            self._drop([sequence for sequence, _ in failed])
            self._ready.extend(sequences)
            self._lock.notify_all()
        for sequence, reason in failed:
            sequence.request.fail(reason)
