"""Checks and tokenises the inputs of requests on threads. Bounds the texts that are tokenised at once."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.fair_budget import FairBudget
from ranklet.cluster.ingress.protocol import Texts, TokenIds
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest

T = TypeVar("T")
_THREADS = 4  # the tokenizer releases the GIL
_SMALL_BODY_BYTES = 1 << 16  # texts of smaller bodies are tokenised by the thread that parses the body
_SLICE_BYTES = 1 << 20  # texts of larger bodies are tokenised in slices, so that requests take turns


class Tokenizer(Protocol):
    """The part of `ranklet.replicas.model.tokenizer.PromptTokenizer` that the intake needs."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]: ...

    def least_tokens(self, text: str) -> int: ...


class Intake:
    """The threads and the tokenizer of one gateway.

    The texts of large bodies never use all threads, so that small requests do not wait for them.
    """

    def __init__(self, tokenizer: Tokenizer, limits: LimitsConfig) -> None:
        self._tokenizer = tokenizer
        self._slice_bytes = min(_SLICE_BYTES, limits.max_tokenising_bytes)
        self._budget = FairBudget(limits.max_tokenising_bytes, _THREADS - 1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="intake")

    async def on_thread(self, work: Callable[[], T]) -> T:
        """Run blocking `work` on a thread of the intake."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def tokenise_if_small(self, inputs: Texts | TokenIds, limits: RequestLimits, body_bytes: int) -> Texts | TokenIds:
        """Check lengths, and tokenise the texts of a small body. Blocks.

        Returns:
            Checked token ids, or the texts of a large body, for `tokenise`.

        Raises:
            InvalidRequest: an input is too long, or contains an unknown token id.
        """
        if isinstance(inputs[0], str):
            self._check_lengths(inputs, limits)
            if body_bytes > _SMALL_BODY_BYTES:
                return inputs
            inputs = self._tokenizer.encode(inputs)
        # The engine checks too, but it sees the parts of a split request, so its indices would be wrong.
        limits.check_prompts(inputs, limits.max_embedding_len)
        return inputs

    async def tokenise(self, inputs: Texts | TokenIds, limits: RequestLimits, owner: str) -> TokenIds:
        """Tokenise the texts that `tokenise_if_small` returned. Returns token ids unchanged.

        Args:
            owner: takes turns with other owners.

        Raises:
            InvalidRequest: a text is too long.
        """
        if not isinstance(inputs[0], str):
            return inputs
        prompts: TokenIds = []
        for part, size_bytes in self._slices(inputs):
            async with self._budget.spend(owner, size_bytes):
                prompts += await self._encode(part)
        limits.check_prompts(prompts, limits.max_embedding_len)
        return prompts

    async def _encode(self, texts: Texts) -> TokenIds:
        work = asyncio.ensure_future(self.on_thread(partial(self._tokenizer.encode, texts)))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # the thread cannot be stopped, so the budget stays in use until it ends
            raise

    def _check_lengths(self, texts: Texts, limits: RequestLimits) -> None:
        for index, text in enumerate(texts):
            if len(text) > limits.max_embedding_len:  # the lower bound of a shorter text cannot exceed the limit
                least = self._tokenizer.least_tokens(text)
                if least > limits.max_embedding_len:
                    raise InvalidRequest(
                        f"input[{index}]: expected 1 to {limits.max_embedding_len} tokens, got at least {least}; "
                        "shorten the text or split it",
                        param="input",
                    )

    def _slices(self, texts: Texts) -> Iterator[tuple[Texts, int]]:
        """Cut `texts` into parts of up to `_slice_bytes` or one text, each with its size in bytes."""
        part: Texts = []
        size_bytes = 0
        for text in texts:
            text_bytes = len(text.encode())
            if part and size_bytes + text_bytes > self._slice_bytes:
                yield part, size_bytes
                part, size_bytes = [], 0
            part.append(text)
            size_bytes += text_bytes
        yield part, size_bytes
