"""Answers over the real path (HTTP, HAProxy, gateway, router, replica, engine) against transformers and peft."""

import asyncio
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ranklet.cluster.message import MAX_MESSAGE_PROMPTS
from ranklet.replicas.model.tokenizer import PromptTokenizer, load_backend
from tests.assets.adapters import AdapterSpec
from tests.assets.classifiers import reference_logits, save_classifier
from tests.assets.oracle import Prompt, cosine, encode
from tests.cluster.service import BASE, TIMEOUT_S, Service, assert_close

TEXTS: list[Prompt] = [
    "The tenant shall give notice three months before the end of the lease.",
    "A patient with a history of asthma.",
    "def parse(text): return text.split()",
    "größer als zwei, 三个, и четыре",
]


@pytest.fixture(scope="module")
def names(adapter_specs: list[AdapterSpec]) -> list[str]:
    return [spec.name for spec in adapter_specs]


def test_the_base_and_every_adapter_agree_with_transformers_and_peft(service: Service, names: list[str]) -> None:
    base = service.embed(BASE, TEXTS)
    assert_close(base, service.expected(None, TEXTS))
    for name in names:
        vectors = service.embed(name, TEXTS)
        assert_close(vectors, service.expected(name, TEXTS))
        assert cosine(vectors[0], base[0]) < 0.999, f"{name} answers like the base model"


def test_the_openai_client_gets_the_same_vectors_in_both_encodings(service: Service, names: list[str]) -> None:
    with service.openai() as client:
        encoded = client.embeddings.create(model=names[0], input=[str(text) for text in TEXTS])
        plain = client.embeddings.create(model=names[0], input=str(TEXTS[1]), encoding_format="float")
    expected = service.expected(names[0], TEXTS)
    assert_close([entry.embedding for entry in encoded.data], expected)
    assert_close(plain.data[0].embedding, expected[1])
    assert [entry.index for entry in encoded.data] == [0, 1, 2, 3]
    tokens = sum(len(encode(service.model_dir, str(text))) for text in TEXTS)
    assert (encoded.usage.prompt_tokens, encoded.usage.total_tokens) == (tokens, tokens)
    assert encoded.model == names[0]


def test_an_adapter_can_be_named_in_three_ways(service: Service) -> None:
    expected = service.expected("medical", TEXTS[:1])
    assert_close(service.embed("medical", TEXTS[0]), expected)
    assert_close(service.embed(f"{BASE}:medical", TEXTS[0]), expected)
    assert_close(service.embed(BASE, TEXTS[0], lora_path="medical"), expected)
    assert_close(service.embed(None, TEXTS[0], lora_path="medical"), expected)


def test_token_ids_are_embedded_like_their_texts(service: Service) -> None:
    ids = [encode(service.model_dir, str(text)) for text in TEXTS[:3]]
    expected = service.expected("legal-v2", TEXTS[:3])
    assert_close(service.embed("legal-v2", ids), expected)
    assert_close(service.embed("legal-v2", ids[1]), expected[1:2])


def test_dimensions_truncates_and_normalises_vectors(service: Service) -> None:
    for width in (48, 1):
        vectors = service.embed("legal-v2", TEXTS, dimensions=width)
        assert vectors.shape == (4, width)
        assert_close(vectors, service.expected("legal-v2", TEXTS, dimensions=width))
        assert_close(np.linalg.norm(vectors, axis=1), np.ones(4))


def test_truncated_texts_get_the_vectors_of_their_first_tokens_and_the_end_token(service: Service) -> None:
    text = "word " * 40_000 + "end"
    *words, end = encode(service.model_dir, str(TEXTS[0]))
    assert_close(
        service.embed("medical", TEXTS[0], truncate_prompt_tokens=5),
        service.expected("medical", [[*words[:4], end]]),
    )
    assert service.post("medical", text).status_code == 400
    answer = service.post("medical", text, truncate_prompt_tokens=-1)
    assert (answer.status_code, answer.json()["usage"]["prompt_tokens"]) == (200, 4096)
    plain = service.embed("medical", TEXTS[0], add_special_tokens=False)
    assert_close(plain, service.expected("medical", [words]))
    assert cosine(plain[0], service.embed("medical", TEXTS[0])[0]) < 0.999


def test_probes_slashes_and_compressed_bodies_reach_the_gateway(service: Service) -> None:
    head = service.http.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    body = gzip.compress(json.dumps({"model": "medical", "input": TEXTS[0]}).encode())
    answer = service.http.post("/v1/embeddings/", content=body, headers={"content-encoding": "gzip"})
    assert_close(answer.json()["data"][0]["embedding"], service.embed("medical", TEXTS[0])[0])
    assert "/metrics/targets" in service.http.get("/metrics").json()["error"]["message"]


async def test_concurrent_requests_for_different_adapters_get_their_own_answers(
    service: Service, names: list[str]
) -> None:
    expected = {name: service.expected(name, TEXTS) for name in names} | {BASE: service.expected(None, TEXTS)}
    jobs = [(list(expected)[number % 7], number % 4) for number in range(140)]
    async with httpx.AsyncClient(base_url=service.url, timeout=TIMEOUT_S, trust_env=False) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/embeddings", json={"model": model, "input": TEXTS[text]}) for model, text in jobs)
        )
    for (model, text), answer in zip(jobs, answers, strict=True):
        assert answer.status_code == 200
        assert_close(answer.json()["data"][0]["embedding"], expected[model][text])


