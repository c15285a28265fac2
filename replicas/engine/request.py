"""A request to an engine. Its sequences run in several steps; the request collects their outputs."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from threading import RLock
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.invocation import first_adapted
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef
from ranklet.replicas.engine.generate import GenerateTask
from ranklet.replicas.engine.sequence import Sequence, flow_of
from ranklet.replicas.engine.tasks import Task
from ranklet.replicas.errors import InternalError, InvalidRequest, RankletError
from ranklet.replicas.model.sampled import PromptScores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        result: content of the answer: float32 [prompts, dimensions] for embeddings, a `Generation` for text.
        tier: where the adapter was when the request arrived: gpu, host or disk; None for the base model.
        backend: LoRA backend of the last step.
        queue_s: longest wait of a sequence for its first step.
        compute_s: longest device time of a sequence.
        first_piece_s: time from the request's arrival to its first piece; None without pieces.
    """

    result: Any
    tier: str | None
    backend: str
    prompt_tokens: int
    queue_s: float
    compute_s: float
    first_piece_s: float | None = None


class Sink(Protocol):
    """Receives a request's outputs on the engine's threads. Methods must be quick and must not raise."""

    def begun(self, index: int, cached_tokens: int) -> None:
        """Receive that text `index` has its first token, and how much of its prompt was in the prefix cache."""

    def delta(self, index: int, piece: Any) -> None:
        """Receive a piece of the output of sequence `index`, before the request is done."""

    def done(self, result: Answer | RankletError) -> None:
        """Receive the answer or the error; called once, last."""


@dataclass(frozen=True, slots=True)
class AnswerSink:
    """A sink of a caller that needs only the whole answer."""

    callback: Callable[[Answer | RankletError], None]

    def begun(self, index: int, cached_tokens: int) -> None:
        pass

    def delta(self, index: int, piece: Any) -> None:
        pass

    def done(self, result: Answer | RankletError) -> None:
        self.callback(result)


