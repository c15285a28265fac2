"""Small real tokenizers, one for each way in which decoders join tokens."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. User: what does it do? Assistant: it jumps.",
    "Grüße aus Köln, naïve café; 你好，世界 — привет мир, 👩‍👩‍👧 and 😀😀!",
    "def f(x):\n    return x + 1  # four spaces\n\n\n### Observation: 3.1415",
] * 8
SPECIAL = ["<s>", "</s>", "<|im_end|>"]
PLAIN_ADDED = ["<tool>", "€uro"]  # added, but not special


def byte_level() -> Tokenizer:
    """Return a tokenizer like those of Qwen, Llama 3 and SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _with_added(tokenizer)


def metaspace() -> Tokenizer:
    """Return a Unigram tokenizer like those of T5: the first token of a text loses its leading space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, show_progress=False, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _with_added(tokenizer)


def byte_fallback() -> Tokenizer:
    """Return a tokenizer like Llama 2's: bytes of unknown characters, and one space stripped at the start."""
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _fallback(decoders.Sequence(decoder), prefix=True)


def byte_fallback_unstripped() -> Tokenizer:
    """Return a tokenizer like Gemma's, which keeps the leading space."""
    return _fallback(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), prefix=False
    )


def _fallback(decoder: Any, *, prefix: bool) -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=[*SPECIAL, "<unk>", *tokens], limit_alphabet=40
    )
    trained.train_from_iterator(TEXTS, trainer)
    model = trained.model
    model.byte_fallback = True
    # The trainer knows bytes as special tokens only, so that they are taken over without that mark.
    vocabulary = trained.get_vocab(with_added_tokens=True)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(trained), unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoder
    tokenizer.add_special_tokens(list(SPECIAL))
    return _with_added(tokenizer)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    maker.__name__: maker for maker in (byte_level, metaspace, byte_fallback, byte_fallback_unstripped)
}


@cache
def make(name: str) -> Tokenizer:
    return MAKERS[name]()


def id_of(name: str, token: str) -> int:
    found = make(name).token_to_id(token)
    assert found is not None, f"{name} has no token {token}"
    return found
