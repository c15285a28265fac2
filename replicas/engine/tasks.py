"""Tasks: the outputs that a request needs and the content of its answer.

`Task.need` returns the work of a sequence: how many tokens it computes before its first output, and with which head.
The head computes an output from the hidden states on the device. `Task.accept` takes each output on the host.
"""

from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.invocation import FIELD
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef
from ranklet.replicas.adapters.vector_head import VectorHead
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.plan import Need
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.errors import InternalError, InvalidAdapter, InvalidRequest
from ranklet.replicas.model.dense_settings import width_after
from ranklet.replicas.model.modules import LM_HEAD

if TYPE_CHECKING:
    from ranklet.replicas.model.dense import DenseLayers
    from ranklet.replicas.model.heads import Head, PoolingHead, PoolingHeads
    from ranklet.replicas.model.lm_head import LmHead, MissingHead


class Task(Protocol):
    """Work of one request. Collects the outputs of its sequences."""

    @property
    def choices(self) -> int:
        """Number of sequences for each prompt."""

    def prepare(self, sequences: Many[Sequence]) -> None:
        """Describe the sequences of the request, prompt by prompt. Called once, by the client's thread."""

    def start(self, sequence: Sequence, adapter: AdapterInfo | None) -> None:
        """Set up a sequence whose adapter is in a slot. Called before its first step, and after a preemption."""

    def need(self, sequence: Sequence) -> Need:
        """Return the work that is left from the first token on. Depends only on the sequence's `ids` and `prompt`."""

    def accept(self, sequence: Sequence, output: Any) -> tuple[Any, bool]:
        """Take an output of the head. Called on the answer thread.

        Returns:
            A piece to send to the client, with the tokens that the sequence was given; None for nothing. And whether
            the sequence is done, even if outputs are left.
        """

    @property
    def is_slow(self) -> bool:
        """Whether `result` takes a while, so that the answers of other requests should not wait for it."""

    def result(self) -> Any:
        """Return the content of the answer. Called once, after all sequences are done."""


