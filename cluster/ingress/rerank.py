"""The tasks of `/rerank`, in the forms of Cohere, Jina and vLLM, and of `/score`, in vLLM's form."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from ranklet.cluster.ingress.descriptions import AdapterDescriptions
from ranklet.cluster.ingress.intake import Inputs
from ranklet.cluster.ingress.known_fields import RERANK_FIELDS, SCORE_FIELDS, KnownFields
from ranklet.cluster.ingress.pair_prompts import PairPrompts, paired
from ranklet.cluster.ingress.prompts import truncation_of
from ranklet.cluster.ingress.protocol import check_count, describe_value
from ranklet.cluster.ingress.scoring_task import (
    ScoredAnswer,
    ScoringRequest,
    ScoringTask,
    check_one_label,
    only_score,
    without_head,
)
from ranklet.cluster.message import AdapterText
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest

_TEXT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]}
_DOCUMENT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
_DOCUMENTS_SCHEMA = {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, _DOCUMENT]}}


class RerankRequest(ScoringRequest):
    """Body of `POST /v1/rerank`. `known_fields` has the names of fields that are refused or ignored."""

    query: str
    documents: Annotated[Any, WithJsonSchema(_DOCUMENTS_SCHEMA)]
    top_n: Annotated[int | None, Field(ge=0)] = None  # 0 answers with all documents, as in vLLM
    return_documents: bool | None = None  # true by default
    truncate_prompt_tokens: int | None = None
    max_tokens_per_doc: Annotated[int | None, Field(ge=1)] = None


class ScoreRequest(ScoringRequest):
    """Body of `POST /score`. One `text_1` is compared with each `text_2`; otherwise, both have as many texts."""

    text_1: Annotated[Any, WithJsonSchema(_TEXT_SCHEMA)]
    text_2: Annotated[Any, WithJsonSchema(_TEXT_SCHEMA)]
    truncate_prompt_tokens: int | None = None


class RerankTask(ScoringTask[RerankRequest]):
    """Orders documents by their relevance to a query."""

    id_prefix: ClassVar[str] = "rerank-"
    known_fields: ClassVar[KnownFields] = RERANK_FIELDS
    form_type = RerankRequest

    def __init__(self, form: RerankRequest, ignored: tuple[str, ...], descriptions: AdapterDescriptions) -> None:
        super().__init__(form, ignored, descriptions)
        self._documents: list[str] = []

    def prompts(self, name: str, adapter: AdapterText, max_texts: int, limits: RequestLimits) -> Inputs:
        if not self._form.query:
            raise InvalidRequest("query: expected a text, got an empty text", param="query")
        self._documents = _texts("documents", self._form.documents, max_texts, is_object=True)
        form = self._form
        return _pair_inputs(
            name, adapter, [form.query], self._documents, limits, "documents", form.truncate_prompt_tokens,
            form.max_tokens_per_doc,
        )  # fmt: skip

    def content(self, answered: ScoredAnswer) -> dict[str, Any]:
        form = self._form
        scores = only_score(answered, use_activation=form.use_activation)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": scores[index]} for index in order[: form.top_n or None]
        ]
        if form.return_documents is not False:
            for result in results:
                result["document"] = {"text": self._documents[result["index"]]}
        return {"id": answered.id, "model": answered.model, "results": results, "usage": answered.usage}


class ScoreTask(ScoringTask[ScoreRequest]):
    """Scores pairs of texts."""

    id_prefix: ClassVar[str] = "score-"
    known_fields: ClassVar[KnownFields] = SCORE_FIELDS
    form_type = ScoreRequest

    def prompts(self, name: str, adapter: AdapterText, max_texts: int, limits: RequestLimits) -> Inputs:
        form = self._form
        first, second = (_texts(field, getattr(form, field), max_texts) for field in ("text_1", "text_2"))
        if len(first) not in (1, len(second)):
            raise InvalidRequest(
                f"text_1: expected one text, or {len(second)} as text_2 has, got {len(first)}", param="text_1"
            )
        return _pair_inputs(name, adapter, first, second, limits, "text_2", form.truncate_prompt_tokens)

    def content(self, answered: ScoredAnswer) -> dict[str, Any]:
        scores = only_score(answered, use_activation=self._form.use_activation)
        return {
            "id": answered.id,
            "object": "list",
            "created": answered.created,
            "model": answered.model,
            "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
            "usage": answered.usage,
        }


def _pair_inputs(
    name: str, adapter: AdapterText, first: Sequence[str], second: Sequence[str], limits: RequestLimits, param: str,
    truncate_prompt_tokens: int | None, second_tokens: int | None = None,
) -> Inputs:  # fmt: skip
    classifier, reranking = adapter.embedding.classifier, adapter.reranking
    if classifier is None and (reranking is None or reranking.tokens is None):
        raise without_head(f"{name!r}, which has no head")
    if classifier is not None and classifier.labels is not None:
        check_one_label(name, len(classifier.labels))
    own = adapter.embedding
    folder_limit = own.max_tokens if own.cross_encoder or own.logit_score is not None else None
    longest = limits.longest_embedding(reads_last=True, folder_limit=folder_limit)
    pad_id = None if classifier is None else classifier.pad_id
    truncation = truncation_of(truncate_prompt_tokens, None, longest, "right")
    rules = PairPrompts(
        limits, param, longest, pad_id, truncation=truncation, reranking=reranking, second_tokens=second_tokens
    )
    return Inputs(paired(first, second, reranking, param), rules)


def _texts(param: str, value: Any, max_texts: int, *, is_object: bool = False) -> list[str]:
    """Return the texts of a field: a list, or one text where the elements are no objects."""
    values = [value] if isinstance(value, str) and not is_object else value
    if not isinstance(values, list) or not values:
        expected = "a list of documents" if is_object else "a text or a list of texts"
        raise InvalidRequest(f"{param}: expected {expected}, got {describe_value(value)}", param=param)
    check_count(values, max_texts, param)
    texts = []
    for index, each in enumerate(values):
        text = each.get("text") if is_object and isinstance(each, dict) else each
        if not isinstance(text, str):
            expected = "a text or an object with a text" if is_object else "a text"
            got = describe_value(each)
            raise InvalidRequest(f"{param}[{index}]: expected {expected}, got {got}", param=param)
        texts.append(text)
    return texts
