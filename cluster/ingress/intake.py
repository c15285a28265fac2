"""The work of a gateway on the bodies of requests, on threads and within bounds: parsing, rendering, tokenising."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar

from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.body_room import BodyRoom
from ranklet.cluster.ingress.fair_budget import FairBudget
from ranklet.cluster.ingress.memory import give_back_memory
from ranklet.cluster.ingress.prompts import PromptRules, Tokenizer
from ranklet.cluster.ingress.protocol import Texts, TokenIds

T = TypeVar("T")
SMALL_BODY_BYTES: Final = 1 << 16  # texts of smaller bodies are tokenised by the thread that parses the body
_THREADS = 4  # the tokenizer releases the GIL
_SLICE_BYTES = 1 << 20  # texts of larger bodies are tokenised in slices, so that requests take turns
_PAUSE_S = 0.05  # after the parser of a large body has kept the GIL, so that small requests get it
_GIVE_BACK_S = 0.5  # after large work, free memory returns to the system


@dataclass(frozen=True)
class Inputs:
    """The texts or the token ids of a request, and the rules for the prompts that they become.

    Attributes:
        tokenizer: of an adapter; None for the base model's.
    """

    values: Texts | TokenIds
    rules: PromptRules
    tokenizer: Tokenizer | None = None


class Intake:
    """The threads and the base model's tokenizer of one gateway.

    Large bodies never use all threads, so that small requests do not wait for them. Keys take turns with them, and the
    bytes that are parsed, rendered or tokenised at once are bounded.
    """

    def __init__(self, tokenizer: Tokenizer, limits: LimitsConfig) -> None:
        self._tokenizer = tokenizer
        self._slice_bytes = min(_SLICE_BYTES, limits.max_tokenising_bytes)
        self._budget = FairBudget(limits.max_tokenising_bytes, _THREADS - 1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="intake")
        self.room = BodyRoom(limits.max_held_body_bytes, SMALL_BODY_BYTES)
        self._giving_back: asyncio.TimerHandle | None = None

    async def on_thread(self, work: Callable[[], T]) -> T:
        """Run blocking `work` on a thread of the intake."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def in_turn(self, owner: str, body_bytes: int, work: Callable[[], T]) -> T:
        """Run blocking `work` on a body on a thread. Work on a large body waits for its turn.

        Args:
            owner: takes turns with other owners.
        """
        if body_bytes <= SMALL_BODY_BYTES:
            return await self.on_thread(work)
        async with self.turn(owner, body_bytes):
            try:
                return await self._to_its_end(work)
            finally:
                if body_bytes > _SLICE_BYTES:
                    await asyncio.sleep(_PAUSE_S)

    @contextlib.asynccontextmanager
    async def turn(self, owner: str, size_bytes: int) -> AsyncIterator[None]:
        """Wait until work on `size_bytes` may begin. It ends with the context."""
        async with self._budget.spend(owner, size_bytes):
            try:
                yield
            finally:
                self.give_back_soon()

    def tokenise_if_small(self, inputs: Inputs, body_bytes: int) -> Inputs:
        """Check lengths, and tokenise the texts of a small body. Blocks.

        Returns:
            Checked token ids, or the texts of a large body, for `tokenise`.

        Raises:
            InvalidRequest: an input is too long, or contains an unknown token id.
        """
        values, rules, tokenizer = inputs.values, inputs.rules, inputs.tokenizer or self._tokenizer
        if isinstance(values[0], str):
            _check_lengths(values, rules, tokenizer)
            # A small body may have a text that each prompt repeats.
            if max(body_bytes, sum(map(len, values))) > SMALL_BODY_BYTES:
                return inputs
            values = rules.encode(tokenizer, values)
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
        tokenizer = inputs.tokenizer or self._tokenizer
        for part, size_bytes in self._slices(values):
            async with self.turn(owner, size_bytes):
                part_prompts = await self._to_its_end(partial(inputs.rules.encode, tokenizer, part))
            prompts += part_prompts
            if any(len(prompt) > inputs.rules.longest for prompt in part_prompts):
                inputs.rules.check(prompts)  # refuses it before the other texts are tokenised
        inputs.rules.check(prompts)
        return prompts

    async def _to_its_end(self, work: Callable[[], T]) -> T:
        running = asyncio.ensure_future(self.on_thread(work))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])  # the thread cannot be stopped, so the budget stays in use until it ends
            raise
        finally:
            del running  # its error refers to this frame, which would keep the body until the next garbage collection

    def give_back_soon(self) -> None:
        """Return memory to the system once large work has ended."""
        if self._giving_back is None:
            self._giving_back = asyncio.get_running_loop().call_later(_GIVE_BACK_S, self._give_back)

    def _give_back(self) -> None:
        self._giving_back = None
        self._threads.submit(give_back_memory)

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


def _check_lengths(texts: Texts, rules: PromptRules, tokenizer: Tokenizer) -> None:
    for index, text in enumerate(texts):
        if len(text) > rules.longest:  # the lower bound of a shorter text cannot exceed the limit
            least = tokenizer.least_tokens(text)
            if least > rules.longest:
                raise rules.too_long(index, least)
            most = tokenizer.most_characters(rules.longest)
            if len(text) > most:  # of tokenizers that may drop text, so that nothing is known of its tokens
                raise rules.too_many_characters(index, most, len(text))
