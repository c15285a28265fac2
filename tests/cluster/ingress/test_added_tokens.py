"""A gateway uses the tokens that an adapter's tokenizer adds for all of its requests, and for no others."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.tokenize import TokenizeApi
from ranklet.cluster.message import AdapterText, InferenceCall
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidAdapter, InvalidRequest
from ranklet.replicas.model.added_tokens import AddedToken, AddedTokens
from ranklet.replicas.model.classifier import Classifier
from ranklet.replicas.model.embedding_settings import EmbeddingSettings
from tests.cluster.ingress.parts import Parts
from tests.cluster.ingress.text_parts import LIMITS, DescribingReplica, TextParts
from tests.cluster.ingress.text_replica import reply
from tests.cluster.text.small_tokenizers import id_of
from tests.cluster.text_client import CHAT, COMPLETIONS, events_of

ADAPTER = "legal-v2"
USER, END, NOTE, LAST = range(402, 406)  # behind the ids of the small tokenizer, and of the model
ADDED = AddedTokens.of(
    [
        AddedToken("<|user|>", USER, special=True),
        AddedToken("<|end|>", END, special=True),
        AddedToken("<note>", NOTE),
        AddedToken("日本 €", LAST),
    ]
)
HI = [id_of("byte_level", letter) for letter in "hi"]
Call = InferenceCall[GenerateParams]
MakeParts = Callable[..., TextParts]


def answering(*tokens: int) -> Any:
    """Return a script that sends each token alone."""

    async def script(replica: Any, call: Call) -> Any:
        replica.begin(call.number)
        for i, token in enumerate(tokens):
            replica.send((call.number, 0, i, (token,), [(-0.5, ((token, -0.5), (NOTE, -1.0)))]))
        return reply(tokens)

    return script


@pytest.fixture
async def make_parts(tmp_path: Path) -> AsyncIterator[MakeParts]:
    made: list[TextParts] = []

    def make(*scripts: Any, added: AddedTokens = ADDED, **special: str) -> TextParts:
        replica = DescribingReplica(*scripts)
        replica.template = "<|user|>{{ messages[0].content }}{{ eos_token }}"
        replica.added, replica.special_tokens = added, special
        made.append(TextParts(tmp_path, replica))
        return made[-1]

    yield make
    for parts in made:
        parts.close()


async def text(parts: TextParts, path: str = COMPLETIONS, **fields: Any) -> Any:
    answer = await parts.http_post(path, {"model": ADAPTER, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def prompt_of(parts: TextParts) -> list[int]:
    return list(parts.replica.calls[-1].prompts()[0].tolist())


async def test_a_chat_is_written_and_answered_with_them(make_parts: MakeParts) -> None:
    tokens = (HI[0], USER, NOTE, LAST, HI[1], END)
    parts = make_parts(*[answering(*tokens)] * 3, eos_token="<|end|>")
    fields = {"messages": [{"role": "user", "content": "a<note>"}], "max_tokens": 9}
    whole = await text(parts, CHAT, **fields)
    backend = parts.texts.tokens.backend
    assert prompt_of(parts) == [USER, *backend.encode("a").ids, NOTE, END]
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == "h<note>日本 €i"
    assert choice["finish_reason"] == "stop"
    assert whole["usage"] == {**whole["usage"], "prompt_tokens": 4, "completion_tokens": 6}
    streamed = await parts.http_post(CHAT, {"model": ADAPTER, "stream": True, **fields})
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events_of(streamed.content)]
    assert "".join(pieces) == choice["message"]["content"]
    shown = await text(parts, CHAT, skip_special_tokens=False, logprobs=True, top_logprobs=2, **fields)
    (choice,) = shown["choices"]
    assert choice["message"]["content"] == "h<|user|><note>日本 €i"
    records = choice["logprobs"]["content"]
    assert [record["token"] for record in records] == ["h", "<|user|>", "<note>", "日本 €", "i", "<|end|>"]
    assert bytes(records[3]["bytes"]).decode() == "日本 €"
    assert records[0]["top_logprobs"][1]["token"] == "<note>"


async def test_stop_strings_and_echo_know_them(make_parts: MakeParts) -> None:
    parts = make_parts(answering(HI[0], NOTE, HI[1]), answering(HI[0]))
    stopped = await text(parts, prompt="a", stop=["<no"], max_tokens=9)
    assert stopped["choices"][0]["stop_reason"] == "<no"
    assert "note" not in stopped["choices"][0]["text"]
    echoed = await text(parts, prompt="a<note>", echo=True, max_tokens=1)
    assert echoed["choices"][0]["text"].startswith("a<note>")


async def test_their_ids_are_valid_for_the_adapter_alone(make_parts: MakeParts) -> None:
    parts = make_parts(*[answering(HI[0])] * 5)
    fields: list[dict[str, Any]] = [
        {"prompt": [50, LAST]},
        {"prompt": "a", "logit_bias": {str(LAST): 1}},
        {"prompt": "a", "stop_token_ids": [LAST]},
        {"prompt": "a", "allowed_token_ids": [LAST]},
    ]
    for each in fields:
        await text(parts, max_tokens=1, **each)
        beyond = behind(each)
        answer = await parts.http_post(COMPLETIONS, {"model": ADAPTER, "max_tokens": 1, **beyond})
        assert (answer.status_code, f"{LAST + 1}" in answer.text) == (400, True), answer.text
        answer = await parts.http_post(COMPLETIONS, {"model": "base", "max_tokens": 1, **each})
        assert (answer.status_code, f"{LAST}" in answer.text) == (400, True), answer.text


def behind(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with the id behind the last one."""
    changed: dict[str, Any] = dict(fields)
    for name, value in fields.items():
        if isinstance(value, list):
            changed[name] = [LAST + 1 if each == LAST else each for each in value]
        if isinstance(value, dict):
            changed[name] = {str(LAST + 1): 1}
    return changed


