"""The bound on a text's tokens holds for real tokenizers, and is given up where a step may drop text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ranklet.replicas.model.token_bound import TokenBound
from ranklet.replicas.model.tokenizer import PromptTokenizer
from tests.assets.corpus import TEXTS
from tests.assets.tokenizer import CHAT_EOS, EOS

ACCENT = "\u0301"
# Characters that normal forms shrink most (Kelvin and Greek signs, ligatures, compatibility forms), and long tokens.
PIECES = [
    ACCENT, "\u0344", "\u0345", "e", "\u00e9", "\u212a", "\u212b", "\u1fbe", "\u1fef", "\u0390", "\u1f82", "\u03a3",
    "\u1112\u1161\u11ab", "\ud55c", "\ufb03", "\ufdfa", "\uff21", "\U0001d400", "\U0001d160", "\u3000", "\u2581",
    " ", "  ", "\n", "the ", "court", "\U0001f600", "\U0001f469\u200d\U0001f467", EOS, CHAT_EOS, "<unk>",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=8), max_size=30).map("".join)

Tokenizers = dict[str, PromptTokenizer]


def sentencepiece_bpe(*, metaspace: bool = False, **model: Any) -> Tokenizer:
    """A BPE tokenizer as Llama 2 and Mistral have it: spaces become U+2581, unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True, **model))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    return tokenizer


def normalized(*steps: normalizers.Normalizer) -> Callable[[Tokenizer], None]:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Sequence(list(steps))

    return change


def saved(tokenizer: Tokenizer, folder: Path, **settings: Any) -> PromptTokenizer:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return PromptTokenizer(folder)


@pytest.fixture(scope="module")
def backend(model_dir: Path) -> Callable[[], Tokenizer]:
    """Copies of the demo model's tokenizer: byte-level BPE behind NFC."""
    return lambda: Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizers(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory, backend: Callable[[], Tokenizer]
) -> Tokenizers:
    folders = tmp_path_factory.mktemp("tokenizers")
    made = {"byte-level NFC": PromptTokenizer(model_dir)}
    behind: dict[str, list[normalizers.Normalizer]] = {
        "byte-level": [],
        "byte-level NFD": [normalizers.NFD()],
        "byte-level NFKC": [normalizers.NFKC()],
        "byte-level NFKC lowercase": [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFC()],
    }
    for name, steps in behind.items():
        tokenizer = backend()
        normalized(*steps)(tokenizer)
        made[name] = saved(tokenizer, folders / name)
    made["lowered text"] = saved(backend(), folders / "lowered", do_lower_case=True)
    made["byte fallback"] = saved(sentencepiece_bpe(), folders / "fallback")
    made["metaspace"] = saved(sentencepiece_bpe(metaspace=True), folders / "metaspace")
    return made


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_a_text_has_at_least_that_many_tokens(tokenizers: Tokenizers, text: str) -> None:
    for name, tokenizer in tokenizers.items():
        tokens = len(tokenizer.encode([text])[0])
        assert tokenizer.least_tokens(text) <= tokens, name
        longest = tokenizer.longest_token_bytes
        assert longest is not None
        assert tokens * longest >= len(text.encode()), name


def test_the_bound_holds_for_each_character_alone_and_repeated(tokenizers: Tokenizers) -> None:
    characters = [chr(code) for code in (*range(0x2000), *range(0x2000, 0x30000, 23))]
    characters = [each for each in characters if not "\ud800" <= each <= "\udfff"]
    for name, tokenizer in tokenizers.items():
        for times in (1, 9):
            repeated = [character * times for character in characters]
            for text, ids in zip(repeated, tokenizer.encode(repeated), strict=True):
                assert tokenizer.least_tokens(text) <= len(ids), (name, text)


@pytest.mark.parametrize("text", [ACCENT, " ", "a", "the ", "\u212a", "e" + ACCENT, "\U0001f600"])
def test_a_body_full_of_one_text_exceeds_a_long_context(tokenizers: Tokenizers, text: str) -> None:
    body = text * (4_000_000 // len(text.encode()))
    for name, tokenizer in tokenizers.items():
        assert tokenizer.least_tokens(body) > 32_768, name


def test_no_bound_exceeds_the_text_in_bytes(tokenizers: Tokenizers) -> None:
    for text in ("", "a", "é", "\U0001f600", "\ud800"):
        assert all(each.least_tokens(text) <= len(text.encode(errors="surrogatepass")) for each in tokenizers.values())


def without_a_byte(tokenizer: Tokenizer) -> Tokenizer:
    spec = json.loads(tokenizer.to_str())
    del spec["model"]["vocab"]["Ā"]  # how byte-level vocabularies spell byte 0
    return Tokenizer.from_str(json.dumps(spec))


def changed(change: Callable[[Tokenizer], object]) -> Callable[[Tokenizer], Tokenizer]:
    def apply(tokenizer: Tokenizer) -> Tokenizer:
        change(tokenizer)
        return tokenizer

    return apply


def whitespace_split(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(use_regex=False)]
    )


def split_that_removes(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
    )


def template_without_text(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single=EOS, special_tokens=[(EOS, 0)])


@pytest.mark.parametrize(
    "spoil",
    [
        changed(normalized(normalizers.Strip())),
        changed(normalized(normalizers.StripAccents())),
        changed(normalized(normalizers.Replace(Regex(r"\s+"), " "))),
        changed(normalized(normalizers.Replace("  ", " "))),
        changed(lambda tokenizer: tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])),
        changed(lambda tokenizer: tokenizer.add_tokens([AddedToken("<mask>", rstrip=True)])),
        changed(whitespace_split),
        changed(split_that_removes),
        changed(template_without_text),
        without_a_byte,
        lambda _: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        lambda _: Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
        lambda _: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
        lambda _: Tokenizer(models.BPE({"a": 0}, [])),
        lambda _: Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True)),
    ],
)
def test_a_tokenizer_that_may_drop_text_has_no_bound(
    spoil: Callable[[Tokenizer], Tokenizer], backend: Callable[[], Tokenizer]
) -> None:
    bound = TokenBound(spoil(backend()))
    assert bound.longest_token_bytes is None
    assert bound.least_tokens("a" * 1000) == 0


def test_a_replacement_by_nothing_bounds_the_rest_of_the_text(backend: Callable[[], Tokenizer]) -> None:
    tokenizer = backend()
    normalized(normalizers.Replace("-", ""))(tokenizer)
    bound = TokenBound(tokenizer)
    assert bound.longest_token_bytes is None
    assert bound.least_tokens("-" * 1000) == 0
    assert bound.least_tokens(ACCENT * 1000) > 100


def test_added_tokens_may_be_longer_than_any_of_the_vocabulary(model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    long = "\u212a\u212b" * 40  # NFC makes two bytes and one of three
    tokenizer.add_special_tokens([AddedToken(long, normalized=False)])
    tokenizer.add_tokens([AddedToken(long[:60], normalized=True)])
    ours = saved(tokenizer, folder)
    for text in (long * 3, long[:60] * 3, (long + "\u212a") * 2):
        assert ours.least_tokens(text) <= len(ours.encode([text])[0])
