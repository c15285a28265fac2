"""Checks and tokenises the inputs of requests on threads. Bounds the texts that are tokenised at once."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar

from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.fair_budget import FairBudget
from ranklet.cluster.ingress.prompts import PromptRules, Tokenizer
from ranklet.cluster.ingress.protocol import Texts, TokenIds

T = TypeVar("T")
SMALL_BODY_BYTES: Final = 1 << 16  # texts of smaller bodies are tokenised by the thread that parses the body
_THREADS = 4  # the tokenizer releases the GIL
_SLICE_BYTES = 1 << 20  # texts of larger bodies are tokenised in slices, so that requests take turns


@dataclass(frozen=True)
class Inputs:
    """The texts or the token ids of a request, and the rules for the prompts that they become."""

    values: Texts | TokenIds
    rules: PromptRules


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

    def tokenise_if_small(self, inputs: Inputs, body_bytes: int) -> Inputs:
        """Check lengths, and tokenise the texts of a small body. Blocks.

        Returns:
            Checked token ids, or the texts of a large body, for `tokenise`.

        Raises:
            InvalidRequest: an input is too long, or contains an unknown token id.
        """
        values, rules = inputs.values, inputs.rules
        if isinstance(values[0], str):
            self._check_lengths(values, rules)
            if body_bytes > SMALL_BODY_BYTES:
                return inputs
            values = rules.encode(self._tokenizer, values)
        else:
            values = rules.shorten(values)
        rules.check(values)
        return replace(inputs, values=values)

    async def tokenise(self, inputs: Inputs, owner: str) -> TokenIds:
        """Tokenise the texts that `tokenise_if_small` returned. Returns token ids unchanged.

        Args:
            owner: takes turns with other owners.

        Raises:
            InvalidRequest: a text is too long.
        """
        values = inputs.values
        if not isinstance(values[0], str):
            return values
        prompts: TokenIds = []
        for part, size_bytes in self._slices(values):
            async with self._budget.spend(owner, size_bytes):
                prompts += await self._encode(inputs.rules, part)
        inputs.rules.check(prompts)
        return prompts

    async def _encode(self, rules: PromptRules, texts: Texts) -> TokenIds:
        work = asyncio.ensure_future(self.on_thread(partial(rules.encode, self._tokenizer, texts)))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # the thread cannot be stopped, so the budget stays in use until it ends
            raise

    def _check_lengths(self, texts: Texts, rules: PromptRules) -> None:
        for index, text in enumerate(texts):
            if len(text) > rules.longest:  # the lower bound of a shorter text cannot exceed the limit
                least = self._tokenizer.least_tokens(text)
                if least > rules.longest:
                    raise rules.too_long(index, least)

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
