"""Adapters that sentence-transformers saved answer as it does over HTTP, or are refused with what differs."""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

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


def test_other_settings_are_followed_or_refused(service: Service, saved: str) -> None:
    folder = service.adapters / saved
    before = service.embed(saved, TEXTS[:1])
    SentenceFolder(transformer={"max_seq_length": 16}).write(folder, HIDDEN)
    loading = {"lora_name": saved, "lora_path": str(folder), "load_inplace": True}
    assert service.http.post("/v1/load_lora_adapter", json=loading).status_code == 200
    assert_close(service.embed(saved, TEXTS[:1]), before)
    answer = service.post(saved, TEXTS)
    assert (answer.status_code, "expected 1 to 16 tokens" in answer.text) == (400, True)
    assert service.post(saved, TEXTS, truncate_prompt_tokens=16).status_code == 200
    SentenceFolder(mode="mean").write(folder, HIDDEN)
    refused = service.http.post("/v1/load_lora_adapter", json=loading)
    assert refused.json()["error"]["code"] == "invalid_adapter"
    assert "pooling: expected 'last' as the base model has, got 'mean'" in refused.text
