"""Compares what an adapter's folder says about embeddings and tokens with the base model's folder.

Pooling, normalization, prompts and longest text of an adapter are followed. The tokenizer is the base model's: an
adapter that was trained with another would get vectors that its own library does not compute.
"""

from functools import cached_property
from pathlib import Path

from ranklet.replicas.adapters.findings import Checked, show
from ranklet.replicas.adapters.tokenizer_process import TokenizerComparison
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.embedding_settings import EmbeddingSettings, read_base_settings, read_embedding_settings

_REMEDY = "this server has one setting for the base model and its adapters"
_SHARED = {"lower": "do_lower_case", "special_tokens": "add_special_tokens"}
_FOLLOWED = {
    "mode": "pooling",
    "normalize": "normalization",
    "prompt": "default prompt",
    "prompts": "prompts",
    "pools_prompt": "include_prompt",
}


class BaseFolder:
    """The base model's folder, whose files are read at the first comparison that needs them.

    Args:
        max_position: the longest prompt that the base model can compute.
    """

    def __init__(self, folder: Path, max_position: int) -> None:
        self._folder = folder
        self._max_position = max_position
        self._tokenizer = TokenizerComparison(folder)

    def check(self, folder: Path) -> Checked[tuple[str, ...]]:
        """Yield what an adapter's folder asks for and cannot get. Returns notes on what differs from the base model."""
        base, notes = self._settings, tuple[str, ...]()
        try:
            own = read_embedding_settings(folder, base)
        except ModelError as error:
            yield error.message
        else:
            notes = yield from self._check_settings(base, own)
        yield from self._tokenizer.differences(folder)
        return notes

    def _check_settings(self, base: EmbeddingSettings, own: EmbeddingSettings) -> Checked[tuple[str, ...]]:
        for field, name in _SHARED.items():
            expected, got = getattr(base, field), getattr(own, field)
            if expected != got:
                yield f"{name}: expected {show(expected)} as the base model has, got {show(got)}; {_REMEDY}"
        notes = []
        for field, name in _FOLLOWED.items():
            other, got = getattr(base, field), getattr(own, field)
            if other != got:
                notes.append(f"{name}: {show(got)}; the base model has {show(other)}")
        longest, limit = (min(each.max_tokens or self._max_position, self._max_position) for each in (base, own))
        if limit < longest:
            notes.append(f"embeddings of this adapter have at most {limit} tokens; those of the base model {longest}")
        elif limit > longest:
            notes.append(f"longest text: {limit} tokens; embeddings have at most {longest}, as those of the base model")
        return tuple(notes)

    @cached_property
    def _settings(self) -> EmbeddingSettings:
        return read_base_settings(self._folder)
