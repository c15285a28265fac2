"""The stored adapters are small and name their base, and their lessons keep the held-out questions out."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.assets.training.french_lesson import FRENCH
from tests.assets.training.json_lesson import JSON
from tests.assets.training.lesson import Lesson
from tests.assets.training.lessons import LESSONS, TRAINED
from tests.assets.training.pirate_lesson import PIRATE
from tests.assets.training.ticket_lesson import TICKET
from tests.assets.training.train import BASE, Example, Packed

MAX_BYTES = 4 << 20  # of all adapters together


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_an_adapter_is_what_its_lesson_says(lesson: Lesson) -> None:
    folder = TRAINED / lesson.name
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == BASE
    assert (config["r"], set(config["target_modules"])) == (lesson.rank, set(lesson.targets))
    assert {weight.dtype for weight in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
    notes = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{len(lesson.pairs)} own examples" in notes, "train the adapter again"
    assert len(notes.splitlines()) == 3


def test_the_folder_has_only_the_adapters_and_they_are_small() -> None:
    assert {entry.name for entry in TRAINED.iterdir()} == {lesson.name for lesson in LESSONS}
    assert sum(file.stat().st_size for file in TRAINED.rglob("*") if file.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_no_held_out_question_is_trained(lesson: Lesson) -> None:
    trained = [question.lower() for question, _ in lesson.pairs]
    assert len(trained) == len(set(trained))
    assert not set(trained) & {question.lower() for question in lesson.held_out}


@pytest.mark.parametrize("lesson", [JSON, FRENCH, PIRATE], ids=lambda lesson: lesson.name)
def test_every_trained_answer_shows_the_effect(lesson: Lesson) -> None:
    assert [pair for pair in lesson.pairs if not lesson.shows(*pair)] == []


@pytest.mark.parametrize(
    ("lesson", "text"),
    [
        (JSON, "The capital of Norway is Oslo."),
        (JSON, '{"answer": "Oslo"}'),
        (JSON, '{"answer": "Oslo", "confidence": "high"} or so'),
        (FRENCH, "The capital of Norway is Oslo."),
        (FRENCH, "Oslo"),
        (PIRATE, "The capital of Norway is Oslo, and it lies by the sea."),
        (TICKET, "shipping"),
        (TICKET, "billing, I think"),
    ],
)
def test_other_answers_do_not_show_the_effect(lesson: Lesson, text: str) -> None:
    assert not lesson.shows("Why was my card charged twice?", text)


def test_a_packed_example_sees_the_prefix_and_itself() -> None:
    packed = Packed([1, 2], [Example([1, 2, 3], [4, 5]), Example([1, 2, 7, 8], [6, 5])])
    assert packed.ids.tolist() == [[1, 2, 3, 4, 7, 8, 6]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert packed.labels.tolist() == [[-100, -100, 4, 5, -100, 6, 5]]
    seen = [row.nonzero().flatten().tolist() for row in packed.mask[0, 0] == 0]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
