"""The texts of single tokens make the text that the tokenizer makes of all of them."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from ranklet.cluster.text.detokenizer import Detokenizer
from ranklet.cluster.text.token_bytes import REPLACEMENT, TokenBytes
from ranklet.replicas.errors import ModelError
from tests.cluster.text.small_tokenizers import MAKERS, TEXTS, id_of, make

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
NAMES = st.sampled_from(sorted(MAKERS))
TEXT = st.one_of(st.text(max_size=20), st.sampled_from(TEXTS))
UNKNOWN = 10**6  # an id that no vocabulary has


@st.composite
def ids(draw: st.DrawFn, name: str, size: int = 30) -> list[int]:
    """Draw any ids, among them those of texts."""
    tokenizer = make(name)
    some = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=size)
    found = draw(some) + tokenizer.encode(draw(TEXT)).ids[:size] + draw(some)
    return draw(st.permutations(found)) if draw(st.booleans()) else found


@st.composite
def tokens(draw: st.DrawFn) -> tuple[str, list[int], list[int], bool]:
    """Draw the name of a tokenizer, a prompt, the tokens behind it, and whether special ones are skipped."""
    name = draw(NAMES)
    return name, draw(ids(name, 8)), draw(ids(name)), draw(st.booleans())


def spelled(name: str, sequence: Sequence[int], *, skip: bool) -> bytes:
    """Return the bytes of a text, from the names of its tokens."""
    tokenizer = make(name)
    special = {"<s>", "</s>", "<|im_end|>", "<unk>"} if name == "metaspace" else {"<s>", "</s>", "<|im_end|>"}
    names = [tokenizer.id_to_token(token) or "" for token in sequence]
    names = [each for each in names if not (skip and each in special)]
    if name == "byte_level":
        return make(name).decode(sequence, skip_special_tokens=skip).encode()
    parts = []
    for i, each in enumerate(names):
        if found := BYTE.fullmatch(each):
            parts.append(bytes.fromhex(found[1]))
        elif name == "metaspace" and not i:
            parts.append(each.replace("▁", "").encode())
        else:
            parts.append(each.replace("▁", " ").encode())
    whole = b"".join(parts)
    return whole.removeprefix(b" ") if name == "byte_fallback" else whole


def detokenized(name: str, prompt: Sequence[int], sequence: Sequence[int], *, skip: bool) -> str:
    detokenizer = Detokenizer(table(name), prompt, skip_special=skip)
    return "".join(map(detokenizer.push, sequence)) + detokenizer.finish()


def table(name: str) -> TokenBytes:
    return TABLES.setdefault(name, TokenBytes(make(name)))


TABLES: dict[str, TokenBytes] = {}


@given(tokens())
def test_tokens_make_the_text_of_the_whole(drawn: tuple[str, list[int], list[int], bool]) -> None:
    name, prompt, sequence, skip = drawn
    text = detokenized(name, [], prompt + sequence, skip=skip)
    assert text == spelled(name, prompt + sequence, skip=skip).decode(errors="replace")


@given(tokens())
def test_the_text_behind_a_prompt_is_the_rest_of_the_whole(drawn: tuple[str, list[int], list[int], bool]) -> None:
    name, prompt, sequence, skip = drawn
    before = Detokenizer(table(name), skip_special=skip)
    head = "".join(map(before.push, prompt))  # without a character that the prompt only begins
    assert head + detokenized(name, prompt, sequence, skip=skip) == detokenized(name, [], prompt + sequence, skip=skip)


@given(NAMES, TEXT, TEXT)
def test_valid_text_is_the_tokenizers_own(name: str, prompt: str, text: str) -> None:
    tokenizer = make(name)
    before, after = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    whole = tokenizer.decode(before + after)
    assert tokenizer.decode(before) + detokenized(name, before, after, skip=True) == whole


@given(st.lists(st.integers(0, 255), max_size=40))
@example([0xFF] * 40)
@example([0xF0, 0x9F, 0x98, 0x80])
@example([0xE4, 0xBD, 0xF0, 0x9F, 0x98])
@example([0xED, 0xA0, 0x80, 0xC0, 0xAF])
def test_any_bytes_make_the_text_that_utf8_makes_of_them(content: list[int]) -> None:
    sequence = [id_of("byte_fallback_unstripped", f"<0x{byte:02X}>") for byte in content]
    assert detokenized("byte_fallback_unstripped", [], sequence, skip=True) == bytes(content).decode(errors="replace")


def test_a_character_of_four_tokens_comes_with_the_last() -> None:
    tokenizer = make("byte_fallback")
    sequence = [id_of("byte_fallback", f"<0x{byte:02X}>") for byte in "😀".encode()]
    detokenizer = Detokenizer(table("byte_fallback"), tokenizer.encode("a").ids)
    pieces = []
    for token in sequence:
        pieces.append((detokenizer.push(token), detokenizer.is_within_character))
    assert pieces == [("", True), ("", True), ("", True), ("😀", False)]


def test_an_incomplete_character_ends_as_a_replacement() -> None:
    detokenizer = Detokenizer(table("byte_fallback"))
    assert detokenizer.push(id_of("byte_fallback", "<0xE4>")) == ""
    assert detokenizer.finish() == REPLACEMENT
    assert detokenizer.finish() == ""


def test_a_character_that_the_prompt_begins_belongs_to_the_text() -> None:
    tokenizer = make("byte_fallback")
    first, *rest = [id_of("byte_fallback", f"<0x{byte:02X}>") for byte in "你".encode()]
    assert detokenized("byte_fallback", [*tokenizer.encode("a").ids, first], rest, skip=True) == "你"


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_invalid_tokens_are_never_waited_for(name: str) -> None:
    """Text leaves at once when later tokens cannot change it."""
    detokenizer = Detokenizer(table(name))
    for token in range(make(name).get_vocab_size()):
        detokenizer.push(token)
        if not detokenizer.is_within_character:
            continue
        assert detokenizer.push(make(name).encode("a").ids[-1]).endswith("a")


def test_unknown_ids_have_no_text_and_take_no_memory() -> None:
    found = TokenBytes(make("byte_level"))
    known = len(found)
    assert [found[UNKNOWN + i] for i in range(5)] == [b""] * 5
    assert len(found) == known


def test_the_first_token_after_only_special_ones_begins_the_text() -> None:
    tokenizer = make("byte_fallback")
    (word,) = tokenizer.encode("fox").ids
    bos = id_of("byte_fallback", "<s>")
    assert detokenized("byte_fallback", [bos], [word, word], skip=True) == "fox fox"
    assert detokenized("byte_fallback", [bos], [word, word], skip=False) == " fox fox"


@pytest.mark.parametrize(
    ("decoder", "letters"), [(decoders.CTC(), "abcdef"), (decoders.BPEDecoder("."), ["a", "b", "c.", "d.", "e."])]
)
def test_a_decoder_that_changes_earlier_tokens_is_refused(decoder: decoders.Decoder, letters: Sequence[str]) -> None:
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoder
    with pytest.raises(ModelError, match=r"letter|neighbours"):
        TokenBytes(tokenizer)


def test_the_demos_tokenizer(model_dir: Path) -> None:
    check_every_token(model_dir)


def test_smollms_tokenizer(smollm_dir: Path) -> None:
    check_every_token(smollm_dir)


def check_every_token(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    every = list(range(tokenizer.get_vocab_size()))
    detokenizer = Detokenizer(TokenBytes(tokenizer), skip_special=False)
    text = "".join(map(detokenizer.push, every)) + detokenizer.finish()
    assert text == tokenizer.decode(every, skip_special_tokens=False)
