"""Each setting that sentence-transformers reads from a folder is followed or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.embedding_settings import (
    EmbeddingSettings,
    read_base_settings,
    read_embedding_settings,
)
from ranklet.replicas.model.sentence_files import SETTINGS_FILES

MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    write(tmp_path, "modules.json", MODULES)
    return write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})


def write(folder: Path, name: str, content: Any) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("sentence_bert_config.json", {"max_seq_length": 9}, {"max_tokens": 9}),
        (
            "sentence_bert_config.json",
            {"max_seq_length": 9, "tokenizer_args": {"model_max_length": 7}},
            {"max_tokens": 7},
        ),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 5}}}, {"max_tokens": 5}),
        ("sentence_bert_config.json", {"do_lower_case": True}, {"lower": True}),
        (
            "sentence_bert_config.json",
            {"processing_kwargs": {"common": {"add_special_tokens": False}}},
            {"special_tokens": False},
        ),
        ("sentence_bert_config.json", {"config_args": {}, "unpad_inputs": True, "query_length": 3}, {}),
        ("tokenizer_config.json", {"model_max_length": 12}, {"max_tokens": 12}),
        ("tokenizer_config.json", {"model_max_length": 1e30}, {}),
        ("config_sentence_transformers.json", {"prompts": {"q": "Q: ", "d": None}}, {"prompts": {"q": "Q: ", "d": ""}}),
        (
            "config_sentence_transformers.json",
            {"prompts": {"q": "Q: "}, "default_prompt_name": "q"},
            {"prompt": "Q: ", "prompts": {"q": "Q: "}},
        ),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, {"pools_prompt": False}),
    ],
)
def test_settings_are_followed(folder: Path, name: str, content: Any, expected: dict[str, Any]) -> None:
    assert read_embedding_settings(write(folder, name, content)) == EmbeddingSettings("mean", **expected)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("sentence_bert_config.json", {"config_args": {"is_causal": False}}, "config_kwargs: is_causal"),
        ("sentence_bert_config.json", {"model_args": {"attn_dropout": 1}}, "model_kwargs: attn_dropout"),
        ("sentence_bert_config.json", {"tokenizer_args": {"add_eos_token": True}}, "processor_kwargs: add_eos_token"),
        ("sentence_bert_config.json", {"processing_kwargs": {"chat_template": {"x": 1}}}, "chat_template"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"truncation": False}}}, "truncation"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"stride": 3}}}, "stride"),
        ("sentence_bert_config.json", {"modality_config": {"text": {}, "message": {}}}, "got also message"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task: expected"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, "max_seq_length: expected a number"),
        ("sentence_bert_config.json", {"pools": 1}, "pools: not supported"),
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("config_sentence_transformers.json", {"default_prompt_name": "gone"}, "default_prompt_name: .* got 'gone'"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type: .* got 'SparseEncoder'"),
    ],
)
def test_other_settings_are_refused_by_name(folder: Path, name: str, content: Any, says: str) -> None:
    with pytest.raises(ModelError, match=f"^{folder}: {name}: .*{says}"):
        read_base_settings(write(folder, name, content))


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name}: .* Git LFS pointer to it; run `git lfs pull`"):
        read_base_settings(write(folder, name, POINTER))


def test_what_an_adapter_does_not_say_is_as_in_the_base(tmp_path: Path) -> None:
    base = EmbeddingSettings("cls", normalize=False, prompt="Q: ", max_tokens=99, lower=True)
    assert read_embedding_settings(tmp_path, base) == base
    write(tmp_path, "tokenizer_config.json", {"model_max_length": 3})  # of a trainer, for texts
    assert read_embedding_settings(tmp_path, base) == base
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 50})
    assert read_embedding_settings(tmp_path, base) == EmbeddingSettings(
        "cls", normalize=False, prompt="Q: ", max_tokens=50
    )


def test_a_prompt_that_is_left_out_may_not_be_padded(folder: Path) -> None:
    """sentence-transformers would leave out the padding with it."""
    write(folder, "1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False})
    write(folder, "sentence_bert_config.json", {"processing_kwargs": {"text": {"padding": "max_length"}}})
    assert not read_base_settings(folder).pools_prompt
    write(folder, "config_sentence_transformers.json", {"prompts": {"q": "Q: "}})
    with pytest.raises(ModelError, match=r"beside include_prompt: false: padding: .* got 'max_length'"):
        read_base_settings(folder)


def test_the_prompts_of_an_adapter_have_a_limit(folder: Path) -> None:
    """They are put before each text."""
    write(folder, "config_sentence_transformers.json", {"prompts": {"q": "Q" * 5000}})
    assert len(read_embedding_settings(folder).prompts["q"]) == 5000
    with pytest.raises(ModelError, match="prompts: expected at most 4096 characters, got 5001"):
        read_embedding_settings(folder, EmbeddingSettings())


def test_an_adapters_modules_are_where_its_revision_looks(folder: Path) -> None:
    write(folder, "modules.json", [MODULES[0], MODULES[1] | {"path": "elsewhere"}])
    write(folder, "elsewhere/config.json", {"pooling_mode": "cls"})
    assert read_embedding_settings(folder).mode == "cls"
    with pytest.raises(ModelError, match="Pooling: expected the path '1_Pooling', got 'elsewhere'"):
        read_embedding_settings(folder, EmbeddingSettings())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["mean", "text", "", "q"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "q", "common"]), inner),
    max_leaves=6,
)
FIELDS = {
    "modules.json": ("type", "path"),
    "1_Pooling/config.json": ("pooling_mode", "include_prompt"),
    "2_Normalize/config.json": ("module_input_name",),
    "config_sentence_transformers.json": ("prompts", "default_prompt_name", "model_type"),
    "sentence_bert_config.json": ("max_seq_length", "processing_kwargs", "config_args", "modality_config"),
    "tokenizer_config.json": ("model_max_length",),
}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(FIELDS)))
def test_any_json_gives_settings_or_a_refusal(data: st.DataObject, name: str, folder: Path) -> None:
    fields = data.draw(st.fixed_dictionaries(dict.fromkeys(FIELDS[name], values)))
    before = (folder / name).read_bytes() if (folder / name).exists() else None
    write(folder, name, [fields] if name == "modules.json" else data.draw(st.sampled_from([fields, [fields], None])))
    found: EmbeddingSettings | str
    try:
        found = read_embedding_settings(folder)
    except ModelError as error:
        found = error.message
    finally:
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)
    assert isinstance(found, EmbeddingSettings) or found