class Request:
    """Collects the outputs of its sequences. Ends once: when the last sequence is done, or the first one fails.

    Args:
        given: int32 [length] for each sequence: output that it has already. Empty if no sequence has any.
        key_name: name of the API key; "" without one.

    Attributes:
        tier: where the adapter was when the request arrived: gpu, host or disk; None for the base model.
    """

    def __init__(
        self, task: Task, prompts: Many[NDArray[np.int32]], adapter: AdapterRef | None, sink: Sink, *,
        arrived_s: float = 0.0, given: Many[NDArray[np.int32]] = (), key_name: str = "",
    ) -> None:  # fmt: skip
        self._task = task
        self._sink = sink
        self.tier: str | None = None
        self._prompt_tokens = sum(map(len, prompts))
        self._queue_s = self._compute_s = 0.0
        self._arrived_s = arrived_s
        self._first_piece_s: float | None = None
        self.is_open = True
        self._vocab = 0  # of the adapter, if a token is beyond it
        self._lock = RLock()  # steps, loads and a stop end requests on threads of their own
        flow = flow_of(adapter, key_name)
        repeated = [ids for ids in prompts for _ in range(task.choices)]
        self._unfinished = len(repeated)
        self.sequences = [Sequence(ids, adapter, flow, arrived_s, self, i) for i, ids in enumerate(repeated)]
        for i, output in enumerate(given):
            ids = np.concatenate((repeated[i], output))
            self.sequences[i] = Sequence(ids, adapter, flow, arrived_s, self, i, len(output))
        if adapter is not None and adapter.invocation is not None:
            for index, ids in enumerate(prompts):
                first = first_adapted(ids, adapter.invocation)
                for sequence in self.sequences[index * task.choices : (index + 1) * task.choices]:
                    sequence.adapted_from = first
        for sequence in self.sequences:
            self.restart(sequence)
        task.prepare(self.sequences)

    def start(self, sequence: Sequence, adapter: AdapterInfo | None) -> None:
        """Set up a sequence whose adapter is in a slot; see `Task.start`."""
        if adapter is not None and adapter.vocab is not None and int(sequence.ids.max()) >= adapter.vocab:
            # The device must not look it up. The output of the step is not used.
            sequence.unknown = int(sequence.ids.max())
            sequence.buffer = np.where(sequence.buffer < adapter.vocab, sequence.buffer, 0)
            self._vocab = adapter.vocab
        self._task.start(sequence, adapter)

    def restart(self, sequence: Sequence) -> None:
        """Set the work that is left of a sequence, from its first token on."""
        sequence.begin(self._task.need(sequence))

    def on_output(self, sequence: Sequence, output: Any, began_s: float, compute_s: float) -> tuple[Any, bool]:
        """Pass an output to the task.

        Args:
            output: the sequence's output of the head.
            began_s: when the device began the step.
            compute_s: device time of the step.

        Returns:
            A piece to `send`; None for none. And whether the sequence is done.
        """
        if isinstance(output, PromptScores):
            assert isinstance(self._task, GenerateTask)
            self._task.accept_scores(sequence, output)
            return None, False
        if sequence.unknown is not None:
            raise InvalidRequest(
                f"input: expected token ids from 0 to {self._vocab - 1} for this adapter, got {sequence.unknown}",
                param="input",
            )
        if not sequence.passes:
            self._queue_s = max(self._queue_s, began_s - sequence.arrived_s)
        sequence.passes += 1
        sequence.awaited -= 1
        if sequence.solo:
            sequence.solo -= 1
        sequence.compute_s += compute_s
        piece, is_done = self._task.accept(sequence, output)
        if is_done:
            self._compute_s = max(self._compute_s, sequence.compute_s)
            self._unfinished -= 1
        elif not sequence.awaited:
            raise RuntimeError("the task wants another output after the last one")
        return piece, is_done

    @property
    def is_complete(self) -> bool:
        """Whether all sequences are done."""
        return not self._unfinished

    @property
    def is_slow(self) -> bool:
        """Whether `end` takes a while."""
        return self._task.is_slow

    def send(self, index: int, piece: Any) -> None:
        """Send a piece of the output of sequence `index`. Called without the engine's lock, like `end` and `fail`."""
        with self._lock:
            if self.is_open:
                if self._first_piece_s is None:
                    self._first_piece_s = perf_counter() - self._arrived_s
                sequence = self.sequences[index]
                if sequence.passes == 1:
                    self._call(self._sink.begun, index, sequence.cached_tokens or 0)
                self._call(self._sink.delta, index, piece)

    def end(self, backend: str) -> None:
        """Send the answer of a complete request."""
        try:
            result: Answer | RankletError = Answer(
                self._task.result(), self.tier, backend, self._prompt_tokens, self._queue_s, self._compute_s,
                self._first_piece_s,
            )  # fmt: skip
        except RankletError as error:
            result = error
        except Exception as error:  # a defect of a task must not end the thread that answers every request
            logger.exception("a task failed")
            result = InternalError(f"the engine failed on this answer: {type(error).__name__}: {error}")
        self._close(result)

    def fail(self, error: RankletError) -> None:
        self.cancel()
        self._close(error)

    def cancel(self) -> None:
        """Drop the sequences that wait. The sink may then never be called."""
        for sequence in self.sequences:
            sequence.cancelled = True

    def finish(self, index: int) -> None:
        """End text `index` with its next output. A text that runs has up to two more."""
        if index < len(self.sequences):
            self.sequences[index].finishing = True

    def _close(self, result: Answer | RankletError) -> None:
        with self._lock:
            if self.is_open:
                self.is_open = False
                self._call(self._sink.done, result)

    def _call(self, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception:  # a defect of the caller must not end the thread that answers every request
            logger.exception("the sink of a request failed")


@dataclass(frozen=True, slots=True)
class Ticket:
    """The caller's handle of a submitted request."""

    request: Request

    @property
    def is_open(self) -> bool:
        return self.request.is_open

    def cancel(self) -> None:
        self.request.cancel()

    def finish(self, index: int) -> None:
        """End text `index` with its next output, as if that was a stop token."""
        self.request.finish(index)
