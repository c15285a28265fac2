"""Tokenizes texts with the tokenizer and the settings of the model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.errors import InvalidRequest, ModelError
from ranklet.replicas.model.embedding_settings import read_base_settings
from ranklet.replicas.model.git_lfs import pointer_problem
from ranklet.replicas.model.text_cut import beginning, ending
from ranklet.replicas.model.token_bound import MOST_CHARACTERS_PER_TOKEN, TokenBound
from ranklet.replicas.model.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, VOCABULARY_FILE

TruncationSide = Literal["left", "right"]


@dataclass(frozen=True)
class Truncation:
    """Shortens prompts to a number of tokens, those that the tokenizer adds included.

    Attributes:
        side: where tokens are removed. The tokens that the tokenizer adds stay.
    """

    tokens: int
    side: TruncationSide


class PromptTokenizer:
    """The folder's fast tokenizer. Thread-safe; releases the GIL while it tokenizes.

    Attributes:
        settings: what the folder says about embeddings.
    """

    def __init__(self, model_dir: Path) -> None:
        self._backend = load_backend(model_dir)
        self.settings = settings = read_base_settings(model_dir)
        self._embedding_backend = _lowercasing(self._backend) if settings.lower else self._backend
        self._bound = TokenBound(self._backend)
        self._embedding_bound = self._bound if not settings.lower else TokenBound(self._embedding_backend)

    @property
    def longest_token_bytes(self) -> int | None:
        """Upper bound on the UTF-8 bytes of text that one token covers; None if none can be proven."""
        longest = [bound.longest_token_bytes for bound in (self._bound, self._embedding_bound)]
        known = [each for each in longest if each is not None]
        return max(known) if len(known) == len(longest) else None

    def least_tokens(self, text: str) -> int:
        bounds = dict.fromkeys((self._bound, self._embedding_bound))
        return min(bound.least_tokens(text) for bound in bounds)

    def most_characters(self, tokens: int) -> int:
        """Return how many characters a text may have that is tokenized and may have `tokens` tokens."""
        return tokens * (self.longest_token_bytes or MOST_CHARACTERS_PER_TOKEN)

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`, which must not be changed."""
        return self._backend

    def encode_plain(
        self, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None = None
    ) -> list[NDArray[np.int32]]:
        """Return the token ids of each text, int32 [length], without the folder's settings for embeddings."""
        return _ids(self._backend, self._bound, texts, add_special_tokens=add_special_tokens, truncation=truncation)

    def beginnings(self, texts: Sequence[str], tokens: Sequence[int]) -> list[tuple[str, int]]:
        """Return the beginning of each text that has at most the given number of tokens, and how many it has."""
        parts = [beginning(text, most, self._bound) for text, most in zip(texts, tokens, strict=True)]
        found = self._backend.encode_batch(parts, add_special_tokens=False)
        return [
            (part, len(encoding)) if len(encoding) <= most else (part[: encoding.offsets[most][0]], most)
            for part, encoding, most in zip(parts, found, tokens, strict=True)
        ]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[NDArray[np.int32]]:
        """Return the token ids of each pair of texts, int32 [length], with the tokenizer's special tokens."""
        found = self._backend.encode_batch_fast(list(pairs), add_special_tokens=True)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None, add_special_tokens: bool | None = None,
        truncation: Truncation | None = None,
    ) -> list[NDArray[np.int32]]:  # fmt: skip
        """Return the token ids of each text, int32 [length], as prompts of embeddings.

        Args:
            prompt: text before each text; None as the folder says.
            add_special_tokens: None as the folder says.
        """
        before = self.settings.prompt if prompt is None else prompt
        prompts = [before + text for text in texts] if before else texts
        adds = self.settings.special_tokens if add_special_tokens is None else add_special_tokens
        return _ids(
            self._embedding_backend, self._embedding_bound, prompts, add_special_tokens=adds, truncation=truncation
        )

    def count_prompt(self, prompt: str, *, add_special_tokens: bool | None = None) -> int:
        """Return the number of first tokens that count as the prompt's, as sentence-transformers counts them.

        These are the tokens of the prompt alone, without a special token at its end. Where the last of them would be
        part of the text's first word, it counts all the same.
        """
        (ids,) = self.encode([""], prompt=prompt, add_special_tokens=add_special_tokens)
        added = self._embedding_backend.get_added_tokens_decoder()
        last = added.get(int(ids[-1])) if len(ids) else None
        return len(ids) - (last is not None and last.special)


def load_backend(folder: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a folder, without padding and truncation.

    Raises:
        ModelError: the folder has no fast tokenizer.
    """
    from transformers import AutoTokenizer  # slow to import, and only gateways tokenize

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # the file's content decides what `tokenizers` raises
        files = (folder / name for name in (TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, VOCABULARY_FILE))
        problem = next(
            filter(None, map(pointer_problem, files)), f"expected a fast tokenizer (tokenizer.json), got: {error}"
        )
        raise ModelError(f"{folder}: {problem}") from error
    backend.no_padding()
    backend.no_truncation()  # prompts that are too long are refused instead
    return backend


def _lowercasing(backend: Any) -> Any:
    """Return a copy that lowercases texts first, as sentence-transformers does for `do_lower_case`."""
    from tokenizers import Tokenizer, normalizers

    copy: Any = Tokenizer.from_str(backend.to_str())
    first = normalizers.Lowercase()
    copy.normalizer = normalizers.Sequence([first, copy.normalizer] if copy.normalizer else [first])
    return copy


def _ids(
    backend: Any, bound: TokenBound, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None
) -> list[NDArray[np.int32]]:
    if truncation is None:
        found = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    else:
        added = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        if truncation.tokens < added:
            raise InvalidRequest(
                f"truncate_prompt_tokens: expected at least {added}, the special tokens that are added to each text, "
                f"got {truncation.tokens}",
                param="truncate_prompt_tokens",
            )
        cut = beginning if truncation.side == "right" else ending
        shorter = [cut(text, truncation.tokens, bound) for text in texts]
        found = backend.encode_batch_fast(shorter, add_special_tokens=False)
        for text, part, encoding in zip(texts, shorter, found, strict=True):
            if part is not text and len(encoding) < truncation.tokens:
                raise InvalidRequest(
                    f"truncate_prompt_tokens: expected at least {truncation.tokens} tokens in the first or last "
                    f"{len(part)} characters of a long text, got {len(encoding)}. Shorten the text",
                    param="truncate_prompt_tokens",
                )
            encoding.truncate(truncation.tokens - added, direction=truncation.side)
        if added:
            found = [backend.post_process(encoding, add_special_tokens=True) for encoding in found]
    return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]
