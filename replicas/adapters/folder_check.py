"""Compares what an adapter's folder says about embeddings and tokens with the base model's folder.

Pooling, Dense layers, normalization, prompts and longest text of an adapter are followed, and the tokens that its
tokenizer adds. An adapter that was trained with another tokenizer would get vectors that its own library does not
compute.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ranklet.replicas.adapters.adapter_settings import has_head
from ranklet.replicas.adapters.dense_files import read_dense
from ranklet.replicas.adapters.findings import Checked, show
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.tokenizer_check import ComparedTokenizer
from ranklet.replicas.adapters.tokenizer_process import TokenizerComparison
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.added_tokens import AddedToken
from ranklet.replicas.model.dense import DenseLayers
from ranklet.replicas.model.embedding_settings import EmbeddingSettings, read_base_settings, read_embedding_settings
from ranklet.replicas.model.sentence_files import MODULES_FILE, is_file

_REMEDY = "this server has one setting for the base model and its adapters"
_MAX_NAMED = 5
_SHARED = {"lower": "do_lower_case", "special_tokens": "add_special_tokens"}
_FOLLOWED = {
    "mode": "pooling",
    "normalize": "normalization",
    "prompt": "default prompt",
    "prompts": "prompts",
    "pools_prompt": "include_prompt",
}


@dataclass(frozen=True)
class FolderDifferences:
    """What an adapter's folder has instead of the base model's settings.

    Attributes:
        notes: on what is followed.
        dense: its Dense layers, perhaps none; None where its folder lists no modules, for those of the base model.
    """

    notes: tuple[str, ...] = ()
    dense: DenseLayers | None = None


class BaseFolder:
    """The base model's folder, whose files are read at the first comparison that needs them.

    Args:
        max_position: the longest prompt that the base model can compute.
        hidden: width of pooled vectors.
    """

    def __init__(self, folder: Path, max_position: int, hidden: int) -> None:
        self._folder = folder
        self._max_position = max_position
        self._hidden = hidden
        self._tokenizer = TokenizerComparison(folder)

    def compare_tokenizer(self, adapter: AdapterRef) -> "Future[ComparedTokenizer]":
        """Begin to compare an adapter's tokenizer files, beside what else its load reads."""
        return self._tokenizer.begin(adapter)

    def prepare(self) -> None:
        """Get ready to compare tokenizers, on a thread of its own."""
        self._tokenizer.prepare()

    def check(self, folder: Path) -> Checked[FolderDifferences]:
        """Yield what an adapter's folder asks for and cannot get. Returns what differs from the base model."""
        base, notes, dense = self._settings, tuple[str, ...](), None
        try:
            own = read_embedding_settings(folder, base, classifies=has_head(folder))
        except ModelError as error:
            yield error.message
        else:
            notes = yield from self._check_settings(base, own)
            if is_file(folder / MODULES_FILE):
                dense = yield from read_dense(folder, own.dense, self._hidden)
        return FolderDifferences(notes, dense)

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
        if own.dense or base.dense:
            notes.append(f"Dense layers: {_listed(own)}; the base model has {_listed(base)}")
        longest, limit = (min(each.max_tokens or self._max_position, self._max_position) for each in (base, own))
        if limit < longest:
            notes.append(f"embeddings of this adapter have at most {limit} tokens; those of the base model {longest}")
        elif limit > longest:
            notes.append(f"longest text: {limit} tokens; embeddings have at most {longest}, as those of the base model")
        return tuple(notes)

    @cached_property
    def _settings(self) -> EmbeddingSettings:
        return read_base_settings(self._folder)


def notes_on(added: tuple[AddedToken, ...]) -> tuple[str, ...]:
    """Return the note on the tokens that an adapter's tokenizer adds."""
    if not added:
        return ()
    named = ", ".join(f"{show(token.content)} ({token.id})" for token in added[:_MAX_NAMED])
    more = f" and {len(added) - _MAX_NAMED} more" if len(added) > _MAX_NAMED else ""
    return (f"added tokens: {named}{more}; its prompts and texts have them",)


def _listed(settings: EmbeddingSettings) -> str:
    return ", ".join(map(str, settings.dense)) or "none"