class EmbedTask:
    """Computes each prompt once. The result is the pooled vectors, float32 [prompts, dimensions].

    With a head, the result is its outputs of each vector, float32 [prompts, outputs].

    Args:
        prompts: number of prompts.
        head: pools.
        normalize: whether vectors have length 1.
        is_normalized: whether those of the head have it.
        skipped: number of leading tokens of each prompt that the head leaves out.
        token_head: compares the logits of two tokens.
        dense: layers of the base model, for adapters without their own.

    Raises:
        InvalidRequest: `dimensions` is out of range.
    """

    choices = 1

    def __init__(
        self, params: EmbedParams, prompts: int, limits: RequestLimits, head: "Head", *, normalize: bool,
        is_normalized: bool = True, skipped: int = 0, token_head: VectorHead | None = None,
        dense: "DenseLayers | None" = None,
    ) -> None:  # fmt: skip
        full_width = limits.width if params.dense is None else width_after(params.dense, limits.hidden)
        self._width = limits.check_dimensions(params.dimensions, full_width)
        self._head = head
        self._skipped = skipped
        self._is_normalized = is_normalized
        self._normalizes = normalize and (self._width < full_width or not is_normalized)
        self._base_dense = dense
        self._uses_head = params.head is not None
        self._token_head = token_head
        self._adapter: AdapterInfo | None = None
        self._vectors: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * prompts

    def prepare(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            sequence.skipped = self._skipped

    def start(self, sequence: Sequence, adapter: AdapterInfo | None) -> None:
        self._adapter = adapter

    def need(self, sequence: Sequence) -> Need:
        last = self._head.reads_last
        return Need(sequence.length, self._head, keeps_cache=last and sequence.begins_within, divisible=last)

    def accept(self, sequence: Sequence, output: NDArray[np.float32]) -> tuple[None, bool]:
        self._vectors[sequence.index] = output
        return None, True

    @property
    def is_slow(self) -> bool:
        return self._uses_head or bool(self._dense())

    def result(self) -> NDArray[np.float32]:
        vectors = np.stack(self._vectors)
        if self._uses_head:
            with np.errstate(over="ignore", invalid="ignore"):
                return self._finite(self._head_of_adapter().apply(vectors), "head")
        vectors = self._after_dense(vectors)[:, : self._width]
        if self._normalizes:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _after_dense(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        dense = self._dense()
        if not dense:
            return vectors
        assert not self._is_normalized, "replicas say which adapters have Dense layers"
        return self._finite(dense.apply(vectors), "Dense layers")

    def _dense(self) -> "DenseLayers | None":
        own = None if self._adapter is None else self._adapter.dense
        return self._base_dense if own is None else own

    def _finite(self, outputs: NDArray[np.float32], source: str) -> NDArray[np.float32]:
        if not np.isfinite(outputs).all():
            message = f"the output of the {source} for these prompts is not finite"
            raise InternalError(message) if self._adapter is None else InvalidAdapter(self._adapter.name, [message])
        return outputs

    def _head_of_adapter(self) -> VectorHead:
        assert self._adapter is not None, "replicas check that"
        if self._token_head is None:
            assert self._adapter.head is not None, "verification finds the head of each classifier"
            return self._adapter.head
        if LM_HEAD in self._adapter.modules:
            raise InvalidAdapter(
                self._adapter.name,
                [f"{LM_HEAD}: expected the base's head, whose logits are scores, got LoRA on it; train it without"],
            )
        return self._token_head


def embed_task(
    params: EmbedParams, prompts: Many[NDArray[np.int32]], heads: "PoolingHeads", limits: RequestLimits,
    lm_head: "LmHead | MissingHead", adapter: AdapterRef | None = None,
) -> EmbedTask:  # fmt: skip
    """Return the task of a request for embeddings.

    Raises:
        InvalidRequest: a prompt is empty or too long, or a token id or parameter is out of range.
    """
    normalize = heads.normalizes if params.normalize is None else params.normalize
    head = heads.choose(params.pooling, normalize=normalize and not params.dense, skips=params.skipped > 0)
    limits.check_prompts(prompts, limits.longest_embedding(reads_last=head.reads_last))
    if adapter is not None and adapter.invocation is not None:
        _check_parts(adapter, head, limits)
    tokens = None if params.head is None else params.head.tokens
    return EmbedTask(
        params, len(prompts), limits, head, normalize=normalize, is_normalized=head.pooling.normalize,
        skipped=params.skipped if head.pooling.skips else 0,
        token_head=None if tokens is None else _token_head(tokens, limits, lm_head),
        dense=heads.dense,
    )  # fmt: skip


def _check_parts(adapter: AdapterRef, head: "PoolingHead", limits: RequestLimits) -> None:
    """Check that a prompt's tokens before and after an invocation can be computed apart, which takes pages."""
    if head.reads_last and limits.no_text is None:
        return
    got = f"pooling {head.pooling.mode}" if limits.no_text is None else f"one that does not: {limits.no_text}"
    raise InvalidRequest(
        f"model: adapter {adapter.name!r} changes tokens from its {FIELD} on. Vectors with it need pooling of the last "
        f"token, and a replica that generates text; got {got}",
        param="model",
    )


def _token_head(tokens: tuple[int, int], limits: RequestLimits, lm_head: "LmHead | MissingHead") -> VectorHead:
    from ranklet.replicas.model.lm_head import LmHead, logit_difference  # imports torch

    if limits.no_text is not None or not isinstance(lm_head, LmHead):
        raise InvalidRequest(
            f"model: expected a base model with logits of tokens, which scores are: {limits.no_text}", param="model"
        )
    of_base = replace(limits, vocab=len(lm_head.weight))  # the head has no rows of an adapter's tokens
    of_base.check_token_ids("true_token_id and false_token_id", np.array(tokens, np.int32), "model")
    return VectorHead(logit_difference(lm_head, *tokens))
