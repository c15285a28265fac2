"""Replicas read what an adapter's folder says about embeddings once for each revision."""

import json
from pathlib import Path

import pytest

from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.errors import AdapterChanged


def with_limit(folder: Path, tokens: int) -> Path:
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": tokens}))
    return folder


def test_each_revision_has_its_own_settings(tmp_path: Path) -> None:
    settings, revisions = AdapterSettings(tmp_path / "base"), Revisions()
    first = revisions.reference("legal", str(with_limit(tmp_path, 8)))
    assert settings.known(first) is None
    assert settings.read(first).max_tokens == 8
    assert settings.known(first) == settings.read(first)
    with_limit(tmp_path, 900)
    second = revisions.reference("legal", str(tmp_path))
    assert settings.known(second) is None
    assert settings.read(second).max_tokens == 900
    with pytest.raises(AdapterChanged):
        settings.read(first)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"max_seq_length": null}'])
def test_a_folder_without_usable_settings_of_its_own_has_the_bases(content: str | None, tmp_path: Path) -> None:
    """The load of the adapter refuses a file that cannot be read."""
    if content is not None:
        (tmp_path / "sentence_bert_config.json").write_text(content)
    settings = AdapterSettings(tmp_path / "base")
    assert settings.read(Revisions().reference("legal", str(tmp_path))) is settings.base
