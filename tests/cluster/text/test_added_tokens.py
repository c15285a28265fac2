"""Texts with the added tokens of an adapter's folder become the ids, and ids the texts, that transformers makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ranklet.cluster.ingress.model_tokens import ModelTokens, Tokenizers
from ranklet.cluster.text.detokenizer import Detokenizer
from ranklet.replicas.adapters.added_tokens import BaseTokens, read_added_tokens
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.added_tokens import AddedToken, AddedTokens
from ranklet.replicas.model.tokenizer import PromptTokenizer, Truncation
from tests.cluster.text.small_tokenizers import MAKERS, make

# Each with its flags; "the" and "Ġthe" may be tokens of the vocabulary.
TOKENS = [
    LibraryToken("<|user|>", special=True),
    LibraryToken("<note>"),
    LibraryToken("the", single_word=True),
    LibraryToken("Ġthe", normalized=False),
    LibraryToken("naïve", special=True, normalized=False),
    LibraryToken("two  words"),
    LibraryToken("日本"),
    LibraryToken("NAÏVE CAFÉ"),
]
STRIPPING = [LibraryToken("<l>", lstrip=True), LibraryToken("<r>", rstrip=True, special=True)]
PIECES = st.sampled_from(
    [str(each.content) for each in TOKENS + STRIPPING] + ["<|im_end|>", "<tool>", "€uro", " ", "\n"]
)
TEXT = st.lists(st.one_of(PIECES, PIECES, st.text(max_size=6), st.sampled_from(["the cat", "naïve", "e\u0301"])))


class Pair(NamedTuple):
    """An adapter's tokenizer, ours and transformers'."""

    own: ModelTokens
    library: Any
    bound: PromptTokenizer


def saved(backend: Any, folder: Path) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def pair(base: Path, folder: Path, tokens: list[LibraryToken]) -> Pair:
    made = AutoTokenizer.from_pretrained(base)
    made.add_tokens(tokens)
    made.save_pretrained(folder)
    added = AddedTokens.of(read_added_tokens(folder, BaseTokens(base)))
    assert len(added.tokens) == len(tokens)
    prompts = PromptTokenizer(base)
    own = ModelTokens(prompts.with_added(added), added, Tokenizers(prompts).base)
    return Pair(own, AutoTokenizer.from_pretrained(folder), prompts)


@pytest.fixture(scope="module", name="pairs")
def _pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folders = tmp_path_factory.mktemp("tokenizers")
    bases: dict[str, Callable[[], Any]] = dict(MAKERS)

    def normalizing() -> Any:
        backend = MAKERS["byte_level"]()
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        return backend

    bases["normalizing"] = normalizing
    pairs = {}
    for name, maker in bases.items():
        base = saved(maker(), folders / name)
        pairs[name] = pair(base, folders / f"{name} adapter", TOKENS)
        if name in ("byte_level", "byte_fallback"):
            pairs[f"{name} stripping"] = pair(base, folders / f"{name} stripping", TOKENS + STRIPPING)
    return pairs


@settings(max_examples=120, deadline=None)
@given(parts=TEXT)
@example(parts=["the", "the", " the", "<|user|>", "<note>", "<note>", "x", "naïve", "日本日"])
@example(parts=["  ", "<l>", "  ", "<r>", "  ", "two  words", "two  words", "NAÏVE CAFÉ"])
def test_texts_become_the_ids_of_the_library(pairs: dict[str, Pair], parts: list[str]) -> None:
    text = "".join(parts)
    for name, (own, library, _) in pairs.items():
        expected = library(text, add_special_tokens=False).input_ids
        (ids,) = own.tokenizer.encode_plain([text], add_special_tokens=False)
        assert ids.tolist() == expected, name
        assert own.tokenizer.encode([text])[0].tolist() == library(text).input_ids, name
        assert own.tokenizer.least_tokens(text) <= len(expected), name
        longest = own.tokenizer.longest_token_bytes
        assert longest is None or longest * len(expected) >= len(text.encode()), name


@settings(max_examples=80, deadline=None)
@given(parts=TEXT, some=st.lists(st.integers(0, 420), max_size=8), skip=st.booleans(), data=st.data())
def test_ids_become_the_texts_of_the_library(
    pairs: dict[str, Pair], parts: list[str], some: list[int], skip: bool, data: st.DataObject
) -> None:
    for name, (own, library, _) in pairs.items():
        ids = library("".join(parts), add_special_tokens=False).input_ids + [each % len(library) for each in some]
        ids = data.draw(st.permutations(ids))
        expected = library.decode(ids, skip_special_tokens=skip)
        assert own.backend.decode(ids, skip_special_tokens=skip) == expected
        if (
            "byte_fallback" in name
        ):  # the library decodes some broken characters of bytes otherwise, see test_detokenizer
            ids = [each for each in ids if not str(library.convert_ids_to_tokens(each)).startswith("<0x")]
            expected = library.decode(ids, skip_special_tokens=skip)
        streamed = Detokenizer(own.bytes, skip_special=skip)
        assert "".join([*map(streamed.push, ids), streamed.finish()]) == expected, name


def test_the_base_stays_as_it_is(pairs: dict[str, Pair]) -> None:
    for name, (own, _, base) in pairs.items():
        text = "<note> <|user|>"
        assert base.encode_plain([text], add_special_tokens=False)[0].max() < own.backend.token_to_id("<note>"), name
        assert base.backend.token_to_id("<note>") is None


def test_only_stripping_tokens_lift_the_bound(pairs: dict[str, Pair]) -> None:
    for name, (own, _, base) in pairs.items():
        is_bounded = base.longest_token_bytes is not None and "stripping" not in name
        assert (own.tokenizer.longest_token_bytes is not None) == is_bounded, name
    assert pairs["byte_level"].own.tokenizer.least_tokens("the dog " * 9) > 0


def test_a_cut_text_has_the_first_tokens(pairs: dict[str, Pair]) -> None:
    own = pairs["byte_level"].own.tokenizer
    text = "two  words<|user|> and naïve " * 4000
    (whole,) = own.encode_plain([text], add_special_tokens=False)
    for side in ("left", "right"):
        (kept,) = own.encode_plain([text], add_special_tokens=False, truncation=Truncation(50, side))
        assert kept.tolist() == (whole[-50:] if side == "left" else whole[:50]).tolist()


def test_other_ids_than_the_librarys_are_refused(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(saved(make("byte_level"), tmp_path))
    with pytest.raises(ModelError, match="expected the id 500 for '<x>', got 402"):
        tokenizer.with_added(AddedTokens.of([AddedToken("<x>", 500)]))
