"""Limits of requests and of the queue, checked before anything is queued."""

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.fair_queue import FairQueue
from ranklet.replicas.engine.fair_share import fair_share
from ranklet.replicas.engine.sequence import Flow, Sequence
from ranklet.replicas.errors import InvalidRequest, Saturated

# Of the longest wait: the rate of the queue must have been measured for this long, which most texts do not last.
_MEASURED = 1 / 6
_MOST_RETRY_S = 60.0  # in Retry-After: the load may change sooner
OTHER_VOCABULARY = (
    "Ids are those of this model's tokenizer. LangChain's OpenAIEmbeddings sends ids of another vocabulary, unless its "
    "check_embedding_ctx_length is False; then it sends texts"
)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds of one request, and what its text depends on.

    Attributes:
        max_model_len: largest number of tokens of a prompt, generated text included.
        hidden: width of a pooled vector.
        vocab: number of token ids.
        added_tokens: number of token ids beyond these that requests for adapters may have.
        max_embedding_len: largest number of tokens of a prompt of embeddings.
        no_text: why the engine generates no text; None if it does.
        no_grammar: why texts cannot follow a grammar; None if they can.
        end_ids: tokens that end a text of the base model.
        base_revision: content of the base model; "" if the engine generates no text.
        dimensions: widths to which embeddings of the base's width may be shortened; None for any.
        max_whole_len: as `max_embedding_len`, for pooling that reads other tokens than the last; None if it is equal.
        dense_width: width of the base model's embeddings, after its Dense layers; None for `hidden`.
    """

    max_model_len: int
    hidden: int
    vocab: int
    max_embedding_len: int
    no_text: str | None = None
    no_grammar: str | None = None
    end_ids: tuple[int, ...] = ()
    base_revision: str = ""
    dimensions: tuple[int, ...] | None = None
    max_whole_len: int | None = None
    dense_width: int | None = None
    added_tokens: int = 0

    @property
    def width(self) -> int:
        """Return the width of the base model's embeddings."""
        return self.hidden if self.dense_width is None else self.dense_width

    def of(self, adapter: AdapterRef | None) -> "RequestLimits":
        """Return the limits of a request. Whether its adapter has each token is known once it is loaded."""
        return self if adapter is None else replace(self, vocab=self.vocab + self.added_tokens)

    def with_text(self, end_ids: tuple[int, ...], base_revision: str) -> "RequestLimits":
        return replace(self, end_ids=end_ids, base_revision=base_revision)

    def longest_embedding(self, *, reads_last: bool, folder_limit: int | None = None) -> int:
        """Return the largest number of tokens of a prompt of embeddings.

        Args:
            reads_last: whether pooling reads only the last token.
            folder_limit: of the adapter's folder.
        """
        whole = None if reads_last else self.max_whole_len
        return min(each for each in (self.max_embedding_len, whole, folder_limit) if each is not None)

    def check_prompts(self, prompts: Many[NDArray[np.int32]], longest: int) -> None:
        """Check the prompts of a request.

        Args:
            longest: largest number of tokens of a prompt.

        Raises:
            InvalidRequest: there is no prompt, or one is empty, too long or has an unknown token id.
        """
        if not prompts:
            raise InvalidRequest("input: expected at least one prompt, got none", param="input")
        for index, prompt in enumerate(prompts):
            self._check_prompt(index, prompt, longest)

    def check_dimensions(self, dimensions: int | None, width: int | None = None) -> int:
        """Return the width of the answer's vectors; raise InvalidRequest if `dimensions` is out of range.

        Args:
            width: of the adapter's vectors; None for the base model's.
        """
        width = width or self.width
        if not self.allows_dimensions(dimensions, width):
            listed = self._listed_dimensions(width)
            if listed is None:
                expected = f"1 to {width}"
            else:
                expected = f"{', '.join(map(str, (*listed, width)))}, as the model's config.json lists"
            raise InvalidRequest(f"dimensions: expected {expected}, got {dimensions}", param="dimensions")
        return dimensions or width

    def allows_dimensions(self, dimensions: int | None, width: int) -> bool:
        listed = self._listed_dimensions(width)
        return dimensions in (None, width) or dimensions in (range(1, width) if listed is None else listed)

    def _listed_dimensions(self, width: int) -> tuple[int, ...] | None:
        return self.dimensions if width == self.width else None

    def check_token_ids(self, where: str, ids: NDArray[np.int32], param: str) -> None:
        """Raise InvalidRequest if an id is not in the vocabulary. `where` begins the message."""
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab:
            raise InvalidRequest(
                f"{where}: expected token ids from 0 to {self.vocab - 1}, got {low if low < 0 else high}. "
                f"{OTHER_VOCABULARY}",
                param=param,
            )

    def _check_prompt(self, index: int, prompt: NDArray[np.int32], longest: int) -> None:
        if not 1 <= len(prompt) <= longest:
            raise InvalidRequest(
                f"input[{index}]: expected 1 to {longest} tokens, got {len(prompt)}; shorten the text or split it",
                param="input",
            )
        self.check_token_ids(f"input[{index}]", prompt, "input")


def check_space(queue: FairQueue, max_tokens: int, flow: Flow, tokens: int) -> None:
    """Raise Saturated if a request does not fit into the queue, or exceeds its flow's share of the queue.

    An empty queue accepts any request. A flow without waiting tokens cannot exceed its share.
    """
    waiting, own = queue.tokens, queue.tokens_of(flow)
    if waiting and waiting + tokens > max_tokens:
        raise Saturated(f"this replica has {waiting} tokens waiting, its limit is {max_tokens}; try again later")
    share = fair_share(max_tokens, waiting - own)
    if own and own + tokens > share:
        raise Saturated(
            f"{own} tokens of {flow} wait on this replica. It may hold {share} of the limit of {max_tokens} now; "
            "the rest is kept for others. Try again later"
        )


def check_wait(queue: FairQueue, max_wait_s: float | None, sequences: Many[Sequence], now_s: float) -> None:
    """Raise Saturated if a request is expected to wait for longer than `max_wait_s`; None for no limit.

    The time until it would wait less is in `Saturated.retry_after_s`.
    """
    if max_wait_s is None:
        return
    wait_s = queue.wait_s(sequences, now_s, _MEASURED * max_wait_s)
    if wait_s > max_wait_s:
        raise Saturated(
            f"expected a wait of at most {max_wait_s:g} s on this replica (engine.max_wait_s), got {wait_s:.0f} s by "
            "what waits and how fast that is served. Try again later",
            retry_after_s=min(max(wait_s - max_wait_s, 1.0), _MOST_RETRY_S),
        )
