"""Classifiers that sentence-transformers has saved as CrossEncoders have its scores, or are refused by name."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules.transformer import Transformer
from torch import nn

from ranklet.cluster.ingress.pair_prompts import PairPrompts, paired
from ranklet.cluster.replica.adapter_texts import AdapterTexts
from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import HeadParams
from ranklet.replicas.errors import InvalidAdapter
from ranklet.replicas.model.tokenizer import PromptTokenizer
from tests.assets.adapters import quiet, randomize_adapter
from tests.assets.make import make_model
from tests.assets.sentence_folders import SMALL_MODEL
from tests.replicas.asking import ask, ref

QUERY, DOCUMENTS = "When must notice be given?", ["In writing.", "a", "word " * 20]


@pytest.fixture(scope="module", name="base_dir")
def _base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", text=True, pooling=None, **SMALL_MODEL)


def save(base_dir: Path, folder: Path, activation: nn.Module | None = None) -> Path:
    """Save an adapter with one label as sentence-transformers does."""
    with quiet():
        transformer = Transformer(
            str(base_dir), transformer_task="sequence-classification", config_kwargs={"num_labels": 1}
        )
        model = CrossEncoder(modules=[transformer], activation_fn=activation, device="cpu")
        model.add_adapter(
            LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "up_proj"], modules_to_save=["score"])
        )
        randomize_adapter(model, seed=1, strength=0.6)
        model.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module", name="saved")
def _saved(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(base_dir, tmp_path_factory.mktemp("saved") / "ranker")


@pytest.fixture(name="folder")
def _folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "ranker"))


@pytest.fixture(scope="module", name="engine")
def _engine(base_dir: Path) -> Any:
    engine = Engine(EngineConfig(base_dir, slots=2, max_batch_tokens=512))
    engine.start()
    yield engine
    engine.stop()


def test_logits_equal_those_of_sentence_transformers(base_dir: Path, saved: Path, engine: Engine) -> None:
    adapter = ref(saved)
    rules = PairPrompts(engine.limits, "documents", 128)
    ids = rules.encode(PromptTokenizer(base_dir), paired([QUERY], DOCUMENTS, None, "documents"))
    found = ask(engine, ids, adapter, pooling="last", normalize=False, head=HeadParams(adapter.revision)).result[:, 0]
    with quiet():
        theirs = CrossEncoder(str(saved), num_labels=1, device="cpu")
        theirs.tokenizer.pad_token = theirs.tokenizer.eos_token
    expected = [theirs.predict([(QUERY, each)], activation_fn=nn.Identity())[0] for each in DOCUMENTS]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("activation", "expected"), [(None, False), (nn.Sigmoid(), False), (nn.Identity(), True)])
def test_the_saved_activation_makes_the_scores(
    base_dir: Path, tmp_path: Path, activation: nn.Module | None, expected: bool
) -> None:
    folder = save(base_dir, tmp_path / "ranker", activation)
    text = AdapterTexts(base_dir, AdapterSettings(base_dir)).describe(ref(folder))
    assert not text.findings
    assert (text.embedding.cross_encoder, text.embedding.scores_are_logits) == (True, expected)
    assert text.embedding.classifier is not None


def test_the_activation_may_be_in_the_config_of_the_model(base_dir: Path, folder: Path) -> None:
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    for config in (
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ):
        (folder / "config.json").write_text(json.dumps(config))
        assert AdapterSettings(base_dir).read(ref(folder)).scores_are_logits


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.activation.Tanh"}, "Sigmoid or"),
        ("config_sentence_transformers.json", {"activation_fn": ["Sigmoid"]}, "activation_fn: expected"),
        (
            "config_sentence_transformers.json", {"prompts": {"a": "Judge."}, "default_prompt_name": "a"},
            "default_prompt_name: expected none",
        ),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "'sequence-classification'"),
        ("adapter_config.json", {"task_type": "FEATURE_EXTRACTION", "modules_to_save": None}, "expected the order"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(
    engine: Engine, folder: Path, name: str, fields: dict[str, Any], says: str
) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))
    with pytest.raises(InvalidAdapter, match=re.escape(says)):
        engine.load(ref(folder))
