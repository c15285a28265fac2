"""Tokenizes texts with the tokenizer and the settings of the model folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.folder import read_default_prompt, read_settings
from ranklet.replicas.model.token_bound import TokenBound


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

    def encode_plain(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[NDArray[np.int32]]:
        """Return the token ids of each text, int32 [length], without the folder's settings for embeddings."""
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the token ids of each text, int32 [length], as prompts of embeddings: special tokens included."""
        prompts = [self._prefix + text for text in texts] if self._prefix else list(texts)
        prompts = [prompt.lower() for prompt in prompts] if self._lower else prompts
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in self._backend.encode_batch_fast(prompts)]
