"""Embeddings that the demo requests over HTTP with the openai client."""

import time
from dataclasses import dataclass

import numpy as np
from openai import OpenAI

from tests.assets.adapters import AdapterSpec
from tests.assets.corpus import SENTENCES
from tests.demo.models import DemoModel


@dataclass(frozen=True)
class EmbeddedTexts:
    """A model name and its texts, each sent as a request of its own. `adapter` is None for the base model."""

    model: str
    texts: tuple[str, ...]
    adapter: AdapterSpec | None


@dataclass(frozen=True)
class Row:
    """Vectors of one model and their latencies."""

    sent: EmbeddedTexts
    vectors: np.ndarray  # float32 [texts, hidden]
    tiers: tuple[str, ...]  # where requests found the adapter, without repeats
    first_s: float  # the first request may load the adapter
    then_s: float  # median of the rest


def texts_of(served: DemoModel) -> list[EmbeddedTexts]:
    """Return texts for the base model, and for each adapter texts of its field."""
    made = [EmbeddedTexts(served.base, SENTENCES["general"], None)]
    return made + [
        EmbeddedTexts(adapter.name, SENTENCES[served.fields[adapter.name]], adapter) for adapter in served.adapters
    ]


def embeddings(url: str, sent: list[EmbeddedTexts]) -> list[Row]:
    """Send each text as a request of its own, so that a latency is that of one text."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        return [_embed(client, each) for each in sent]


def _embed(client: OpenAI, sent: EmbeddedTexts) -> Row:
    vectors, seconds, tiers = [], [], []
    for text in sent.texts:
        started_s = time.perf_counter()
        raw = client.embeddings.with_raw_response.create(model=sent.model, input=text)
        vectors.append(np.asarray(raw.parse().data[0].embedding, np.float32))
        seconds.append(time.perf_counter() - started_s)
        tiers.append(raw.headers.get("x-ranklet-tier") or "")
    return Row(
        sent=sent,
        vectors=np.stack(vectors),
        tiers=tuple(dict.fromkeys(tier for tier in tiers if tier)),
        first_s=seconds[0],
        then_s=float(np.median(seconds[1:])),
    )
