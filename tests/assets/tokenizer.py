"""Trains a small byte-level BPE tokenizer like Qwen3-Embedding's, whose post-processor appends EOS."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.assets.corpus import TEXTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import PostProcessor

EOS = "<|endoftext|>"
CHAT_EOS = "<|im_end|>"  # Qwen's eos_token, which differs from the EOS that the post-processor appends
BOS = "<|begin_of_text|>"


def save_tokenizer(
    folder: Path, *, vocab_size: int, max_length: int, append_eos: bool = True, bos: bool = False
) -> int:
    """Train on the corpus and save for `AutoTokenizer`. Returns the size of the vocabulary.

    Args:
        folder: receives tokenizer.json and tokenizer_config.json.
        vocab_size: upper bound; the corpus may be too small to reach it.
        max_length: `model_max_length` in the tokenizer's config.
        append_eos: end every sequence with EOS, as Qwen3-Embedding does.
        bos: begin every sequence with BOS, as Llama does.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS, CHAT_EOS, *([BOS] if bos else [])],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = _post_processor(tokenizer, append_eos=append_eos, bos=bos)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=CHAT_EOS,
        pad_token=EOS,
        bos_token=BOS if bos else None,
        padding_side="left",
        model_max_length=max_length,
    ).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def save_with_added(base_dir: Path, folder: Path, *tokens: Any, **special: Any) -> Any:
    """Save the base's tokenizer with added tokens, as training tools do. Returns it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _post_processor(tokenizer: "Tokenizer", *, append_eos: bool, bos: bool) -> "PostProcessor":
    from tokenizers import processors

    byte_level = processors.ByteLevel(trim_offsets=False)
    used = [token for token, wanted in ((BOS, bos), (EOS, append_eos)) if wanted]
    if not used:
        return byte_level
    template = " ".join([*([BOS] if bos else []), "$A", *([EOS] if append_eos else [])])
    ids = [(token, tokenizer.token_to_id(token)) for token in used]
    return processors.Sequence([byte_level, processors.TemplateProcessing(single=template, special_tokens=ids)])
