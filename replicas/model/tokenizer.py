"""Tokenizes texts with the tokenizer and the settings of the model folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.errors import InvalidRequest, ModelError
from ranklet.replicas.model.added_tokens import AddedTokens
from ranklet.replicas.model.embedding_settings import EmbeddingSettings, read_base_settings
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


@dataclass(frozen=True)
class BoundedTokenizer:
    """A `tokenizers.Tokenizer` and the bound on the numbers of its tokens."""

    backend: Any
    bound: TokenBound

    def with_added(self, added: AddedTokens) -> "BoundedTokenizer":
        return BoundedTokenizer(with_added(self.backend, added), self.bound.with_added(added.tokens))

    def ids(
        self, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None
    ) -> list[NDArray[np.int32]]:
        if truncation is None:
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        else:
            found = self._truncated(texts, truncation, add_special_tokens=add_special_tokens)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def _truncated(self, texts: Sequence[str], truncation: Truncation, *, add_special_tokens: bool) -> list[Any]:
        added = self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        if truncation.tokens < added:
            raise InvalidRequest(
                f"truncate_prompt_tokens: expected at least {added}, the special tokens that are added to each text, "
                f"got {truncation.tokens}",
                param="truncate_prompt_tokens",
            )
        cut = beginning if truncation.side == "right" else ending
        shorter = [cut(text, truncation.tokens, self.bound) for text in texts]
        found: list[Any] = self.backend.encode_batch_fast(shorter, add_special_tokens=False)
        for text, part, encoding in zip(texts, shorter, found, strict=True):
            if part is not text and len(encoding) < truncation.tokens:
                raise InvalidRequest(
                    f"truncate_prompt_tokens: expected at least {truncation.tokens} tokens in the first or last "
                    f"{len(part)} characters of a long text, got {len(encoding)}. Shorten the text",
                    param="truncate_prompt_tokens",
                )
            encoding.truncate(truncation.tokens - added, direction=truncation.side)
        return [self.backend.post_process(each, add_special_tokens=True) for each in found] if added else found


@dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer of a folder, for texts and for embeddings, and what the folder says about embeddings."""

    settings: EmbeddingSettings
    plain: BoundedTokenizer
    embedding: BoundedTokenizer

    @classmethod
    def read(cls, model_dir: Path, load: Callable[[Path], Any]) -> "FolderTokenizer":
        """Read a folder, whose `tokenizers.Tokenizer` `load` returns."""
        backend, settings = load(model_dir), read_base_settings(model_dir)
        plain = BoundedTokenizer(backend, TokenBound(backend))
        if not settings.lower:
            return cls(settings, plain, plain)
        lowercasing = _lowercasing(backend)
        return cls(settings, plain, BoundedTokenizer(lowercasing, TokenBound(lowercasing)))

    def with_added(self, added: AddedTokens) -> "FolderTokenizer":
        plain = self.plain.with_added(added)
        same = self.embedding is self.plain
        return FolderTokenizer(self.settings, plain, plain if same else self.embedding.with_added(added))


class PromptTokenizer:
    """The folder's fast tokenizer. Thread-safe; releases the GIL while it tokenizes.

    Args:
        parts: None reads the folder.

    Attributes:
        settings: what the folder says about embeddings.
    """

    def __init__(self, model_dir: Path, parts: FolderTokenizer | None = None) -> None:
        self._model_dir = model_dir
        self._parts = parts or FolderTokenizer.read(model_dir, load_backend)
        self._plain, self._embedding = self._parts.plain, self._parts.embedding
        self.settings = self._parts.settings

    def with_added(self, added: AddedTokens) -> "PromptTokenizer":
        """Return a tokenizer that has these tokens too, and shares the rest.

        Raises:
            ModelError: the tokens get other ids.
        """
        return PromptTokenizer(self._model_dir, self._parts.with_added(added))

    @property
    def longest_token_bytes(self) -> int | None:
        """Upper bound on the UTF-8 bytes of text that one token covers; None if none can be proven."""
        longest = [each.bound.longest_token_bytes for each in (self._plain, self._embedding)]
        known = [each for each in longest if each is not None]
        return max(known) if len(known) == len(longest) else None

    def least_tokens(self, text: str) -> int:
        bounds = dict.fromkeys((self._plain.bound, self._embedding.bound))
        return min(bound.least_tokens(text) for bound in bounds)

    def most_characters(self, tokens: int) -> int:
        """Return how many characters a text may have that is tokenized and may have `tokens` tokens."""
        return tokens * (self.longest_token_bytes or MOST_CHARACTERS_PER_TOKEN)

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`, which must not be changed."""
        return self._plain.backend

    def encode_plain(
        self, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None = None
    ) -> list[NDArray[np.int32]]:
        """Return the token ids of each text, int32 [length], without the folder's settings for embeddings."""
        return self._plain.ids(texts, add_special_tokens=add_special_tokens, truncation=truncation)

    def beginnings(self, texts: Sequence[str], tokens: Sequence[int]) -> list[tuple[str, int]]:
        """Return the beginning of each text that has at most the given number of tokens, and how many it has."""
        parts = [beginning(text, most, self._plain.bound) for text, most in zip(texts, tokens, strict=True)]
        found = self.backend.encode_batch(parts, add_special_tokens=False)
        return [
            (part, len(encoding)) if len(encoding) <= most else (part[: encoding.offsets[most][0]], most)
            for part, encoding, most in zip(parts, found, tokens, strict=True)
        ]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[NDArray[np.int32]]:
        """Return the token ids of each pair of texts, int32 [length], with the tokenizer's special tokens."""
        found = self.backend.encode_batch_fast(list(pairs), add_special_tokens=True)
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
        return self._embedding.ids(prompts, add_special_tokens=adds, truncation=truncation)

    def count_prompt(self, prompt: str, *, add_special_tokens: bool | None = None) -> int:
        """Return the number of first tokens that count as the prompt's, as sentence-transformers counts them.

        These are the tokens of the prompt alone, without a special token at its end. Where the last of them would be
        part of the text's first word, it counts all the same.
        """
        (ids,) = self.encode([""], prompt=prompt, add_special_tokens=add_special_tokens)
        added = self._embedding.backend.get_added_tokens_decoder()
        last = added.get(int(ids[-1])) if len(ids) else None
        return len(ids) - (last is not None and last.special)


def load_backend(folder: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a folder, without padding and truncation.

    Raises:
        ModelError: the folder has no fast tokenizer.
    """
    from transformers import AutoTokenizer  # slow to import, and imports torch

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


def with_added(backend: Any, added: AddedTokens) -> Any:
    """Return a `tokenizers.Tokenizer` with more added tokens, which shares the model, and so nearly all memory.

    Raises:
        ModelError: the tokens get other ids.
    """
    from tokenizers import AddedToken, Tokenizer

    found: Any = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (step := getattr(backend, name)) is not None:
            setattr(found, name, step)
    found.encode_special_tokens = backend.encode_special_tokens
    known = sorted(backend.get_added_tokens_decoder().items())
    found.add_tokens([token for _, token in known])
    found.add_tokens(
        [
            AddedToken(
                each.content, special=each.special, lstrip=each.lstrip, rstrip=each.rstrip,
                single_word=each.single_word, normalized=each.normalized,
            )
            for each in added.tokens
        ]
    )  # fmt: skip
    expected = {token.content: number for number, token in known} | {each.content: each.id for each in added.tokens}
    for token, number in expected.items():
        if found.token_to_id(token) != number:
            raise ModelError(f"added tokens: expected the id {number} for {token!r}, got {found.token_to_id(token)}")
    return found
