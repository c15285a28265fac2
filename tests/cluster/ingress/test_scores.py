"""The forms of /classify, /rerank and /score, with replicas that are fakes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.ingress.scoring import SCORING_PATHS
from ranklet.cluster.message import MAX_MESSAGE_BYTES, AdapterText
from ranklet.cluster.replica.ranklet_file import read_ranklet_file
from ranklet.cluster.reranking import Reranking
from ranklet.replicas.engine.params import HeadParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.classifier import MAX_LABELS, Classifier, Problem
from ranklet.replicas.model.embedding_settings import EmbeddingSettings
from tests.cluster.ingress.parts import BASE, MAX_MODEL_LEN, Parts

ADAPTER = "legal-v2"
RERANKS, SCORES = ("/v1/rerank", "/rerank", "/v2/rerank"), ("/score", "/v1/score")


@pytest.fixture(name="parts")
def _parts(tmp_path: Path) -> Parts:
    made = Parts(tmp_path)
    describe(made, Classifier(("spam", "ham", "eggs")), [0.0, 2.0, 1.0])
    return made


def describe(
    parts: Parts, classifier: Classifier | None, logits: list[float], revision: str = "v1",
    reranking: Reranking | None = None, *, scores_are_logits: bool = False,
) -> None:  # fmt: skip
    settings = EmbeddingSettings(
        prompt="never used: ", max_tokens=3, classifier=classifier, scores_are_logits=scores_are_logits
    )
    parts.handle.description_of_adapters = AdapterText(revision, None, {}, embedding=settings, reranking=reranking)
    parts.handle.logits[revision] = logits


async def ask(parts: Parts, path: str, **fields: Any) -> Any:
    answer = await parts.http.post(path, json={"model": ADAPTER, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refusal(parts: Parts, path: str, **fields: Any) -> tuple[str, str]:
    answer = await parts.http.post(path, json={"model": ADAPTER, **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    return error["param"], error["message"]


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


async def test_texts_are_labelled(parts: Parts) -> None:
    answer = await ask(parts, "/classify", input=["a b", "c"])
    assert (answer["object"], answer["model"]) == ("list", ADAPTER)
    assert answer["id"].startswith("classify-")
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    powers = [math.exp(each) for each in (0, 2, 1)]
    for index, each in enumerate(answer["data"]):
        assert (each["index"], each["label"], each["num_classes"]) == (index, "ham", 3)
        assert each["probs"] == pytest.approx([power / sum(powers) for power in powers])
    plain = (await ask(parts, "/classify", input="a b", use_activation=False))["data"][0]
    assert plain["probs"] == [2.0, 4.0, 3.0]
    assert parts.tokenizer.encoded == [["a b", "c"], ["a b"]]
    assert parts.handle.descriptions == 1


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("multi_label_classification", [sigmoid(1), sigmoid(3)]),
        ("regression", [1, 3]),
        ("single_label_classification", [sigmoid(-2), sigmoid(2)]),
    ],
)
async def test_probabilities_are_those_of_the_problem(parts: Parts, problem: Problem, expected: list[float]) -> None:
    describe(parts, Classifier(None, problem), [0.0, 2.0])
    (found,) = (await ask(parts, "/classify", input="a"))["data"]
    assert found["probs"] == pytest.approx(expected)
    assert found["label"] == "LABEL_1"


@pytest.mark.parametrize("labels", [tuple(map(str, range(MAX_LABELS))), None])
async def test_replies_with_many_labels_fit_into_messages(parts: Parts, labels: tuple[str, ...] | None) -> None:
    describe(parts, Classifier(labels), [0.0] * MAX_LABELS)
    answer = await ask(parts, "/classify", input=[[1]] * 300)
    assert [len(each["probs"]) for each in answer["data"]] == [MAX_LABELS] * 300
    assert all(4 * MAX_LABELS * len(call.prompts()) <= MAX_MESSAGE_BYTES for call in parts.handle.calls)


async def test_padding_at_the_end_of_a_prompt_is_left_out(parts: Parts) -> None:
    describe(parts, Classifier(None, None, pad_id=7), [0.0, 1.0])
    await ask(parts, "/classify", input=[[1, 7, 2, 7, 7], [7, 7], [3]])
    assert [ids.tolist() for ids in parts.handle.calls[-1].prompts()] == [[1, 7, 2], [7], [3]]


async def test_documents_are_ranked(parts: Parts) -> None:
    describe(parts, Classifier(("relevance",)), [-3.0])
    documents = ["a", {"text": "a long text"}, "a b"]
    for path in RERANKS:
        answer = await ask(parts, path, query="find", documents=documents)
        assert [(each["index"], each["document"]) for each in answer["results"]] == [
            (1, {"text": "a long text"}), (2, {"text": "a b"}), (0, {"text": "a"}),
        ]  # fmt: skip
        scores = [each["relevance_score"] for each in answer["results"]]
        assert scores == pytest.approx([sigmoid(1), sigmoid(0), sigmoid(-1)])
        assert answer["usage"]["total_tokens"] == 9
    assert parts.tokenizer.encoded[-1] == ["find a", "find a long text", "find a b"]
    best = await ask(parts, "/rerank", query="find", documents=documents, top_n=1, return_documents=False)
    assert best["results"] == [{"index": 1, "relevance_score": pytest.approx(sigmoid(1))}]


async def test_pairs_are_scored(parts: Parts) -> None:
    describe(parts, Classifier(None), [-3.0])
    for path in SCORES:
        answer = await ask(parts, path, text_1="a", text_2=["b", "c d"], use_activation=False)
        assert answer["data"] == [
            {"index": 0, "object": "score", "score": -1.0}, {"index": 1, "object": "score", "score": 0.0},
        ]  # fmt: skip
    await ask(parts, "/score", text_1=["a", "b"], text_2=["c", "d"])
    assert parts.tokenizer.encoded[-1] == ["a c", "b d"]


async def test_logits_are_scores_where_the_folder_says_so(parts: Parts) -> None:
    describe(parts, Classifier(None), [-3.0], scores_are_logits=True)
    for fields in ({}, {"use_activation": True}):
        answer = await ask(parts, "/score", text_1="a", text_2="b", **fields)
        assert [each["score"] for each in answer["data"]] == [-1.0]
    assert (await ask(parts, "/rerank", query="a", documents=["b"]))["results"][0]["relevance_score"] == -1.0


async def test_the_template_of_the_folder_makes_the_prompts(parts: Parts) -> None:
    reranking = Reranking("D {document} Q {query} :")
    describe(parts, Classifier(("relevance",)), [0.0], reranking=reranking)
    await ask(parts, "/rerank", query="{document}", documents=["b", "{query}"])
    assert parts.tokenizer.encoded[-1] == ["D b Q {document} :", "D {query} Q {document} :"]


async def test_logits_of_two_tokens_are_scores(parts: Parts) -> None:
    describe(parts, None, [-1.0], reranking=Reranking("{query} {document}", (4, 5)))
    answer = await ask(parts, "/score", text_1="a", text_2="b")
    assert answer["data"][0]["score"] == pytest.approx(sigmoid(1))
    assert parts.handle.calls[-1].params.head == HeadParams("v1", (4, 5))
    assert "which has no head" in (await refusal(parts, "/classify", input="a"))[1]


async def test_an_adapter_that_was_replaced_has_its_new_labels(parts: Parts) -> None:
    await ask(parts, "/classify", input="a")
    describe(parts, Classifier(("yes", "no")), [1.0, 0.0], "v2")
    assert (await ask(parts, "/classify", input="a"))["data"][0]["label"] == "yes"
    describe(parts, None, [], "v3")
    assert "which has no head" in (await refusal(parts, "/classify", input="a"))[1]


@pytest.mark.parametrize("path", [path for paths in SCORING_PATHS.values() for path in paths])
async def test_models_without_a_head_are_refused(parts: Parts, path: str) -> None:
    describe(parts, None, [])
    fields = {"input": "a", "query": "a", "documents": ["a"], "text_1": "a", "text_2": "a"}
    needed = {"/classify": ("input",)} | dict.fromkeys(RERANKS, ("query", "documents"))
    body = {name: fields[name] for name in needed.get(path, ("text_1", "text_2"))}
    assert "got 'legal-v2', which has no head" in (await refusal(parts, path, **body))[1]
    assert "got the base model" in (await refusal(parts, path, **body, model=BASE))[1]
    assert parts.handle.calls == []


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("/classify", {"input": []}, "input", "expected a text"),
        ("/classify", {"input": "a " * (MAX_MODEL_LEN + 1)}, "input", "input[0]: expected a prompt of 1 to"),
        ("/classify", {"input": [[1], [1000]]}, "input", "input[1]: expected token ids from 0 to 999"),
        ("/classify", {"input": "a", "softmax": False}, "softmax", "Use use_activation"),
        ("/rerank", {"query": "", "documents": ["a"]}, "query", "got an empty text"),
        ("/rerank", {"query": "a", "documents": "a"}, "documents", "expected a list of documents"),
        ("/rerank", {"query": "a", "documents": ["a", {"content": "a"}]}, "documents", "documents[1]: expected a text"),
        ("/rerank", {"query": "a", "documents": ["a"] * 5000}, "documents", "expected at most"),
        ("/rerank", {"query": "a" * 100_000, "documents": ["a"] * 1000}, "documents", "characters together"),
        ("/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n", "greater than or equal to 0"),
        ("/rerank", {"query": "a", "documents": ["a"], "top_k": 3}, "top_k", "Use top_n"),
        ("/rerank", {"query": "a", "documents": ["b " * MAX_MODEL_LEN]}, "documents", "documents[0]: expected"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "one text, or 3 as text_2 has"),
        ("/score", {"text_1": "a", "text_2": [1]}, "text_2", "text_2[0]: expected a text, got a number"),
    ],
)  # fmt: skip
async def test_bad_requests_name_the_field(
    parts: Parts, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    describe(parts, Classifier(("relevance",)), [0.0])
    found = await refusal(parts, path, **fields)
    assert found[0] == param
    assert message in found[1]
    assert parts.handle.calls == []


@pytest.mark.parametrize("labels", [("a", "b"), None])
async def test_rerankers_have_one_label(parts: Parts, labels: tuple[str, ...] | None) -> None:
    describe(parts, Classifier(labels), [0.0, 1.0])
    param, message = await refusal(parts, "/rerank", query="a", documents=["a"])
    assert param == "model"
    assert "expected an adapter with one label" in message
    assert "with 2. Use /classify" in message


async def test_keys_have_their_rights_and_quotas(tmp_path: Path) -> None:
    parts = Parts(tmp_path, keys={"team": ((ADAPTER,), 1000), "other": (("finance",), None)})
    describe(parts, Classifier(("relevance",)), [0.0])
    body = {"model": ADAPTER, "query": "a", "documents": ["b " * 600]}

    async def status(key: str) -> int:
        headers = {"authorization": f"Bearer {parts.secrets[key]}"}
        return (await parts.http.post("/rerank", json=body, headers=headers)).status_code

    assert [await status("team"), await status("team"), await status("other")] == [200, 429, 403]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rerank": []}, "expected an object with template"),
        ({"rerank": {"other": 1}}, "expected an object with template"),
        ({"rerank": {"true_token_id": 4}}, "expected two different token ids, got None and 4"),
        ({"rerank": {"template": "{query}"}}, "{query} and {document} once each"),
        ({"rerank": {"template": "{query}{query}{document}"}}, "{query} and {document} once each"),
    ],
)
def test_faulty_templates_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    (tmp_path / "ranklet.json").write_text(json.dumps(content))
    with pytest.raises(InvalidRequest) as refused:
        read_ranklet_file(tmp_path)
    assert message in str(refused.value)


def test_a_template_is_read(tmp_path: Path) -> None:
    template = "Q: {query}\nD: {document}\nA:"
    for tokens, expected in (({}, None), ({"true_token_id": 4, "false_token_id": 5}, (5, 4))):
        (tmp_path / "ranklet.json").write_text(json.dumps({"rerank": {"template": template, **tokens}}))
        assert read_ranklet_file(tmp_path).reranking == Reranking(template, expected)
