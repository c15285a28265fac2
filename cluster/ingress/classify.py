"""The task of `POST /classify`, in vLLM's form."""

from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import WithJsonSchema

from ranklet.cluster.ingress.intake import Inputs
from ranklet.cluster.ingress.known_fields import CLASSIFY_FIELDS, KnownFields
from ranklet.cluster.ingress.prompts import truncation_of
from ranklet.cluster.ingress.protocol import INPUT_SCHEMA, parse_input
from ranklet.cluster.ingress.scoring_prompts import ScoringPrompts
from ranklet.cluster.ingress.scoring_task import (
    ScoredAnswer,
    Scores,
    ScoringRequest,
    ScoringTask,
    sigmoid,
    softmax,
    without_head,
)
from ranklet.cluster.message import AdapterText
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.model.classifier import Classifier
from ranklet.replicas.model.tokenizer import TruncationSide


class ClassifyRequest(ScoringRequest):
    """Body of `POST /classify`. `known_fields` has the names of fields that are refused or ignored."""

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)]
    truncate_prompt_tokens: int | None = None
    truncation_side: TruncationSide | None = None
    add_special_tokens: bool | None = None


class ClassifyTask(ScoringTask[ClassifyRequest]):
    """Labels texts."""

    id_prefix: ClassVar[str] = "classify-"
    known_fields: ClassVar[KnownFields] = CLASSIFY_FIELDS
    form_type = ClassifyRequest

    def prompts(self, name: str, adapter: AdapterText, max_texts: int, limits: RequestLimits) -> Inputs:
        form, classifier = self._form, adapter.embedding.classifier
        if classifier is None:
            raise without_head(f"{name!r}, which has no head")
        values, longest = parse_input(form.input, max_texts), limits.longest_embedding(reads_last=True)
        truncation = truncation_of(form.truncate_prompt_tokens, form.truncation_side, longest, "right")
        adds = form.add_special_tokens is not False
        return Inputs(values, ScoringPrompts(limits, "input", longest, classifier.pad_id, adds, truncation))

    def content(self, answered: ScoredAnswer) -> dict[str, Any]:
        classifier = answered.adapter.embedding.classifier
        assert classifier is not None, "`prompts` has refused the request"
        logits = answered.logits
        probs = logits if self._form.use_activation is False else _activated(logits, classifier)
        best = np.argmax(probs, axis=1).tolist()
        return {
            "id": answered.id,
            "object": "list",
            "created": answered.created,
            "model": answered.model,
            "data": [
                {"index": index, "label": classifier.label(label), "probs": row, "num_classes": len(row)}
                for index, (label, row) in enumerate(zip(best, probs, strict=True))
            ],
            "usage": answered.usage,
        }


def _activated(logits: Scores, classifier: Classifier) -> Scores:
    if classifier.problem == "regression":
        return logits
    several = classifier.problem == "multi_label_classification" or logits.shape[1] == 1
    return sigmoid(logits) if several else softmax(logits)
