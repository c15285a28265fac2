"""Token ids equal those of transformers and sentence-transformers."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ranklet.replicas.errors import InvalidRequest, ModelError
from ranklet.replicas.model.tokenizer import PromptTokenizer, Truncation, TruncationSide
from tests.assets.corpus import TEXTS
from tests.assets.tokenizer import EOS, save_tokenizer

Pair = tuple[PromptTokenizer, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def pair(model_dir: Path) -> Pair:
    return PromptTokenizer(model_dir), AutoTokenizer.from_pretrained(str(model_dir))


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=5))
def test_any_text_is_tokenized_as_by_transformers(pair: Pair, texts: list[str]) -> None:
    ours, theirs = pair
    encoded = ours.encode(texts)
    assert [list(ids) for ids in encoded] == [theirs(text)["input_ids"] for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded)


def test_texts_are_tokenized_as_by_sentence_transformers_and_end_with_eos(pair: Pair, model_dir: Path) -> None:
    model = SentenceTransformer(str(model_dir), device="cpu")
    texts = [*TEXTS, " surrounding spaces ", f"a {EOS} in the text", ""]
    for text, ids in zip(texts, pair[0].encode(texts), strict=True):
        assert list(ids) == model.preprocess([text])["input_ids"][0].tolist()
        assert ids[-1] == pair[1].convert_tokens_to_ids(EOS)


def test_a_text_longer_than_the_tokenizers_limit_is_not_truncated(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, vocab_size=400, max_length=16)
    assert len(PromptTokenizer(tmp_path).encode(["word " * 500])[0]) > 500


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [False, True])
def test_texts_are_truncated_as_by_transformers(tmp_path: Path, side: TruncationSide, *, bos: bool) -> None:
    save_tokenizer(tmp_path, vocab_size=400, max_length=512, append_eos=not bos, bos=bos)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), truncation_side=side)
    ours = PromptTokenizer(tmp_path)
    text = "the court ruled that the notice was late"
    whole = len(theirs(text)["input_ids"])
    for length in range(1, whole + 2):
        for special in (True, False):
            asked = {"truncation": True, "max_length": length, "add_special_tokens": special}
            expected = theirs(text, **asked)["input_ids"]
            cut = Truncation(length, side)
            for (found,) in (
                ours.encode([text], add_special_tokens=special, truncation=cut),
                ours.encode_plain([text], add_special_tokens=special, truncation=cut),
            ):
                assert list(found) == expected


def test_special_tokens_do_not_fit_into_fewer_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, vocab_size=400, max_length=512, bos=True)
    tokenizer = PromptTokenizer(tmp_path)
    added = len(tokenizer.encode([""])[0])
    assert list(tokenizer.encode(["a b"], truncation=Truncation(added, "right"))[0]) == list(tokenizer.encode([""])[0])
    with pytest.raises(InvalidRequest, match=f"expected at least {added}.*got {added - 1}"):
        tokenizer.encode(["a b"], truncation=Truncation(added - 1, "right"))


@given(text=st.text(max_size=60) | st.sampled_from(["word " * 900, "\N{GRINNING FACE}" * 40]), most=st.integers(1, 40))
def test_the_beginning_of_a_text_has_at_most_a_number_of_tokens(pair: Pair, text: str, most: int) -> None:
    (whole,) = pair[0].encode_plain([text], add_special_tokens=False)
    ((part, count),) = pair[0].beginnings([text], [most])
    assert text.startswith(part)
    assert count == min(most, len(whole))
    (ids,) = pair[0].encode_plain([part], add_special_tokens=False)
    assert len(ids) <= most
    assert part == text or len(ids) >= most - 4  # a character has up to four tokens, and stays whole


def test_special_tokens_may_be_left_out(pair: Pair) -> None:
    ours, theirs = pair
    (ids,) = ours.encode(["one two"], add_special_tokens=False)
    assert list(ids) == theirs("one two", add_special_tokens=False)["input_ids"]


def test_the_post_processor_adds_the_special_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, vocab_size=400, max_length=512, append_eos=False, bos=True)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    (ids,) = PromptTokenizer(tmp_path).encode(["one two"])
    assert list(ids) == theirs("one two")["input_ids"]
    assert ids[0] == theirs.bos_token_id
    assert ids[-1] != theirs.convert_tokens_to_ids(EOS)


def test_the_default_prompt_of_the_folder_is_prepended(tmp_path: Path, model_dir: Path) -> None:
    save_tokenizer(tmp_path, vocab_size=1024, max_length=512)
    config = {"prompts": {"query": "Query: ", "document": ""}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(config))
    tokenizer = PromptTokenizer(tmp_path)
    (ids,) = tokenizer.encode(["who?"])
    assert list(ids) == AutoTokenizer.from_pretrained(str(tmp_path))("Query: who?")["input_ids"]


def test_a_folder_may_lowercase_its_texts(tmp_path: Path, model_dir: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    settings_file = folder / "sentence_bert_config.json"
    before = json.loads(settings_file.read_text()) if settings_file.exists() else {}
    settings_file.write_text(json.dumps(before | {"do_lower_case": True}))
    theirs = SentenceTransformer(str(folder), device="cpu").preprocess(["The COURT Ruled"])["input_ids"][0].tolist()
    (ours,) = PromptTokenizer(folder).encode(["The COURT Ruled"])
    assert list(ours) == theirs
    assert list(ours) == list(PromptTokenizer(model_dir).encode(["the court ruled"])[0])


@pytest.mark.parametrize("name", ["config_sentence_transformers.json", "sentence_bert_config.json"])
def test_a_broken_settings_file_is_refused_by_name(name: str, tmp_path: Path, model_dir: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (folder / name).write_text("{")
    with pytest.raises(ModelError, match=name):
        PromptTokenizer(folder)


def test_several_threads_may_tokenize_at_once(pair: Pair) -> None:
    def encode(text: str) -> list[int]:
        return list(pair[0].encode([text])[0])

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(encode, TEXTS * 4)) == [pair[1](text)["input_ids"] for text in TEXTS * 4]


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        PromptTokenizer(tmp_path)
