"""What an engine checks and says when it starts."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ranklet.replicas.errors import ModelError
from tests.replicas.engine.recording import MakeEngine


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("5", "expected an id or a list of ids, got '5'"), ([7, 1024], "expected ids from 0 to 1023, .* got 1024")],
)
def test_a_broken_generation_config_is_refused_by_an_engine_that_generates_text(
    wrong: Any, says: str, make_engine: MakeEngine, model_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ModelError, match=rf"{folder}/generation_config\.json: eos_token_id: {says}"):
        make_engine(folder, kv_cache_bytes=8 << 20)
    make_engine(folder)  # for embeddings only


def test_the_log_says_how_long_each_part_of_the_start_took(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        make_engine(kv_cache_bytes=8 << 20).start()
        make_engine().start()
    parts = [re.findall(r"([a-z ]+) \d+\.\d s", line) for line in caplog.messages if "started" in line]
    assert [[part.strip() for part in line[1:]] for line in parts] == [
        ["weights", "revision", "grammars", "kernels", "text kernels", "pages", "graphs"],
        ["weights", "kernels"],
    ]
