"""The longest texts that adapters' folders allow for embeddings, where that is less than the base model's."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import marks_of
from ranklet.replicas.errors import AdapterChanged, InvalidRequest, ModelError
from ranklet.replicas.model.embedding_settings import read_base_settings, read_embedding_settings

_MAX_KEPT = 4096


class PromptLimits:
    """Reads the limits of adapters, each revision once.

    Longer texts are refused. sentence-transformers would cut them, which `truncate_prompt_tokens` asks for.

    Args:
        model_dir: folder of the base model.
    """

    def __init__(self, model_dir: Path) -> None:
        self._base = read_base_settings(model_dir)
        self._kept: OrderedDict[AdapterRef, int | None] = OrderedDict()

    def knows(self, adapter: AdapterRef) -> bool:
        return adapter in self._kept

    def read(self, adapter: AdapterRef) -> None:
        """Read the limit of a revision. Blocks.

        Raises:
            AdapterChanged: the folder no longer has this revision.
        """
        try:
            found = read_embedding_settings(Path(adapter.path), self._base).max_tokens
        except ModelError:  # the load of the adapter refuses it
            found = None
        if adapter.marks and marks_of(adapter.path) != adapter.marks:
            raise AdapterChanged(f"adapter {adapter.name!r}: its files have changed. Send the request again")
        self._kept[adapter] = found
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    def check(self, adapter: AdapterRef, prompts: Sequence[NDArray[np.int32]]) -> None:
        """Raise InvalidRequest if a prompt, int32 [length], is longer than the limit of a revision that was read."""
        limit = self._kept.get(adapter)
        longest = max(map(len, prompts), default=0)
        if limit is not None and longest > limit:
            raise InvalidRequest(
                f"input: expected 1 to {limit} tokens, the longest text of adapter {adapter.name!r}, got {longest}; "
                f"shorten the text, split it, or set truncate_prompt_tokens to {limit}",
                param="input",
            )