def test_the_vectors_of_a_large_request_are_in_the_order_of_its_texts(service: Service) -> None:
    texts: list[Prompt] = [f"paragraph number {number} about leases" for number in range(2048)]
    assert len(texts) > 2 * MAX_MESSAGE_PROMPTS
    vectors = service.embed("medical", texts)
    assert vectors.shape == (2048, 128)
    sampled = [0, 1, 1023, 2047]
    assert_close(vectors[sampled], service.expected("medical", [texts[index] for index in sampled]))


def test_requests_for_an_adapter_go_to_the_replica_that_has_it(service: Service, names: list[str]) -> None:
    for name in names:
        service.embed(name, TEXTS[0])
        answers = [service.post(name, TEXTS[0]) for _ in range(10)]
        assert len({answer.headers["x-ranklet-replica"] for answer in answers}) == 1
        assert {answer.headers["x-ranklet-tier"] for answer in answers} == {"gpu"}
        assert {answer.headers["x-ranklet-backend"] for answer in answers} == {"native"}


def test_headers_name_the_request_and_the_replica(service: Service) -> None:
    answer = service.http.post("/v1/embeddings", json={"model": BASE, "input": "a"}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-ranklet-replica"] in service.processes("Replica")
    assert answer.headers["x-ranklet-backend"] == "none"
    assert "x-ranklet-tier" not in answer.headers
    assert service.post(BASE, "a").headers["x-request-id"]


def test_models_are_listed_as_openai_cards(service: Service, names: list[str]) -> None:
    with service.openai() as client:
        cards = {card.id: card.model_dump() for card in client.models.list()}
        one = client.models.retrieve("legal-v2").model_dump()
    assert set(cards) >= {BASE, *names}
    assert cards["legal-v2"] == one
    assert one["parent"] == BASE
    assert one["root"].endswith("legal-v2")
    assert one["max_model_len"] == 4096
    assert cards[BASE]["parent"] is None
    assert service.http.get(f"/v1/models/{BASE}:legal-v2").json()["id"] == "legal-v2"


def test_health_readiness_and_versions(service: Service) -> None:
    assert service.http.get("/health").json() == {"status": "ok"}
    assert service.http.get("/ready").json()["status"] == "ready"
    assert service.http.get("/-/healthz").text == "success"
    versions = service.http.get("/version").json()
    assert versions["ray"].startswith("2.60.")
    assert (versions["data_path"], versions["throughput_optimized"]) == ("haproxy", True)


def test_gateways_do_without_torch(service: Service) -> None:
    for pid in service.processes("Gateway").values():
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_sixteen_clients_are_served_at_once(service: Service) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: service.post(BASE, f"text {number}").status_code, range(200)))
    assert set(answers) == {200}


def test_classifiers_label_and_rank_texts_as_transformers_and_peft_do(service: Service) -> None:
    lora: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "down_proj"]}
    topics = save_classifier(service.model_dir, service.adapters / "topics", ("law", "medicine", "code"), **lora)
    ranker = save_classifier(service.model_dir, service.adapters / "ranker", ("relevance",), seed=1, **lora)
    pad_id = json.loads((service.model_dir / "config.json").read_text()).get("pad_token_id")
    texts = [str(text) for text in TEXTS]

    answer = service.http.post("/classify", json={"model": "topics", "input": texts, "use_activation": False})
    assert answer.status_code == 200, answer.text
    expected = reference_logits(service.model_dir, topics, [encode(service.model_dir, text) for text in texts], pad_id)
    assert_close([each["probs"] for each in answer.json()["data"]], expected)

    backend = load_backend(service.model_dir)
    pairs = [backend.encode(texts[0], text).ids for text in texts]
    logits = reference_logits(service.model_dir, ranker, pairs, pad_id)[:, 0]
    answer = service.http.post("/v1/rerank", json={"model": "ranker", "query": texts[0], "documents": texts})
    found = {each["index"]: each["relevance_score"] for each in answer.json()["results"]}
    assert_close([found[index] for index in range(len(texts))], 1 / (1 + np.exp(-logits)))
    assert list(found.values()) == sorted(found.values(), reverse=True)

    (cut,) = PromptTokenizer(service.model_dir).beginnings([texts[1]], [3])
    ids = [backend.encode(texts[0], cut[0]).ids]
    asked = {"model": "ranker", "query": texts[0], "documents": [texts[1]], "max_tokens_per_doc": 3}
    (found_cut,) = service.http.post("/v1/rerank", json=asked).json()["results"]
    (logit,) = reference_logits(service.model_dir, ranker, ids, pad_id)[:, 0]
    assert_close([found_cut["relevance_score"]], [1 / (1 + np.exp(-logit))])
    cards = [service.http.get(f"/v1/models/{name}").json()["ranklet"] for name in ("topics", "ranker", "legal-v2")]
    assert [card["tasks"] for card in cards] == [["classify"], ["classify", "rerank", "score"], ["embeddings"]]

    refused = [service.post("topics", "a"), service.http.post("/classify", json={"model": "legal-v2", "input": "a"})]
    assert [answer.json()["error"]["param"] for answer in refused] == ["model", "model"]
    assert "It answers at /classify" in refused[0].text
    assert "got 'legal-v2', which has no head" in refused[1].text
