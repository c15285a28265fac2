"""Causal rerankers as sentence-transformers saves them (LogitScore) have the scores that it computes."""

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
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
from torch import nn

from ranklet.cluster.ingress.pair_prompts import PairPrompts, paired
from ranklet.cluster.message import AdapterText
from ranklet.cluster.replica.adapter_texts import AdapterTexts
from ranklet.cluster.reranking import Reranking
from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import HeadParams
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.embedding_settings import read_base_settings, read_embedding_settings
from ranklet.replicas.model.tokenizer import PromptTokenizer
from tests.assets.adapters import quiet, randomize_adapter
from tests.assets.make import make_model
from tests.assets.sentence_folders import SMALL_MODEL
from tests.replicas.asking import ask, ref

LONGER = SMALL_MODEL | {"max_position_embeddings": 256}
PARTS = (
    "{% for message in messages if message.role == 'system' %}<I>{{ message.content[0].text }}{% endfor %}"
    '<Q>{{ (messages | selectattr("role", "eq", "query") | first).content[0].text }}'
    '<D>{{ (messages | selectattr("role", "eq", "document") | first).content[0].text }}'
    "{% if add_generation_prompt %}<A>{% endif %}"
)
PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
QUERY, DOCUMENTS = "When must notice {be} given?", [" In writing.\n", "a {query}", "word " * 20]


@pytest.fixture(scope="module", name="base_dir")
def _base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("base") / "model",
        text=True,
        pooling=None,
        **SMALL_MODEL | {"max_position_embeddings": 256},
    )


def save(base_dir: Path, folder: Path, template: str, **arguments: Any) -> Path:
    """Save an adapter as sentence-transformers does."""
    base = Path(shutil.copytree(base_dir, folder.parent / base_dir.name))
    (base / "chat_template.jinja").write_text(template)
    with quiet():
        transformer = Transformer(str(base), transformer_task="text-generation", **arguments)
        prompts = {"prompts": {"task": "Judge."}, "default_prompt_name": "task"}
        model = CrossEncoder(modules=[transformer, LogitScore(11, 3)], device="cpu", **prompts)
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        randomize_adapter(model, seed=1, strength=0.6)
        model.save_pretrained(str(folder), create_model_card=False)
    return folder


def started(base_dir: Path) -> Engine:
    engine = Engine(EngineConfig(base_dir, slots=2, max_batch_tokens=512, kv_cache_bytes=4 << 20))
    engine.start()
    return engine


def described(base_dir: Path, adapter: AdapterRef) -> AdapterText:
    return AdapterTexts(base_dir, AdapterSettings(base_dir)).describe(adapter)


@pytest.mark.parametrize(
    ("template", "arguments"),
    [(PARTS, {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}), (PLAIN, {})],
)
def test_scores_equal_those_of_sentence_transformers(
    base_dir: Path, tmp_path: Path, template: str, arguments: dict[str, Any]
) -> None:
    folder = save(base_dir, tmp_path / "ranker", template, **arguments)
    adapter = ref(folder)
    reranking = described(base_dir, adapter).reranking
    assert reranking is not None
    assert reranking.tokens == (3, 11)
    engine = started(base_dir)
    try:
        rules = PairPrompts(engine.limits, "documents", 256, reranking=reranking)
        ids = rules.encode(PromptTokenizer(base_dir), paired([QUERY], DOCUMENTS, reranking, "documents"))
        head = HeadParams(adapter.revision, reranking.tokens)
        found = ask(engine, ids, adapter, pooling="last", normalize=False, head=head).result[:, 0]
    finally:
        engine.stop()
    with quiet():
        theirs = CrossEncoder(str(folder), device="cpu")
    expected = theirs.predict([(QUERY, each) for each in DOCUMENTS], activation_fn=nn.Identity())
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module", name="plain")
def _plain(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(base_dir, tmp_path_factory.mktemp("saved") / "ranker", PLAIN)


@pytest.fixture(name="folder")
def _folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "ranker"))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "1_LogitScore: expected a chat template for pairs, found none"),
        (
            "{{ messages[-1].content }}",
            "characters with the texts of the roles query and document as they are",
        ),
        (PLAIN.replace("content }}", "content | trim }}"), "chat template: expected a prompt of at most"),
        ("{{ raise_exception('no pairs') }}", "no pairs"),
    ],
)
def test_templates_that_make_no_prompt_of_a_pair_are_refused(
    base_dir: Path, folder: Path, template: str | None, says: str
) -> None:
    file = folder / "chat_template.jinja"
    file.unlink() if template is None else file.write_text(template)
    (finding,) = described(base_dir, ref(folder)).findings
    assert says in finding
    own = {"rerank": {"template": "{query} {document}"}}
    (folder / "ranklet.json").write_text(json.dumps(own))
    text = described(base_dir, ref(folder))
    assert (text.findings, text.reranking) == ((), Reranking("{query} {document}", (3, 11)))


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("1_LogitScore/config.json", {"false_token_id": None}, "expected two different token ids, got None and 11"),
        ("1_LogitScore/config.json", {"module_input_name": "logits"}, "module_input_name: expected 'causal_logits'"),
        ("1_LogitScore/config.json", {"scale": 2}, "scale: not supported"),
        (
            "sentence_bert_config.json",
            {"transformer_task": "fill-mask"},
            "transformer_task: expected 'text-generation'",
        ),
        ("sentence_bert_config.json", {"modality_config": {"message": {"format": "x"}}}, "structured or flat messages"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type: expected 'CrossEncoder'"),
    ],
)
def test_other_settings_are_refused_by_name(
    base_dir: Path, folder: Path, name: str, fields: dict[str, Any], says: str
) -> None:
    content = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"^{re.escape(name)}: .*{re.escape(says)}"):
        read_embedding_settings(folder, read_base_settings(base_dir))


def test_a_base_model_may_be_a_reranker_too(base_dir: Path, folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    for name in ("modules.json", "1_LogitScore", "sentence_bert_config.json", "config_sentence_transformers.json"):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, base / name)
    found = read_base_settings(base)
    assert (found.mode, found.normalize, found.logit_score is not None) == ("last", True, True)
