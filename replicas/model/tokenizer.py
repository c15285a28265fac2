"""Tokenizes texts with the tokenizer and the settings of the model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.errors import InvalidRequest, ModelError
from ranklet.replicas.model.folder import read_default_prompt, read_settings
from ranklet.replicas.model.token_bound import TokenBound

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
    """The folder's fast tokenizer. Thread-safe; releases the GIL while it tokenizes."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer  # slow to import, and only gateways tokenize

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
            self._backend = tokenizer.backend_tokenizer
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{model_dir}: expected a fast tokenizer (tokenizer.json), got: {error}") from error
        self._backend.no_padding()
        self._backend.no_truncation()  # prompts that are too long are refused instead
        self._prefix = read_default_prompt(model_dir)
        self._lower = bool(read_settings(model_dir / "sentence_bert_config.json").get("do_lower_case"))
        self._bound = TokenBound(self._backend, lower=self._lower)

    @property
    def longest_token_bytes(self) -> int | None:
        """Upper bound on the UTF-8 bytes of text that one token covers; None if none can be proven."""
        return self._bound.longest_token_bytes

    def least_tokens(self, text: str) -> int:
        return self._bound.least_tokens(text)

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`, which must not be changed."""
        return self._backend

    def encode_plain(
        self, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None = None
    ) -> list[NDArray[np.int32]]:
        """Return the token ids of each text, int32 [length], without the folder's settings for embeddings."""
        return _ids(self._backend, texts, add_special_tokens=add_special_tokens, truncation=truncation)

    def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool | None = None, truncation: Truncation | None = None
    ) -> list[NDArray[np.int32]]:
        """Return the token ids of each text, int32 [length], as prompts of embeddings.

        Args:
            add_special_tokens: None as the folder says.
        """
        prompts = [self._prefix + text for text in texts] if self._prefix else list(texts)
        prompts = [prompt.lower() for prompt in prompts] if self._lower else prompts
        return _ids(self._backend, prompts, add_special_tokens=add_special_tokens is not False, truncation=truncation)


def _ids(
    backend: Any, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None
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
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        for encoding in found:
            encoding.truncate(truncation.tokens - added, direction=truncation.side)
        if added:
            found = [backend.post_process(encoding, add_special_tokens=True) for encoding in found]
    return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]
