"""A replica describes an adapter's template, special tokens and vocabulary to gateways."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ranklet.cluster.replica.adapter_texts import AdapterTexts
from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.adapters.tokenizer_check import ComparedTokenizer
from ranklet.replicas.adapters.tokenizer_process import compare_within
from ranklet.replicas.errors import AdapterChanged, Unavailable
from tests.assets.broken import edit_config


@pytest.fixture
def folder(adapters_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters_dir / "legal-v2", tmp_path / "legal"))


def describer(model_dir: Path) -> AdapterTexts:
    return AdapterTexts(model_dir, AdapterSettings(model_dir))


def reference(folder: Path) -> AdapterRef:
    return Revisions().reference("legal", str(folder))


def test_an_adapter_without_tokenizer_files_has_no_text_of_its_own(model_dir: Path, folder: Path) -> None:
    adapter = reference(folder)
    text = describer(model_dir).describe(adapter)
    assert (text.revision, text.chat_template) == (adapter.revision, None)
    assert (text.special_tokens, text.findings, text.invocation) == ({}, (), None)


def test_the_invocation_is_described(model_dir: Path, folder: Path) -> None:
    edit_config(folder, alora_invocation_tokens=[5, 6])
    assert describer(model_dir).describe(reference(folder)).invocation == (5, 6)


def test_a_classifier_has_no_tokens_to_compare(model_dir: Path, folder: Path) -> None:
    edit_config(folder, task_type="SEQ_CLS")
    (folder / "ranklet.json").write_text(json.dumps({"rerank": {"false_token_id": 3, "true_token_id": 4}}))
    (finding,) = describer(model_dir).describe(reference(folder)).findings
    assert "expected no false_token_id and true_token_id for a classifier" in finding


def test_the_template_and_special_tokens_are_read_once_a_revision(model_dir: Path, folder: Path) -> None:
    shutil.copy(model_dir / "tokenizer.json", folder)
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"q": "Q: "}}))
    texts, adapter = describer(model_dir), reference(folder)
    text = texts.describe(adapter)
    assert text.chat_template == "{{ messages }}"
    assert text.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert text.findings == ()
    assert text.embedding.prompts == {"q": "Q: "}
    assert texts.describe(adapter) is text
    (folder / "chat_template.jinja").write_text("{{ other }}")
    changed = reference(folder)
    assert changed.revision != adapter.revision
    assert texts.describe(changed).chat_template == "{{ other }}"
    with pytest.raises(AdapterChanged):
        texts.describe(replace(adapter, revision="a third one"))


def test_foreign_tokens_and_unreadable_files_are_findings(model_dir: Path, folder: Path) -> None:
    content = json.loads((model_dir / "tokenizer.json").read_text())
    content["model"]["vocab"]["foreign"] = 99_999
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text("{")
    findings = describer(model_dir).describe(reference(folder)).findings
    assert len(findings) == 2
    assert findings[0].startswith("tokenizer_config.json: expected JSON")
    assert "'foreign' is 99999 (not in the base model)" in findings[1]


def test_a_comparison_ends_in_time(model_dir: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(Unavailable, match=r"takes 0.001 s"):
        compare_within(model_dir, folder, time_s=0.001)


def test_a_comparison_that_takes_too_much_memory_is_a_finding(model_dir: Path, folder: Path) -> None:
    shutil.copy(model_dir / "tokenizer.json", folder)
    assert compare_within(model_dir, folder) == ComparedTokenizer()
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")  # other bytes, which must be parsed
    assert compare_within(model_dir, folder) == ComparedTokenizer()
    (finding,) = compare_within(model_dir, folder, memory_bytes=1 << 20).findings
    assert finding.startswith("the tokenizer's files: expected")
