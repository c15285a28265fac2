"""What calls tell routers of their prompts."""

from dataclasses import replace
from typing import Any

import numpy as np

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.message import Continuation, pack, pack_tokens
from ranklet.cluster.text_prefix import call_pages, text_hint
from ranklet.replicas.engine.params import EmbedParams, GenerateParams

PROMPTS = [np.arange(1, 200, dtype=np.int32), np.arange(1, 4, dtype=np.int32)]


def call(params: GenerateParams, name: str | None = "legal", revision: str | None = "v1") -> Any:
    adapter = None if name is None else AdapterLocation(name, "/adapters/legal", revision)
    return pack(adapter, PROMPTS, params, "g")


def test_embeddings_tell_nothing_of_texts() -> None:
    asked = pack(None, PROMPTS, EmbedParams(), "g")
    assert text_hint(asked) is None
    assert (asked.work, asked.texts) == (202, 0)


def test_a_text_call_needs_room_for_its_prompts_and_for_what_few_texts_exceed() -> None:
    hint = text_hint(call(GenerateParams(max_tokens=10, n=3)))
    assert hint is not None
    assert (len(hint.pages), hint.texts, hint.room) == (199 // 64, 6, 202 + 6 * 10)
    endless = text_hint(call(GenerateParams(max_tokens=100_000)))
    assert endless is not None
    assert endless.room == 202 + 2 * 512


def test_given_tokens_of_texts_are_work() -> None:
    tokens, lengths = pack_tokens([np.arange(5, dtype=np.int32), np.arange(2, dtype=np.int32)])
    asked = call(GenerateParams())
    assert replace(asked, continuation=Continuation(tokens, lengths, "")).work == asked.work + 7


def test_pages_differ_where_keys_and_values_may() -> None:
    asked = [
        call(GenerateParams()), call(GenerateParams(), revision="v2"), call(GenerateParams(), "tax"),
        call(GenerateParams(), None), call(GenerateParams(cache_salt="tenant")),
    ]  # fmt: skip
    first = {call_pages(each, PROMPTS[0])[0] for each in asked}
    assert len(first) == len(asked)
    assert call_pages(call(GenerateParams(temperature=0.5, n=4)), PROMPTS[0])[0] in first


def test_pages_before_an_invocation_are_those_of_the_base() -> None:
    params = GenerateParams()
    base, plain = call_pages(call(params, None), PROMPTS[0]), call_pages(call(params), PROMPTS[0])
    location = AdapterLocation("legal", "/adapters/legal", "v1", invocation=(130, 131))  # the tokens at 129 and 130
    late = call_pages(pack(location, PROMPTS, params, "g"), PROMPTS[0])
    assert late[:2] == base[:2]
    assert late[2] not in (base[2], plain[2])
    longer = np.concatenate((PROMPTS[0], [130, 131] * 32)).astype(np.int32)
    assert call_pages(pack(location, PROMPTS, params, "g"), longer)[:3] == late, "a text activates nothing"
    absent = AdapterLocation("legal", "/adapters/legal", "v1", invocation=(131, 130))
    assert call_pages(pack(absent, PROMPTS, params, "g"), PROMPTS[0]) == base
