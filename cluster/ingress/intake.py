"""Turns a request's body into prompts for one model, on threads, with a bound on what is tokenised at once."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.fair_budget import FairBudget
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.protocol import Texts
from ranklet.cluster.ingress.task import AnswerT, InferenceTask, ParseTask
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest

T = TypeVar("T")
_THREADS = 4  # the tokenizer releases the GIL
_SMALL_BODY_BYTES = 1 << 16  # texts of smaller bodies are tokenised by the thread that parses the body
_SLICE_BYTES = 1 << 20  # texts of a large request are tokenised in slices, so that requests take turns

Authorize = Callable[[AdapterLocation | None], None]


class Tokenizer(Protocol):
    """The part of `ranklet.replicas.model.tokenizer.PromptTokenizer` that the intake needs."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]: ...

    def least_tokens(self, text: str) -> int: ...


@dataclass(frozen=True)
class ParsedRequest(Generic[AnswerT]):
    """A request that may be sent to the replicas.

    Attributes:
        adapter: None for the base model.
        prompts: int32 [length] each.
    """

    task: InferenceTask[AnswerT]
    adapter: AdapterLocation | None
    prompts: list[NDArray[np.int32]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.prompts))


class Intake:
    """Parses and tokenises the requests of one gateway.

    Large requests never use all threads, so that small requests do not wait for them.
    """

    def __init__(self, names: ModelNames, tokenizer: Tokenizer, limits: LimitsConfig) -> None:
        self._names = names
        self._tokenizer = tokenizer
        self._max_texts = limits.max_texts_per_request
        self._slice_bytes = min(_SLICE_BYTES, limits.max_tokenising_bytes)
        self._budget = FairBudget(limits.max_tokenising_bytes, _THREADS - 1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="intake")

    async def read(
        self, body: bytes, parse: ParseTask[AnswerT], limits: RequestLimits, authorize: Authorize, owner: str
    ) -> ParsedRequest[AnswerT]:
        """Parse the body, resolve the model, authorize, check parameters and the lengths of texts, tokenise.

        Args:
            authorize: called on a thread, with the adapter, before anything is tokenised. Raises to refuse the request.
            owner: takes turns with other owners when its requests are large.

        Raises:
            RankletError: an error of any of these steps, such as InvalidRequest or UnknownModel.
        """
        small = len(body) <= _SMALL_BODY_BYTES
        request, texts = await self.on_thread(partial(self._parse, body, parse, limits, authorize, small))
        if texts:
            for part, size_bytes in self._slices(texts):
                async with self._budget.spend(owner, size_bytes):
                    request.prompts.extend(await self._tokenise(part))
            limits.check_prompts(request.prompts)
        return request

    async def on_thread(self, work: Callable[[], T]) -> T:
        """Run blocking `work` on a thread of the intake."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _tokenise(self, texts: Texts) -> list[NDArray[np.int32]]:
        work = asyncio.ensure_future(self.on_thread(partial(self._tokenizer.encode, texts)))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # the thread cannot be stopped, so the budget stays in use until it ends
            raise

    def _parse(
        self, body: bytes, parse: ParseTask[AnswerT], limits: RequestLimits, authorize: Authorize, small: bool
    ) -> tuple[ParsedRequest[AnswerT], Texts]:
        """Returns the request, and the texts that are still to be tokenised."""
        task = parse(body)
        adapter = self._names.resolve(task.model, task.lora_path)
        authorize(adapter)
        inputs = task.inputs(self._max_texts)
        task.check_params(limits)
        if isinstance(inputs[0], str):
            self._check_lengths(inputs, limits)
            if not small:
                return ParsedRequest(task, adapter, []), inputs
            inputs = self._tokenizer.encode(inputs)
        # The engine checks too, but it sees the parts of a split request, so its indices would be wrong.
        limits.check_prompts(inputs)
        return ParsedRequest(task, adapter, inputs), []

    def _check_lengths(self, texts: Texts, limits: RequestLimits) -> None:
        for index, text in enumerate(texts):
            if len(text) > limits.max_model_len:  # the lower bound of a shorter text cannot exceed the limit
                least = self._tokenizer.least_tokens(text)
                if least > limits.max_model_len:
                    raise InvalidRequest(
                        f"input[{index}]: expected 1 to {limits.max_model_len} tokens, got at least {least}; "
                        "shorten the text or split it",
                        param="input",
                    )

    def _slices(self, texts: Texts) -> Iterator[tuple[Texts, int]]:
        """Cut `texts` into parts of about `_SLICE_BYTES`, each with its size in bytes."""
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
