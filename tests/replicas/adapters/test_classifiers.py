"""Heads of classifiers compute the logits of transformers and PEFT; heads that do not fit are refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import HeadParams
from ranklet.replicas.errors import InvalidAdapter, InvalidRequest
from ranklet.replicas.model.classifier import Classifier
from ranklet.replicas.model.modules import ALL_MODULES
from tests.assets.adapters import AdapterSpec, load_base, quiet, save_adapter
from tests.assets.classifiers import reference_logits, save_classifier
from tests.assets.oracle import attach
from tests.replicas.asking import ask

LABELS = ("billing", "law", "other")
PROMPTS: list[NDArray[np.int32]] = [np.arange(5, 5 + length, dtype=np.int32) for length in (1, 9, 40)]


@pytest.fixture(scope="module", name="engine")
def _engine(model_dir: Path) -> Iterator[Engine]:
    engine = Engine(EngineConfig(model_dir, slots=2, dtype="float32"))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module", name="saved")
def _saved(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(
        model_dir, tmp_path_factory.mktemp("saved") / "topics", LABELS, r=8, target_modules=["q_proj", "up_proj"]
    )


@pytest.fixture(name="folder")
def _folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "topics"))


def logits(engine: Engine, folder: Path) -> NDArray[np.float32]:
    ref = Revisions().reference(folder.name, str(folder))
    head = HeadParams(ref.revision)
    found: NDArray[np.float32] = ask(engine, PROMPTS, ref, pooling="last", normalize=False, head=head).result
    return found


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key.replace(old, new): value for key, value in tensors.items()}, folder / WEIGHTS_FILE)


def change(folder: Path, **fields: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_logits_equal_those_of_transformers_and_peft(engine: Engine, saved: Path, model_dir: Path) -> None:
    found = logits(engine, saved)
    np.testing.assert_allclose(found, reference_logits(model_dir, saved, PROMPTS), rtol=0, atol=1e-5)
    assert found.std() > 0.01


def test_each_way_to_save_a_head_is_read(engine: Engine, folder: Path) -> None:
    before = logits(engine, folder)
    for name in ("score.modules_to_save", "score.modules_to_save.default", "classifier"):
        other = Path(shutil.copytree(folder, folder.parent / name))
        rename(other, "model.score.", f"model.{name}.")
        change(other, task_type=None, modules_to_save=["score"])
        np.testing.assert_array_equal(logits(engine, other), before)


def test_a_bias_is_added(engine: Engine, folder: Path) -> None:
    before = logits(engine, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    bias = torch.tensor([1.0, -2.0, 3.0])
    save_file(tensors | {"base_model.model.score.bias": bias}, folder / WEIGHTS_FILE)
    np.testing.assert_allclose(logits(engine, folder), before + bias.numpy(), rtol=0, atol=1e-6)


WEIGHT = "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "finding"),
    [
        ({WEIGHT: None}, {}, "SEQ_CLS needs the trained head"),
        ({WEIGHT: torch.zeros(3, 64)}, {}, r"expected the shape \[labels, 128\] with 1 to 4096 labels, got \[3, 64\]"),
        ({WEIGHT: torch.zeros(4097, 128)}, {}, r"got \[4097, 128\]"),
        ({WEIGHT: torch.zeros(2, 128)}, {}, "expected 3 rows, as config.json has labels, got 2"),
        ({WEIGHT: torch.full((3, 128), torch.nan)}, {}, "expected finite numbers"),
        ({WEIGHT: torch.zeros(3, 128, dtype=torch.int32)}, {}, "expected float32, bfloat16 or float16, got I32"),
        ({"base_model.model.score.bias": torch.zeros(2)}, {}, r"score.bias: expected the shape \[3\], got \[2\]"),
        ({"base_model.model.classifier.weight": torch.zeros(3, 128)}, {}, "a second weight of the classification head"),
        ({}, {"id2label": {"1": "a"}}, "id2label: expected texts .* got None for 0"),
        ({}, {"problem_type": "ranking"}, "problem_type: expected one of single_label_classification"),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused(
    engine: Engine, folder: Path, tensors: dict[str, torch.Tensor | None], config: dict[str, object], finding: str
) -> None:
    found = load_file(folder / WEIGHTS_FILE) | tensors
    save_file({key: value for key, value in found.items() if value is not None}, folder / WEIGHTS_FILE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InvalidAdapter, match=finding):
        engine.load(Revisions().reference("topics", str(folder)))


def test_logits_that_are_not_finite_are_refused(engine: Engine, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors | {WEIGHT: torch.full((3, 128), 3e38)}, folder / WEIGHTS_FILE)
    with pytest.raises(InvalidAdapter, match="the output of the head for these prompts is not finite"):
        logits(engine, folder)


def test_a_head_without_its_task_is_refused(engine: Engine, folder: Path) -> None:
    change(folder, task_type="TOKEN_CLS")
    with pytest.raises(InvalidAdapter, match="task_type: TOKEN_CLS: labels of tokens are not computed"):
        logits(engine, folder)
    change(folder, task_type="CAUSAL_LM")
    with pytest.raises(InvalidAdapter, match="modules_to_save: expected embed_tokens or lm_head, and score and"):
        engine.load(Revisions().reference("topics", str(folder)))


def test_labels_and_padding_are_those_of_the_folder_or_the_base_model(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"pad_token_id": 7}))

    def classifier() -> Classifier | None:
        return AdapterSettings(base).read(Revisions().reference("topics", str(folder))).classifier

    assert classifier() == Classifier(LABELS, None, 7)
    (folder / "config.json").write_text(
        json.dumps({"num_labels": 2, "pad_token_id": None, "problem_type": "regression"})
    )
    assert classifier() == Classifier(("LABEL_0", "LABEL_1"), "regression", None)
    (folder / "config.json").unlink()
    found = classifier()
    assert found == Classifier(None, None, 7)
    assert found.label(4) == "LABEL_4"
    change(folder, task_type=None, modules_to_save=None)
    assert classifier() is None


def test_the_logits_of_two_tokens_are_compared(text_family: tuple[Path, list[AdapterSpec]], tmp_path: Path) -> None:
    model, _ = text_family
    plain, headed = (
        save_adapter(model, tmp_path / name, r=8, target_modules=["q_proj", "up_proj", *more])
        for name, more in (("plain", ()), ("headed", ("lm_head",)))
    )
    engine = Engine(EngineConfig(model, slots=2, dtype="float32", kv_cache_bytes=4 << 20, lora_modules=ALL_MODULES))
    engine.start()
    try:
        for prompts in (PROMPTS, PROMPTS[:1]):
            ref = Revisions().reference("plain", str(plain))
            head = HeadParams(ref.revision, (3, 11))
            found = ask(engine, prompts, ref, pooling="last", normalize=False, head=head).result[:, 0]
            with quiet():
                causal = load_base(model, "causal")
                attach(causal, plain)
            with torch.inference_mode():
                rows = [
                    causal.eval()(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0, -1] for ids in prompts
                ]
            np.testing.assert_allclose(found, [float(row[11] - row[3]) for row in rows], rtol=0, atol=1e-5)
        head = HeadParams(ref.revision, (3, engine.limits.vocab))
        with pytest.raises(InvalidRequest, match="expected token ids from 0 to"):
            ask(engine, PROMPTS, ref, pooling="last", normalize=False, head=head)
        ref = Revisions().reference("headed", str(headed))
        with pytest.raises(InvalidAdapter, match="lm_head: expected the base's head"):
            ask(engine, PROMPTS, ref, pooling="last", normalize=False, head=HeadParams(ref.revision, (3, 11)))
    finally:
        engine.stop()
