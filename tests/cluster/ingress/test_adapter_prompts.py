"""Prompts of embeddings are made as the folder of the model says; a gateway learns an adapter's from a replica."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.message import AdapterText
from ranklet.replicas.model.dense_settings import DenseSettings
from ranklet.replicas.model.embedding_settings import EmbeddingSettings
from tests.cluster.ingress.parts import BASE, HIDDEN, MAX_MODEL_LEN, Parts

OWN = EmbeddingSettings("mean", prompt="own: ", prompts={"task": "own: ", "doc": "a text: "}, max_tokens=6)
ADAPTER = "legal-v2"


@pytest.fixture(name="parts")
def _parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


async def ask(parts: Parts, model: str, given: Any, **fields: Any) -> Any:
    return await parts.http.post("/v1/embeddings", json={"model": model, "input": given, **fields})


def describe(parts: Parts, settings: EmbeddingSettings, revision: str = "v1") -> None:
    parts.handle.description_of_adapters = AdapterText(revision, None, {}, embedding=settings)


def encoded(parts: Parts) -> list[str]:
    """Return the texts that were tokenised since the last call."""
    found = [text for texts in parts.tokenizer.encoded for text in texts]
    parts.tokenizer.encoded.clear()
    return found


async def test_a_request_names_a_prompt_of_the_base_model(parts: Parts) -> None:
    for name, text in (("query", "find this: a"), (None, "a"), ("", "a")):
        assert (await ask(parts, BASE, "a", prompt_name=name)).status_code == 200
        assert encoded(parts) == [text]


async def test_an_unknown_prompt_is_refused_with_the_known_ones(parts: Parts) -> None:
    answer = await ask(parts, BASE, "a", prompt_name="gone")
    assert answer.status_code == 400
    assert "prompt_name: expected one of query, the prompts of the model's folder, got 'gone'" in answer.text
    describe(parts, OWN)
    answer = await ask(parts, ADAPTER, "a", prompt_name="gone")
    assert "prompt_name: expected one of doc, task," in answer.text
    describe(parts, EmbeddingSettings(), "v2")
    assert "has no prompts" in (await ask(parts, ADAPTER, "a", prompt_name="gone")).text
    assert parts.handle.calls == []


async def test_token_ids_have_no_prompt(parts: Parts) -> None:
    answer = await ask(parts, BASE, [1, 2], prompt_name="query")
    assert "prompt_name: expected texts as input, got token ids" in answer.text


async def test_an_adapter_with_the_bases_prompts_is_not_described(parts: Parts) -> None:
    describe(parts, replace(parts.base, mode="mean", normalize=False, prompts={"other": "x"}))
    assert (await ask(parts, ADAPTER, "a")).status_code == 200
    assert (parts.handle.descriptions, len(parts.handle.calls)) == (0, 1)


async def test_the_prompt_of_an_adapter_is_learnt_once(parts: Parts) -> None:
    describe(parts, OWN)
    assert (await ask(parts, ADAPTER, ["a", "b"])).status_code == 200
    assert encoded(parts) == ["a", "b", "own: a", "own: b"]
    for fields, text in (({}, "own: a"), ({"prompt_name": "doc"}, "a text: a")):
        assert (await ask(parts, ADAPTER, "a", **fields)).status_code == 200
        assert encoded(parts) == [text]
    assert parts.handle.descriptions == 1


async def test_a_name_that_only_the_adapter_has_is_looked_up(parts: Parts) -> None:
    describe(parts, OWN)
    assert (await ask(parts, ADAPTER, "a", prompt_name="doc")).status_code == 200
    assert (encoded(parts), len(parts.handle.calls)) == (["a text: a"], 1)


async def test_a_replaced_adapter_has_its_new_prompt(parts: Parts) -> None:
    describe(parts, OWN)
    await ask(parts, ADAPTER, "a")
    encoded(parts)
    for settings in (replace(OWN, prompt="new: "), parts.base):
        describe(parts, settings, "v2")
        assert (await ask(parts, ADAPTER, "a")).status_code == 200
        assert encoded(parts)[-1] == f"{settings.prompt}a"


async def test_the_longest_text_is_the_adapters(parts: Parts) -> None:
    describe(parts, OWN)
    for _ in range(2):
        answer = await ask(parts, ADAPTER, "a " * 6)
        assert (answer.status_code, "input[0]: expected 1 to 6 tokens, got 7" in answer.text) == (400, True)
    assert (await ask(parts, ADAPTER, "a " * 60, truncate_prompt_tokens=-1)).status_code == 200
    assert len(parts.handle.calls[-1].prompts()[0]) == 6
    assert "expected 1 to 6, or -1" in (await ask(parts, ADAPTER, "a", truncate_prompt_tokens=7)).text
    describe(parts, replace(OWN, max_tokens=2 * MAX_MODEL_LEN), "v2")
    assert (await ask(parts, ADAPTER, "a " * 2 * MAX_MODEL_LEN, truncate_prompt_tokens=-1)).status_code == 200
    assert len(parts.handle.calls[-1].prompts()[0]) == MAX_MODEL_LEN


async def test_pooling_leaves_out_the_prompt_where_the_folder_says_so(parts: Parts) -> None:
    describe(parts, replace(OWN, pools_prompt=False))
    for given, fields, skipped in (("a b", {}, 1), ("a", {"prompt_name": "doc"}, 2), ([1, 2], {}, 0)):
        assert (await ask(parts, ADAPTER, given, **fields)).status_code == 200
        assert parts.handle.calls[-1].params.skipped == skipped
    empty = await ask(parts, ADAPTER, ["a", " "])
    assert "input[1]: expected more than the 1 tokens of the prompt" in empty.text
    left = await ask(parts, ADAPTER, "a", truncate_prompt_tokens=-1, truncation_side="left")
    assert "truncation_side: expected right" in left.text


@pytest.mark.parametrize(("outputs", "dimensions"), [(2 * HIDDEN, HIDDEN + 1), (HIDDEN // 2, HIDDEN // 2)])
async def test_dimensions_are_those_after_the_adapters_dense_layers(
    parts: Parts, outputs: int, dimensions: int
) -> None:
    layers = (DenseSettings("2_Dense", HIDDEN, outputs),)
    describe(parts, replace(parts.base, dense=layers))
    assert (await ask(parts, ADAPTER, "a", dimensions=dimensions)).status_code == 200
    params = parts.handle.calls[-1].params
    assert (params.dense, params.dimensions, parts.handle.descriptions) == (layers, dimensions, 1)
    answer = await ask(parts, ADAPTER, "a", dimensions=outputs + 1)
    assert f"dimensions: expected 1 to {outputs}, got {outputs + 1}" in answer.text


async def test_an_adapter_that_changes_again_and_again_is_refused(parts: Parts) -> None:
    describe(parts, OWN)
    changing = parts.handle
    changing.description_of_adapters = AdapterText("v1", None, {}, embedding=OWN)
    original = changing.options

    def options(*, method_name: str) -> Any:
        if method_name == "embed":  # another prompt by the time that a call arrives
            text = f"{len(changing.calls)}: "
            describe(parts, replace(OWN, prompt=text), str(len(changing.calls)))
        return original(method_name=method_name)

    changing.options = options  # type: ignore[method-assign]
    answer = await ask(parts, ADAPTER, "a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_loading")
