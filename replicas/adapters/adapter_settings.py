"""What adapters' folders say about embeddings, for processes that do not load adapters."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from ranklet.replicas.adapters.findings import collect
from ranklet.replicas.adapters.peft_config import read_fields
from ranklet.replicas.adapters.reference import CONFIG_FILE, AdapterRef
from ranklet.replicas.adapters.revision import check_unchanged
from ranklet.replicas.adapters.tokenizer_process import TokenizerComparison
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.added_tokens import AddedTokens
from ranklet.replicas.model.classifier import is_classifier, read_classifier
from ranklet.replicas.model.embedding_settings import EmbeddingSettings, read_base_settings, read_embedding_settings

_MAX_KEPT = 4096


class AdapterSettings:
    """Reads the settings of adapters, each revision once.

    Args:
        model_dir: folder of the base model.

    Attributes:
        base: settings of the base model. Adapters with equal settings have this very object.
        tokenizers: compares adapters' tokenizers with the base model's.
    """

    def __init__(self, model_dir: Path) -> None:
        self.base = read_base_settings(model_dir)
        self.tokenizers = TokenizerComparison(model_dir)
        self._model_dir = model_dir
        self._kept: OrderedDict[AdapterRef, EmbeddingSettings] = OrderedDict()

    def known(self, adapter: AdapterRef) -> EmbeddingSettings | None:
        """Return the settings of a revision that was read."""
        return self._kept.get(adapter)

    def read(self, adapter: AdapterRef) -> EmbeddingSettings:
        """Read the settings of a revision. Blocks.

        Raises:
            AdapterChanged: the folder no longer has this revision.
            Unavailable: the tokenizers were not compared in time.
        """
        found = self._read(adapter)
        check_unchanged(adapter)
        self._kept[adapter] = found
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return found

    def _read(self, adapter: AdapterRef) -> EmbeddingSettings:
        folder = Path(adapter.path)
        try:
            classifies = has_head(folder)
            found = read_embedding_settings(folder, self.base, classifies=classifies)
            if classifies:
                found = replace(found, classifier=read_classifier(folder, self._model_dir))
        except ModelError:  # the load of the adapter refuses it
            return self.base
        added = AddedTokens.of(self.tokenizers.compare(adapter).added)
        if added.tokens:
            found = replace(found, added_tokens=added.digest)
        return self.base if found == self.base else found


def has_head(folder: Path) -> bool:
    """Return whether the config of an adapter's folder is that of a classifier. False if it cannot be read."""
    return is_classifier(collect(read_fields(folder / CONFIG_FILE))[0] or {})
