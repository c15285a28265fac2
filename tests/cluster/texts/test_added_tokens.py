"""An adapter with tokens and rows of its own is served as transformers and PEFT make it of its folder."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from tests.assets.text_oracle import chosen_logprobs, reference_text
from tests.assets.token_rows import save_resized_adapter
from tests.cluster.service import BASE, Service, assert_close, eventually
from tests.cluster.text_client import CHAT, COMPLETIONS, TextService
from tests.replicas.text_scene import LOGPROB_ERROR

ADAPTER, PLAIN = "resized-tokens", "legal-v2"
NOTE, TURN = "<note>", "<|turn|>"
TEXT = f"When{NOTE} does the contract{TURN} end?"
MESSAGES = [{"role": "user", "content": f"When does{NOTE} it end?"}]
TEMPLATE = "{% for message in messages %}" + TURN + "{{ message.content }}{% endfor %}" + NOTE
SENT = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


class Model(NamedTuple):
    """A served name with its folder, which is None for the base model, and its tokenizer."""

    name: str
    folder: Path | None
    tokenizer: Any

    def expected(self, service: Service, prompt: list[int]) -> list[int]:
        (text,) = reference_text(service.model_dir, self.folder, [prompt], SENT["max_tokens"])
        made: list[int] = text.tokens.tolist()
        return made

    def logprobs(self, service: Service, prompt: list[int], made: list[int]) -> Any:
        return chosen_logprobs(service.model_dir, self.folder, [*prompt, *made])[len(prompt) - 1 :]


@pytest.fixture(scope="module")
def models(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    """The base model and two adapters, of which one has two tokens more than the base model."""
    base = AutoTokenizer.from_pretrained(service.model_dir)
    own = AutoTokenizer.from_pretrained(service.model_dir)
    own.add_tokens([NOTE, tokenizers.AddedToken(TURN, special=True)])
    own.chat_template = TEMPLATE
    new = [own.convert_tokens_to_ids(token) for token in (NOTE, TURN)]
    made = save_resized_adapter(
        service.model_dir, tmp_path_factory.mktemp("own") / ADAPTER, len(own), trainable_token_indices=[41, *new]
    )
    own.save_pretrained(made)
    folder = Path(shutil.move(made, service.adapters / ADAPTER))
    eventually("the adapter is listed", lambda: service.http.get(f"/v1/models/{ADAPTER}").status_code == 200)
    found = [
        Model(BASE, None, base), Model(PLAIN, service.adapters / PLAIN, base),
        Model(ADAPTER, folder, AutoTokenizer.from_pretrained(folder)),
    ]  # fmt: skip
    yield {model.name: model for model in found}
    shutil.rmtree(folder)


@pytest.fixture
def text(service: Service) -> TextService:
    return TextService(service.http)


def together(text: TextService, path: str, requests: list[dict[str, Any]]) -> list[Any]:
    """Send requests at the same time, so that the engine's steps may mix them."""
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda fields: text.whole(path, fields), requests))


def test_completions_beside_those_of_others(service: Service, text: TextService, models: dict[str, Model]) -> None:
    asked = list(models.values()) * 3
    sent = [{"model": model.name, "prompt": TEXT, "logprobs": 1, **SENT} for model in asked]
    prompts = set()
    for model, answer in zip(asked, together(text, COMPLETIONS, sent), strict=True):
        (choice,), usage = answer["choices"], answer["usage"]
        prompt, made = choice["prompt_token_ids"], choice["token_ids"]
        assert prompt == model.tokenizer(TEXT).input_ids
        assert made == model.expected(service, prompt)
        assert choice["text"] == model.tokenizer.decode(made, skip_special_tokens=True)
        wanted = model.logprobs(service, prompt, made)
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], wanted, rtol=0, atol=LOGPROB_ERROR)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(made))
        prompts.add(tuple(prompt))
        assert text.whole("/tokenize", {"model": model.name, "prompt": TEXT})["tokens"] == prompt
    assert len(prompts) == 2, "the base model's tokenizer, and the adapter's"


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_written_and_answered_with_them(
    service: Service, text: TextService, models: dict[str, Model], *, stream: bool
) -> None:
    model = models[ADAPTER]
    note, turn = model.tokenizer.convert_tokens_to_ids([NOTE, TURN])
    fields = {"model": ADAPTER, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **SENT}
    fields |= {"logit_bias": {str(note): 60, str(turn): 60}, "frequency_penalty": 2.0, "presence_penalty": 2.0}
    answer = text.streamed(CHAT, fields) if stream else text.whole(CHAT, fields)
    (choice,) = answer["choices"]
    prompt, made = answer["prompt_token_ids"], choice["token_ids"]
    assert prompt == model.tokenizer.apply_chat_template(MESSAGES, return_dict=False, add_generation_prompt=True)
    assert {note, turn} <= set(made), "both tokens are drawn"
    assert choice["message"]["content"] == model.tokenizer.decode(made, skip_special_tokens=True)
    assert NOTE in choice["message"]["content"]
    records = choice["logprobs"]["content"]
    assert [bytes(each["bytes"]).decode() for each in records if each["token"] == TURN] == [TURN] * made.count(turn)
    wanted = model.logprobs(service, prompt, made)
    np.testing.assert_allclose([each["logprob"] for each in records], wanted, rtol=0, atol=LOGPROB_ERROR)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_vectors(service: Service, models: dict[str, Model]) -> None:
    for model in models.values():
        ids = model.tokenizer(TEXT).input_ids
        answer = service.post(model.name, TEXT)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)
        adapter = None if model.folder is None else model.name
        assert_close([answer.json()["data"][0]["embedding"]], service.expected(adapter, [ids]))


def test_only_the_adapter_has_their_ids(text: TextService, models: dict[str, Model]) -> None:
    sent = {"prompt": [50, models[ADAPTER].tokenizer.convert_tokens_to_ids(NOTE)], "max_tokens": 1}
    answers = {name: text.post(COMPLETIONS, {"model": name, **sent}) for name in models}
    assert {name: answer.status_code for name, answer in answers.items()} == {BASE: 400, PLAIN: 400, ADAPTER: 200}
    for name in (BASE, PLAIN):
        assert "token ids from 0 to 1023" in answers[name].json()["error"]["message"]
    assert text.whole("/detokenize", {"model": ADAPTER, "tokens": sent["prompt"]})["prompt"].endswith(NOTE)
