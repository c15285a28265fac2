"""What the tasks of `/classify`, `/rerank` and `/score` have in common."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import Embeddings
from ranklet.cluster.ingress.descriptions import AdapterDescriptions, DescribedAdapter
from ranklet.cluster.ingress.intake import Inputs
from ranklet.cluster.ingress.known_fields import KnownFields
from ranklet.cluster.ingress.protocol import parse_object, validate
from ranklet.cluster.ingress.task import AdmittedCall
from ranklet.cluster.ingress.vectors import compute_vectors
from ranklet.cluster.message import AdapterText
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams, HeadParams
from ranklet.replicas.errors import InvalidRequest

Scores = NDArray[np.float32]
_RENDER_INLINE_BYTES = 1 << 18  # larger answers are rendered on a thread


class ScoringRequest(BaseModel):
    """The fields that bodies of all requests for scores have."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    use_activation: bool | None = None  # false answers with logits
    user: str | None = None
    lora_path: str | None = None  # SGLang's field for the adapter


Form = TypeVar("Form", bound=ScoringRequest)


@dataclass(frozen=True)
class ScoredAnswer:
    """What the answer to a request for scores is made of.

    Attributes:
        logits: float32 [prompts, labels].
    """

    id: str
    model: str
    created: int
    adapter: AdapterText
    logits: Scores
    usage: dict[str, int]


class ScoringTask(Generic[Form]):
    """One request for scores; implements `ranklet.cluster.ingress.task.InferenceTask`. Subclasses have one format each.

    Attributes:
        form_type: the body of a request.
        known_fields: names of other fields that are refused or ignored.
        ignored: names of the request's unknown fields.
    """

    is_text: ClassVar[bool] = False
    id_prefix: ClassVar[str]
    known_fields: ClassVar[KnownFields]
    form_type: type[Form]

    def __init__(self, form: Form, ignored: tuple[str, ...], descriptions: AdapterDescriptions) -> None:
        self.ignored = ignored
        self._form = form
        self._descriptions = descriptions
        self._described: DescribedAdapter | None = None

    @classmethod
    def parse(cls, descriptions: AdapterDescriptions, body: bytes) -> Self:
        """Parse a JSON body. Raises InvalidRequest."""
        fields = parse_object(body)
        ignored = cls.known_fields.check(fields, cls.form_type.model_fields)
        return cls(validate(fields, cls.form_type), ignored, descriptions)

    @property
    def model(self) -> str | None:
        return self._form.model

    @property
    def lora_path(self) -> str | None:
        return self._form.lora_path

    def inputs(self, adapter: AdapterLocation | None, max_texts: int, limits: RequestLimits) -> Inputs | None:
        if adapter is None:
            raise without_head("the base model")
        described = self._described = self._described or self._descriptions.known(adapter)
        if described is None:
            return None
        made = self.prompts(adapter.name, described.text, max_texts, described.tokens.limits(limits))
        return replace(made, tokenizer=described.tokens.tokenizer)

    async def prepare(self, adapter: AdapterLocation | None, limits: RequestLimits, owner: str) -> None:
        if adapter is not None:
            self._described = await self._descriptions.describe(adapter)

    def prompts(self, name: str, adapter: AdapterText, max_texts: int, limits: RequestLimits) -> Inputs:
        """Return the prompts of a request for an adapter. Raises InvalidRequest."""
        raise NotImplementedError

    def content(self, answered: ScoredAnswer) -> dict[str, Any]:
        """Return the answer. Raises InvalidRequest if the adapter has other labels than the request needs."""
        raise NotImplementedError

    async def respond(self, call: AdmittedCall) -> Response:
        answer = await compute_vectors(call, self._params, self._descriptions.forget)

        def render() -> bytes:
            return orjson.dumps(self.content(self._answered(call, answer)), option=orjson.OPT_SERIALIZE_NUMPY)

        large = answer.size_bytes > _RENDER_INLINE_BYTES
        content = await call.intake.on_thread(render) if large else render()
        return Response(content, headers=answer.headers, media_type="application/json")

    def _params(self) -> EmbedParams:
        assert self._described is not None, "called before `inputs`"
        return EmbedParams(pooling="last", normalize=False, head=self._head(self._described.text))

    @staticmethod
    def _head(adapter: AdapterText) -> HeadParams:
        classifier, reranking = adapter.embedding.classifier, adapter.reranking
        if classifier is None:
            return HeadParams(adapter.revision, None if reranking is None else reranking.tokens)
        return HeadParams(adapter.revision, labels=None if classifier.labels is None else len(classifier.labels))

    def _answered(self, call: AdmittedCall, answer: Embeddings) -> ScoredAnswer:
        assert self._described is not None, "called before `inputs`"
        tokens = answer.prompt_tokens
        return ScoredAnswer(
            id=self.id_prefix + uuid.uuid4().hex,
            model=self._form.model or call.model,
            created=int(time.time()),
            adapter=self._described.text,
            logits=answer.vectors,
            usage={"prompt_tokens": tokens, "total_tokens": tokens},
        )


def without_head(name: str) -> InvalidRequest:
    """Return the error for a model that computes no scores."""
    return InvalidRequest(
        f"model: expected an adapter for sequence classification (PEFT's task SEQ_CLS, whose score module is saved), "
        f"got {name}. Its vectors are at /v1/embeddings",
        param="model",
    )


def sigmoid(logits: Scores) -> Scores:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), np.float32)


def softmax(logits: Scores) -> Scores:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)


def only_score(answered: ScoredAnswer, *, use_activation: bool | None) -> Sequence[float]:
    """Return the relevance of each prompt: the sigmoid of its logit, or the logit.

    Args:
        use_activation: false for logits; else the adapter's folder says which.

    Raises:
        InvalidRequest: the adapter has several labels.
    """
    check_one_label(answered.model, answered.logits.shape[1])
    logits = answered.logits[:, 0]
    are_logits = use_activation is False or answered.adapter.embedding.scores_are_logits
    scores: list[float] = (logits if are_logits else sigmoid(logits)).tolist()
    return scores


def check_one_label(name: str, labels: int) -> None:
    """Raise InvalidRequest if an adapter has more labels than the one of a reranker."""
    if labels != 1:
        raise InvalidRequest(
            f"model: expected an adapter with one label, which is the relevance, got {name!r} with {labels}. Use "
            "/classify",
            param="model",
        )
