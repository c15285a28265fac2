"""An adapter's folder may allow shorter texts than the base model's; longer ones are refused, not cut."""

import json
from pathlib import Path

import numpy as np
import pytest

from ranklet.replicas.adapters.prompt_limits import PromptLimits
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.errors import AdapterChanged, InvalidRequest

LONG = [np.zeros(3, dtype=np.int32), np.zeros(9, dtype=np.int32)]


def with_limit(folder: Path, tokens: int) -> Path:
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": tokens}))
    return folder


def test_a_longer_text_is_refused_with_the_limit(tmp_path: Path) -> None:
    adapter = Revisions().reference("legal", str(with_limit(tmp_path, 8)))
    limits = PromptLimits(tmp_path / "base")
    assert not limits.knows(adapter)
    limits.read(adapter)
    assert limits.knows(adapter)
    limits.check(adapter, LONG[:1])
    with pytest.raises(InvalidRequest, match="expected 1 to 8 tokens, the longest text of adapter 'legal', got 9"):
        limits.check(adapter, LONG)


def test_each_revision_has_its_own_limit(tmp_path: Path) -> None:
    limits, revisions = PromptLimits(tmp_path / "base"), Revisions()
    first = revisions.reference("legal", str(with_limit(tmp_path, 8)))
    with_limit(tmp_path, 900)
    with pytest.raises(AdapterChanged):
        limits.read(first)
    second = revisions.reference("legal", str(tmp_path))
    limits.read(second)
    limits.check(second, LONG)
    assert not limits.knows(first)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_usable_limit_has_none(content: str | None, tmp_path: Path) -> None:
    """The load of the adapter refuses a file that cannot be read."""
    if content is not None:
        (tmp_path / "sentence_bert_config.json").write_text(content)
    adapter = Revisions().reference("legal", str(tmp_path))
    limits = PromptLimits(tmp_path / "base")
    limits.read(adapter)
    limits.check(adapter, LONG)
