"""A text that is truncated is not tokenized to its end, and has the tokens that it would have."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.token_bound import MOST_CHARACTERS_PER_TOKEN, TokenBound
from ranklet.replicas.model.tokenizer import PromptTokenizer, Truncation, TruncationSide
from tests.assets.tokenizer import save_tokenizer

PARTS = ["the", " court", ", ruled", "\n", " 12345678", "e\u0301", "\u00e9t\u00e9 ", "\u5bb6\u3002", " " * 40, "x" * 90]
PIECES = st.lists(st.sampled_from(PARTS), min_size=5, max_size=40).map("".join)
SIDES: list[TruncationSide] = ["left", "right"]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PromptTokenizer:
    return PromptTokenizer(model_dir)


@pytest.fixture(scope="module")
def unbounded(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    """A tokenizer as BERT's, which drops blanks and makes one token of an unknown word."""
    folder = tmp_path_factory.mktemp("unbounded")
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return PromptTokenizer(folder)


@settings(max_examples=40)
@given(part=PIECES, tokens=st.integers(1, 300), side=st.sampled_from(SIDES))
def test_the_kept_tokens_are_those_of_the_whole_text(
    tokenizer: PromptTokenizer, part: str, tokens: int, side: TruncationSide
) -> None:
    text = part * (60_000 // len(part))
    (whole,) = tokenizer.encode_plain([text], add_special_tokens=False)
    (kept,) = tokenizer.encode_plain([text], add_special_tokens=False, truncation=Truncation(tokens, side))
    assert kept.tolist() == (whole[:tokens] if side == "right" else whole[-tokens:]).tolist()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("letter", ["\u0301", " ", "a", "the ", "\U0001f600", "\u5bb6"])
def test_the_tokenizer_stops_behind_the_limit(tokenizer: PromptTokenizer, letter: str, side: TruncationSide) -> None:
    text = letter * (30_000_000 // len(letter.encode()))
    began_s = time.process_time()
    (kept,) = tokenizer.encode_plain([text], add_special_tokens=False, truncation=Truncation(1000, side))
    assert len(kept) == 1000
    assert time.process_time() - began_s < 2, "the whole text takes more than 10 s"


@pytest.mark.parametrize("text", ["a b " * 100, " " * 1_000_000 + "a b", "\u0301" * 5000])
def test_the_characters_that_surely_have_some_tokens_have_them(tokenizer: PromptTokenizer, text: str) -> None:
    bound = TokenBound(tokenizer.backend)
    for tokens in (1, 7, 100, 10_000):
        count = bound.characters_of(text, tokens)
        assert count == len(text) or bound.least_tokens(text[: count + 1]) >= tokens
        assert bound.least_tokens(text[: count - 1]) <= tokens


@pytest.mark.parametrize("side", SIDES)
def test_without_a_bound_a_text_is_cut_far_behind_the_limit_or_refused(
    unbounded: PromptTokenizer, side: TruncationSide
) -> None:
    cut = Truncation(100, side)
    (kept,) = unbounded.encode_plain(["a b b " * 5_000_000], add_special_tokens=False, truncation=cut)
    (whole,) = unbounded.encode_plain(["a b b " * 1000], add_special_tokens=False)
    assert kept.tolist() == (whole[:100] if side == "right" else whole[-100:]).tolist()
    blanks = " " * 10_000_000
    with pytest.raises(InvalidRequest, match=r"expected at least 100 tokens .* Shorten the text"):
        unbounded.encode_plain(["a" + blanks + "b"], add_special_tokens=False, truncation=cut)


def test_a_text_may_have_as_many_characters_as_its_tokens_may_cover(
    tokenizer: PromptTokenizer, unbounded: PromptTokenizer, tmp_path: Path
) -> None:
    assert tokenizer.longest_token_bytes is not None
    assert tokenizer.most_characters(10) == 10 * tokenizer.longest_token_bytes
    assert unbounded.most_characters(10) == 10 * MOST_CHARACTERS_PER_TOKEN
    save_tokenizer(tmp_path, vocab_size=400, max_length=16)
    assert PromptTokenizer(tmp_path).most_characters(0) == 0
