"""Requests of the demo, sent over HTTP with the openai client, and their reference answers."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from openai import OpenAI

from tests.assets.adapters import AdapterSpec, adapter_specs
from tests.assets.corpus import SENTENCES

Vectors = dict[str, np.ndarray]  # float32 [texts, hidden] by model name

BASE_MODEL = "demo-base"  # as deploy/local.yaml names it


@dataclass(frozen=True)
class Question:
    """A model name and its texts, each sent as a request of its own. `adapter` is None for the base model."""

    model: str
    texts: tuple[str, ...]
    adapter: AdapterSpec | None


@dataclass(frozen=True)
class Row:
    """Answers to one question and their latencies."""

    question: Question
    vectors: np.ndarray  # float32 [texts, hidden]
    tiers: tuple[str, ...]  # where requests found the adapter, without repeats
    backend: str
    first_s: float  # the first request may load the adapter
    then_s: float  # median of the rest


def questions(folder: Path) -> list[Question]:
    """Return a question for the base model and one for each adapter, with texts of its field."""
    made = [Question(BASE_MODEL, SENTENCES["general"], None)]
    for spec in adapter_specs(folder / "adapters"):
        made.append(Question(spec.name, SENTENCES[spec.name.split("-")[0]], spec))
    return made


def answers(url: str, sent: list[Question]) -> list[Row]:
    """Send each text as a request of its own, so that a latency is that of one text."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        return [_answer(client, question) for question in sent]


def _answer(client: OpenAI, question: Question) -> Row:
    vectors, seconds, tiers, backend = [], [], [], ""
    for text in question.texts:
        started_s = time.perf_counter()
        raw = client.embeddings.with_raw_response.create(model=question.model, input=text)
        vectors.append(np.asarray(raw.parse().data[0].embedding, np.float32))
        seconds.append(time.perf_counter() - started_s)
        tiers.append(raw.headers.get("x-ranklet-tier") or "")
        backend = raw.headers.get("x-ranklet-backend", "")
    return Row(
        question=question,
        vectors=np.stack(vectors),
        tiers=tuple(dict.fromkeys(tier for tier in tiers if tier)),
        backend=backend,
        first_s=seconds[0],
        then_s=float(np.median(seconds[1:])),
    )


def reference(model_dir: Path, sent: list[Question]) -> Vectors:
    from tests.assets.oracle import reference_embedding

    paths = {question.model: question.adapter.path if question.adapter else None for question in sent}
    return {question.model: reference_embedding(model_dir, paths[question.model], question.texts) for question in sent}
