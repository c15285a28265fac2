"""Token ids that end a text: those of the base model's folder, and the one that an adapter's tokenizer names.

An adapter trained on a chat format ends its texts with that format's token, which a plain base model never produces.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    UnusableTokenError,
    Vocabulary,
    content_of,
    is_id,
    read_tokenizer_file,
    show,
)

GENERATION_CONFIG_FILE = "generation_config.json"


class EndOfText:
    """The tokens that end a text of one base model and of its adapters.

    Args:
        model_dir: the base model's folder.
        config: its transformers config.
        vocab: number of its logits.

    Attributes:
        model_dir: the base model's folder.
    """

    def __init__(self, model_dir: Path, config: Any, vocab: int) -> None:
        self.model_dir = model_dir
        self._config = config
        self._vocab = vocab
        self._vocabulary = Vocabulary(model_dir)

    @cached_property
    def base_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text of the base model, in increasing order.

        These are all ids of `generation_config.json`, or else of `config.json`, and the tokenizer's `eos_token`. The
        latter is left out if the model has no logit for it, since it is never generated.

        Raises:
            ModelError: a file cannot be read, or its `eos_token_id` is neither an id nor a list of ids of the model.
        """
        path = self.model_dir / GENERATION_CONFIG_FILE
        try:
            configured = read_tokenizer_file(path).get("eos_token_id")
            if configured is None:
                path, configured = self.model_dir / "config.json", getattr(self._config, "eos_token_id", None)
            ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
            if not all(is_id(each) for each in ids):
                raise ModelError(f"{path}: eos_token_id: expected an id or a list of ids, got {show(configured)}")
            unknown = [each for each in ids if not 0 <= each < self._vocab]
            if unknown:
                raise ModelError(
                    f"{path}: eos_token_id: expected ids from 0 to {self._vocab - 1}, which the model has logits for, "
                    f"got {show(unknown[0])}. Correct the file"
                )
            token = _eos_token(self.model_dir)
            named = None if token is None else self._vocabulary.id_of(token)
        except UnusableTokenError as error:
            raise ModelError(f"{self.model_dir}: {error}") from error
        return tuple(sorted({each for each in (*ids, named) if each is not None and 0 <= each < self._vocab}))

    def adapter_ids(self, folder: Path, added: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Return the ids that end a text of an adapter besides those of the base model.

        This is the `eos_token` of the folder's `tokenizer_config.json`; a folder without one adds no ids. Its id is
        that of the adapter's own added tokens, or else of the base's vocabulary. The adapter's `tokenizer.json` is not
        read: parsing one would hold the engine's interpreter.

        Args:
            added: ids of the tokens that the adapter's `tokenizer.json` adds to the base's.

        Raises:
            UnusableTokenError: a file cannot be read, or the token has no id that the model has logits for.
        """
        token = _eos_token(folder)
        if token is None:
            return ()
        found = (added or {}).get(token)
        if found is None:
            found = Vocabulary(folder).added_id_of(token)
        if found is None:
            found = self._vocabulary.id_of(token)
        if found is None:
            raise UnusableTokenError(
                f"{TOKENIZER_CONFIG_FILE}: eos_token: expected a token of the base model or one of the folder's added "
                f"tokens, got {show(token)}"
            )
        if not 0 <= found < self._vocab:
            raise UnusableTokenError(
                f"{TOKENIZER_CONFIG_FILE}: eos_token: expected an id below the base model's {self._vocab} logits, got "
                f"{found} for {show(token)}"
            )
        return (found,)


def _eos_token(folder: Path) -> str | None:
    """Return the token of `eos_token`, which is a string, or an object with the string as its content."""
    token = read_tokenizer_file(folder / TOKENIZER_CONFIG_FILE).get("eos_token")
    content = content_of(token) if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise UnusableTokenError(f"{TOKENIZER_CONFIG_FILE}: eos_token: expected a token, got {show(token)}")
    return content or None