async def test_an_id_beyond_all_is_refused_before_the_adapter_is_known(make_parts: MakeParts) -> None:
    parts = make_parts()
    answer = await parts.http_post(COMPLETIONS, {"model": ADAPTER, "prompt": "a", "stop_token_ids": [99_999]})
    assert answer.status_code == 400
    assert parts.replica.described == 0


async def test_the_bases_requests_are_as_before(make_parts: MakeParts) -> None:
    parts = make_parts(answering(HI[0]), answering(HI[0]), answering(HI[0], LAST))
    await text(parts, prompt="<note>")
    assert prompt_of(parts) == [NOTE]
    answer = await parts.http_post(COMPLETIONS, {"model": "base", "prompt": "<note>"})
    assert answer.status_code == 200
    assert prompt_of(parts) == parts.texts.tokens.backend.encode("<note>").ids
    assert max(prompt_of(parts)) < LIMITS.vocab
    answer = await parts.http_post(COMPLETIONS, {"model": "base", "prompt": "a", "max_tokens": 2})
    assert "日本" not in answer.json()["choices"][0]["text"]


async def test_an_adapter_that_is_replaced_gets_its_new_tokens(make_parts: MakeParts) -> None:
    parts = make_parts(*[answering(HI[0])] * 2)
    await text(parts, prompt="<note><new>")
    assert prompt_of(parts)[0] == NOTE
    parts.replica.revision = "v2"
    parts.replica.added = AddedTokens.of([AddedToken("<new>", USER)])
    parts.texts.forget(location(parts))
    await text(parts, prompt="<note><new>")
    assert prompt_of(parts)[-1] == USER


def location(parts: TextParts, name: str = ADAPTER) -> AdapterLocation:
    return AdapterLocation(name, str(parts.folder / name))


