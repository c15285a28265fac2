"""A tokenizer with as many tokens as a real model's, so that every token that random weights make has a text."""

import json
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase

from tests.assets.tokenizer import save_tokenizer

_SPACE = "Ġ"  # in byte-level names of tokens
_WORD_LETTERS = 4  # about the length of a token of English text, with its space


def save_full_tokenizer(folder: Path, size: int) -> None:
    """Save a tokenizer of `size` tokens: a small trained one, and made-up words."""
    known = save_tokenizer(folder, vocab_size=min(1024, size), max_length=32_768)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    words = (_SPACE + "".join(letters) for letters in product(ascii_lowercase, repeat=_WORD_LETTERS))
    new = (word for word in words if word not in vocab)
    vocab |= dict(zip(islice(new, size - known), count(known)))
    path.write_text(json.dumps(content, ensure_ascii=False))
