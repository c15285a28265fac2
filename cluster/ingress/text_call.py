"""One text call and what its texts have so far, over all replicas that work on it one after the other."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol

import numpy as np

from ranklet.cluster.ingress.call_sender import RepeatableError
from ranklet.cluster.message import Begun, Continuation, InferenceCall, InferenceReply, pack_tokens
from ranklet.cluster.text_result import GenerateResult
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import Saturated, Unavailable

_MOST_CONTINUATIONS: Final = 3
# A call is not sent again once this many engines in a row have failed under it: it may be the cause.
_MOST_FAILURES: Final = 2
_PATIENCE_S: Final = 10.0  # after a failure, for other replicas to accept a text that the client has a part of
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0  # between two questions whether one accepts it

Logprobs = Sequence[tuple[float, Sequence[tuple[int, float]]]]  # of each token, and of the best alternatives to it


class TextReceiver(Protocol):
    """Receives the tokens of one request. Called in the gateway's event loop, so methods must be quick.

    Attributes:
        end_ids: tokens that end a text.
    """

    end_ids: frozenset[int]

    def begin(self, begun: Begun) -> None:
        """Receive where a call of the request runs. Called for each call, and again when another replica goes on."""

    def receive(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> bool:
        """Receive the next tokens of text `index`, counted over all prompts of the request.

        Returns:
            Whether the text is to go on. If not, no further tokens of it are received, and the replica ends it.
        """


class TextCall:
    """The texts of one call, at most one attempt at a time. Passes on each token once and in order.

    If a replica fails, another one goes on with the tokens that the texts have.

    Args:
        call: its params have a seed, so that every replica draws the same tokens.
        texts: number of texts of the call.
        first: index of the call's first text in the request.
        receiver: of the request.
    """

    def __init__(self, call: InferenceCall[GenerateParams], texts: int, first: int, receiver: TextReceiver) -> None:
        self.replica: str | None = None
        self.signs = 0  # of life: messages about this call
        self.gaps = 0
        self._call = call
        self._first = first
        self._receiver = receiver
        self._tokens: list[list[int]] = [[] for _ in range(texts)]
        self._given = [0] * texts  # tokens at the start of the attempt
        self._ended = [False] * texts
        self._told = set[int]()  # texts that the replica of the attempt was told to end
        self._begun: Begun | None = None  # the attempt that brought the first token
        self._has_begun = self._has_progress = False  # the attempt
        self._number = 0  # of the attempt
        self._failures = self._continuations = 0
        self._patience_ends_s = self._pause_s = 0.0

    @property
    def continues(self) -> bool:
        """Whether the next attempt continues texts, of which the receiver has tokens."""
        return any(self._tokens)

    def begin_attempt(self, number: int) -> InferenceCall[GenerateParams]:
        """Return the call to send. From now on, `on_piece` must get no pieces of earlier attempts."""
        self._has_begun = self._has_progress = False
        self._number = number
        self._told.clear()
        if not self.continues:
            return replace(self._call, number=number)
        # A complete text makes its last token again, so that the reply has each text.
        self._ended = [self._is_complete(index) for index in range(len(self._tokens))]
        given = [tokens[: len(tokens) - ended] for tokens, ended in zip(self._tokens, self._ended, strict=True)]
        self._given = [len(tokens) for tokens in given]
        packed = pack_tokens([np.array(tokens, np.int32) for tokens in given])
        adapter, base_revision = self._call.adapter, self._begun.base_revision if self._begun else ""
        if adapter is not None and self._begun is not None:
            adapter = replace(adapter, requested_revision=self._begun.revision)
        continuation = Continuation(*packed, base_revision)
        return replace(self._call, adapter=adapter, number=number, continuation=continuation)

    def begin(self, begun: Begun) -> None:
        self.replica = begun.replica
        self.signs += 1
        self._has_begun = True
        if not self.continues:
            self._begun = begun
        self._receiver.begin(begun)

    def on_piece(self, index: int, start: int, tokens: Sequence[int], logprobs: Logprobs | None) -> bool:
        """Pass on a piece. Returns False if the replica should end the text.

        Pieces behind a gap are dropped: `complete` passes their tokens on.
        """
        self.signs += 1
        self._has_progress = True
        known = self._tokens[index]
        if self._ended[index]:
            return self._was_told(index)
        if start != len(known):
            repeated = len(known) - start
            if repeated < 0:
                self.gaps += 1
                return True
            tokens, logprobs = tokens[repeated:], logprobs and logprobs[repeated:]
            if not tokens:
                return True
        known += tokens
        if self._receiver.receive(self._first + index, tokens, logprobs):
            return True
        self._ended[index] = True
        return self._was_told(index)

    def complete(self, reply: InferenceReply[GenerateResult]) -> None:
        """Pass on what no message has brought: where the call ran, and tokens of the whole answer."""
        if not self._has_begun:  # the feed was not open yet
            self._receiver.begin(Begun(self._number, reply.replica, reply.revision, reply.tier, ""))
        for index, choice in enumerate(reply.result.choices):
            start = len(self._tokens[index])
            tokens: list[int] = choice.ids()[start:].tolist()
            if tokens and not self._ended[index]:
                logprobs = None if choice.logprobs is None else choice.logprobs.unpack(start - self._given[index])
                self.on_piece(index, start, tokens, logprobs)

    def pause_before_repeat(self, failure: RepeatableError) -> float:
        """Return how many seconds to wait before another replica gets the call.

        Raises:
            RankletError: no other replica should get it.
        """
        if not self.continues:
            self._failures += 1
            if self._failures < _MOST_FAILURES:
                return 0.0
            raise failure.error from failure
        now_s = asyncio.get_running_loop().time()
        if (self._has_begun or failure.has_begun) and not isinstance(failure.error, Saturated):
            # Replicas that left before they ended were drained: the call is not the cause.
            counted = failure.replica is not None
            # A text may end an engine, but not the process around it. Processes end together, as with their node.
            may_be_cause = counted and not failure.is_process_gone
            self._failures = (0 if self._has_progress else self._failures) + may_be_cause
            self._continuations += counted
            self._patience_ends_s, self._pause_s = now_s + _PATIENCE_S, _FIRST_PAUSE_S
            if self._failures < _MOST_FAILURES and self._continuations <= _MOST_CONTINUATIONS:
                return 0.0
            reason = "each other that got the rest failed too"
        elif now_s < self._patience_ends_s:
            pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return pause_s
        else:
            reason = f"no other accepted the rest within {_PATIENCE_S:g} s ({failure.error.message})"
        raise Unavailable(
            f"the replica failed after it had sent a part of the text, and {reason}. Send the request again"
        ) from failure

    def _is_complete(self, index: int) -> bool:
        tokens = self._tokens[index]
        if self._ended[index] or len(tokens) == self._call.params.max_tokens:
            return True
        return bool(tokens) and tokens[-1] in self._receiver.end_ids

    def _was_told(self, index: int) -> bool:
        """Return whether the replica was told before that the text ends."""
        was_told = index in self._told
        self._told.add(index)
        return was_told