async def test_adapters_with_equal_tokens_share_a_tokenizer_and_few_are_kept(make_parts: MakeParts) -> None:
    parts = make_parts()

    async def described(name: str, tokens: list[AddedToken]) -> Any:
        parts.replica.added = AddedTokens.of(tokens)
        return await parts.texts.describe(location(parts, name), LIMITS)

    tokens = list(ADDED.tokens)
    one, other = [await described(name, list(tokens)) for name in ("a", "b")]
    assert one.tokens is other.tokens
    assert (await described("c", [])).tokens is parts.texts.tokens
    for i in range(64):
        await described(f"other-{i}", [AddedToken(f"<{i}>", USER)])
    asked = parts.replica.described
    assert parts.texts.known(location(parts, "a"), LIMITS) is None
    again = await parts.texts.describe(location(parts, "a"), LIMITS)
    assert parts.replica.described == asked  # only the tokenizer was made again
    assert again.tokens.backend.token_to_id("<note>") == NOTE


async def test_tokens_that_get_other_ids_are_refused(make_parts: MakeParts) -> None:
    parts = make_parts(added=AddedTokens.of([AddedToken("<note>", 900)]))
    with pytest.raises(InvalidAdapter, match="expected the id 900 for '<note>', got 402"):
        await parts.texts.describe(location(parts), LIMITS)


async def test_the_tokenizers_endpoints(make_parts: MakeParts) -> None:
    parts = make_parts(eos_token="<|end|>")
    services = parts.services
    api = TokenizeApi(
        parts.limits, services.keys, parts.admission, services.names, services.intake, services.replicas, parts.texts
    )
    app = Starlette(
        routes=[
            Route("/tokenize", api.tokenize, methods=["POST"]),
            Route("/detokenize", api.detokenize, methods=["POST"]),
            Route("/tokenizer_info", api.tokenizer_info),
        ]
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        fields: dict[str, Any] = {"model": ADAPTER, "prompt": "<note>a", "return_token_strs": True}
        made = (await client.post("/tokenize", json=fields)).json()
        assert made["tokens"][0] == NOTE
        assert made["token_strs"] == ["<note>", "a"]
        chat = {"model": ADAPTER, "messages": [{"role": "user", "content": "a"}]}
        assert (await client.post("/tokenize", json=chat)).json()["tokens"] == [USER, made["tokens"][1], END]
        answer = await client.post("/detokenize", json={"model": ADAPTER, "tokens": [USER, LAST]})
        assert answer.json() == {"prompt": "<|user|>日本 €"}
        with pytest.raises(InvalidRequest, match="expected token ids from 0 to 399, got 402"):
            await client.post("/detokenize", json={"model": "base", "tokens": [USER, LAST]})
        info = (await client.get("/tokenizer_info", params={"model": ADAPTER})).json()
        assert info["eos_token"] == "<|end|>"
        assert (await client.get("/tokenizer_info")).json()["eos_token"] == "<s>"


async def test_vectors_are_of_prompts_with_them(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    settings = EmbeddingSettings(added_tokens=ADDED.digest)
    parts.handle.description_of_adapters = AdapterText("v1", None, {}, embedding=settings, added_tokens=ADDED)
    for calls in (2, 3):  # the first one was refused, since the gateway did not know of the tokens
        answer = await parts.post(ADAPTER, "one two")
        assert answer.status_code == 200
        assert parts.handle.calls[-1].prompts()[0].tolist() == [len(ADDED.tokens)] * 2
        assert len(parts.handle.calls) == calls
    assert (await parts.post("base", "one two")).status_code == 200
    assert parts.handle.calls[-1].prompts()[0].tolist() == [1, 1]
    assert (await parts.post(ADAPTER, [[LAST]])).status_code == 200


async def test_scores_are_of_prompts_with_them(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    settings = replace(EmbeddingSettings(added_tokens=ADDED.digest), classifier=Classifier())
    parts.handle.description_of_adapters = AdapterText("v1", None, {}, embedding=settings, added_tokens=ADDED)
    parts.handle.logits["v1"] = [0.0]
    answer = await parts.http.post("/classify", json={"model": ADAPTER, "input": "one two"})
    assert answer.status_code == 200, answer.text
    assert parts.handle.calls[-1].prompts()[0].tolist() == [len(ADDED.tokens)] * 2
