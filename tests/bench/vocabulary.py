"""A tokenizer with as many tokens as a real model's, so that every token that random weights make has a text."""

import json
from collections.abc import Iterator
from itertools import chain, count, islice, product
from pathlib import Path
from string import ascii_lowercase

from tests.assets.tokenizer import save_tokenizer

_SPACE = "Ġ"  # in byte-level names of tokens
_WORD_LETTERS = 4  # about the length of a token of English text, with its space


def save_full_tokenizer(folder: Path, size: int, *, merges: bool = False) -> None:
    """Save a tokenizer of `size` tokens: a small trained one, and made-up words.

    Args:
        merges: make the words of merges, so that tokenizer.json is as large as a real model's; texts then have them.
    """
    known = save_tokenizer(folder, vocab_size=min(1024, size), max_length=32_768)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    words = chain.from_iterable(map(_words, range(1, _WORD_LETTERS + 1))) if merges else _words(_WORD_LETTERS)
    new = list(islice((word for word in words if word not in vocab), size - known))
    vocab |= dict(zip(new, count(known)))
    if merges:
        content["model"]["merges"] += [[word[:-1], word[-1]] for word in new]
    path.write_text(json.dumps(content, ensure_ascii=False))


def _words(letters: int) -> Iterator[str]:
    return (_SPACE + "".join(each) for each in product(ascii_lowercase, repeat=letters))
