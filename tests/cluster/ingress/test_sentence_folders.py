"""Adapters that sentence-transformers saved answer as it does over HTTP, or are refused with what differs."""

from dataclasses import replace

import httpx
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from torch.nn import GELU

from tests.assets.adapters import quiet, save_sentence_transformers_adapter
from tests.assets.sentence_folders import SentenceFolder
from tests.cluster.service import Service, assert_close

TEXTS = ["Notice must be given in writing.", "word " * 60]
HIDDEN = 128


@pytest.fixture(scope="module", name="saved")
def _saved(service: Service) -> str:
    save_sentence_transformers_adapter(
        service.model_dir, service.adapters / "sentences", r=8, target_modules=["q_proj", "v_proj"]
    )
    return "sentences"


def test_an_adapter_as_it_is_saved(service: Service, saved: str) -> None:
    with quiet():
        theirs = SentenceTransformer(str(service.adapters / saved), device="cpu").encode(TEXTS)
    assert_close(service.embed(saved, TEXTS), np.asarray(theirs))


def reload(service: Service, name: str, made: SentenceFolder) -> httpx.Response:
    folder = made.write(service.adapters / name, HIDDEN)
    loading = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    return service.http.post("/v1/load_lora_adapter", json=loading)


def test_pooling_prompts_and_limits_of_an_adapter_are_followed(service: Service, saved: str) -> None:
    before = service.embed(saved, TEXTS[:1])
    own = SentenceFolder(
        ("Transformer", "Pooling"), "mean", include_prompt=False, prompt="Represent this: ",
        prompts={"query": "Find what answers: "}, transformer={"max_seq_length": 40},
    )  # fmt: skip
    own = replace(own, dense=({"out_features": 96}, {"out_features": 160, "activation_function": GELU()}))
    assert reload(service, saved, own).status_code == 200
    with quiet():
        theirs = SentenceTransformer(str(service.adapters / saved), device="cpu")
    for name in (None, "query", "task"):
        expected = np.asarray(theirs.encode(TEXTS, prompt_name=name))
        assert_close(service.embed(saved, TEXTS, prompt_name=name, truncate_prompt_tokens=-1), expected)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert_close(service.embed(saved, TEXTS, prompt_name="task", truncate_prompt_tokens=-1, normalize=True), unit)
    shorter = expected[:, :130] / np.linalg.norm(expected[:, :130], axis=1, keepdims=True)
    asked = {"prompt_name": "task", "truncate_prompt_tokens": -1, "normalize": True, "dimensions": 130}
    assert_close(service.embed(saved, TEXTS, **asked), shorter)
    long, unknown = service.post(saved, TEXTS), service.post(saved, TEXTS, prompt_name="gone")
    assert (long.status_code, "expected 1 to 40 tokens" in long.text) == (400, True)
    assert "prompt_name: expected one of query, task" in unknown.text
    notes = service.http.get(f"/v1/adapters/{saved}").json()["notes"]
    assert {"pooling: 'mean'; the base model has 'last'", "include_prompt: False; the base model has True"} < set(notes)
    assert reload(service, saved, SentenceFolder()).status_code == 200
    assert_close(service.embed(saved, TEXTS[:1]), before)


def test_other_settings_are_refused(service: Service, saved: str) -> None:
    refused = reload(service, saved, SentenceFolder(transformer={"do_lower_case": True}))
    assert refused.json()["error"]["code"] == "invalid_adapter"
    assert "do_lower_case: expected False as the base model has, got True" in refused.text
