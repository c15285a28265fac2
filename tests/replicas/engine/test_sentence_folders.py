"""A folder that says anything about embeddings has the vectors of sentence-transformers, or is refused by name.

Pooling, Dense layers, normalization, prompts and longest text are followed, of adapters too.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import nn

from ranklet.cluster.ingress.prompts import EmbeddingPrompts
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import InvalidAdapter, InvalidRequest, ModelError
from ranklet.replicas.model.embedding_settings import read_embedding_settings
from ranklet.replicas.model.tokenizer import PromptTokenizer
from tests.assets.adapters import quiet, save_adapter
from tests.assets.make import make_model
from tests.assets.sentence_folders import HIDDEN, SMALL_MODEL, SentenceFolder
from tests.replicas.asking import ask, ref

TEXTS = ["Notice must be given in WRITING.", "a", "a b c", "word " * 30]
LIMIT = 16
# What a refusal may name: a file, or a setting by the name that users know.
NAMED = re.compile(
    r"modules\.json|1_Pooling/config\.json|sentence_bert_config\.json|tokenizer(_config)?\.json|add_special_tokens|"
    r"do_lower_case"
)
NAMES = (None, "task", "query")

limits: st.SearchStrategy[dict[str, Any]] = st.sampled_from([
    {},
    {"transformer": {"max_seq_length": LIMIT}},
    {"transformer": {"max_seq_length": None}},
    {"transformer": {"tokenizer_args": {"model_max_length": LIMIT}}},
    {"transformer": {"processing_kwargs": {"text": {"max_length": LIMIT}}}},
    {"tokenizer": {"model_max_length": LIMIT}},
    {"tokenizer": {"model_max_length": 10**30}},
])  # fmt: skip
tokenizations: st.SearchStrategy[dict[str, Any]] = st.sampled_from([
    {}, {}, {},
    {"transformer": {"do_lower_case": True}},
    {"transformer": {"processing_kwargs": {"text": {"add_special_tokens": False}}}},
    {"transformer": {"processing_kwargs": {"common": {"padding": "max_length", "max_length": 64}}}},
    {"transformer": {"config_args": {"rms_norm_eps": 0.5}}},
    {"transformer": {"config_args": {"use_cache": False}, "model_args": {"torch_dtype": "float32"}}},
    {"appends": False}, {"lowers": True},
])  # fmt: skip
LAYERS: tuple[dict[str, Any], ...] = (
    {"out_features": 48, "activation_function": nn.GELU(), "bias": False},
    {"out_features": HIDDEN, "activation_function": nn.Identity()},
    {"out_features": HIDDEN, "activation_function": nn.SiLU(), "use_residual": True},
    {"out_features": 8, "activation_function": nn.Tanh(), "use_residual": True},
)
denses: st.SearchStrategy[tuple[dict[str, Any], ...]] = st.sampled_from([(), (), LAYERS[:1], LAYERS[:2], LAYERS])
orders = st.sampled_from([
    ("Transformer", "Pooling", "Normalize"), ("Transformer", "Pooling", "Normalize"), ("Transformer", "Pooling"),
    ("Transformer", "Normalize", "Pooling"),
])  # fmt: skip


@st.composite
def folders(draw: st.DrawFn) -> SentenceFolder:
    chosen = [draw(each) for each in (limits, tokenizations)]
    transformers = [each["transformer"] for each in chosen if "transformer" in each]
    return SentenceFolder(
        modules=draw(orders),
        dense=draw(denses),
        mode=draw(st.sampled_from(["lasttoken", "mean", "cls", "max"])),
        include_prompt=draw(st.sampled_from([True, True, False])),
        old_names=draw(st.booleans()),
        prompt=draw(st.sampled_from(["", "", "Represent this: "])),
        prompts=draw(st.sampled_from([{}, {"query": "Find what answers: "}, {"query": ""}])),
        transformer={key: value for each in transformers for key, value in each.items()} if transformers else None,
        tokenizer={key: value for each in chosen for key, value in each.get("tokenizer", {}).items()},
        appends=next((each["appends"] for each in chosen if "appends" in each), None),
        lowers=any("lowers" in each for each in chosen),
    )


@pytest.fixture(scope="module", name="base_dir")
def _base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", **SMALL_MODEL)


@pytest.fixture(scope="module", name="adapter_dir")
def _adapter_dir(base_dir: Path) -> Path:
    """Return an adapter's folder with copies of the base's tokenizer files and nothing of sentence-transformers."""
    folder = save_adapter(base_dir, base_dir.parent / "adapter", head="bare", r=4, target_modules=["q_proj", "v_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_dir / name, folder)
    return folder


@pytest.fixture(scope="module", name="engine")
def _engine(base_dir: Path) -> Iterator[Engine]:
    running = started(base_dir)
    yield running
    running.stop()


def started(folder: Path) -> Engine:
    engine = Engine(EngineConfig(folder, slots=2, max_batch_tokens=512))
    engine.start()
    return engine


def assert_equal(engine: Engine, base_dir: Path, folder: Path) -> None:
    """Compare each text with what sentence-transformers makes of `folder`: the base's own, or an adapter's.

    A text may be refused if it is too long, or has no token beside a prompt that is left out.
    """
    with quiet():
        theirs = SentenceTransformer(str(folder), device="cpu")
    tokenizer, adapter = PromptTokenizer(base_dir), None if folder == base_dir else ref(folder)
    compared = 0
    for name in NAMES:
        expected = theirs.encode(TEXTS, prompt_name=name) if name in (None, *theirs.prompts) else ()
        for text, vector in zip(TEXTS, expected, strict=False):
            try:
                ours = embedded(engine, tokenizer, folder, adapter, text, name)
            except InvalidRequest as error:
                assert_names(re.compile("expected 1 to [0-9]+ tokens|include_prompt"), error.message)
                continue
            if ours is not None:
                np.testing.assert_allclose(ours, vector, atol=1e-5, rtol=1e-4, err_msg=f"{name} {text}")
                compared += 1
    assert compared


def embedded(
    engine: Engine, tokenizer: PromptTokenizer, folder: Path, adapter: AdapterRef | None, text: str, name: str | None
) -> NDArray[np.float32] | None:
    """Embed a text as gateway and replica do; None if the folder has no such prompt."""
    base = tokenizer.settings
    settings = base if adapter is None else read_embedding_settings(folder, base)
    prompting = settings.prompting(name)
    if prompting is None:
        return None
    skipped = 0 if prompting.pools_text else tokenizer.count_prompt(prompting.text)
    longest = engine.limits.longest_embedding(reads_last=settings.mode == "last", folder_limit=settings.max_tokens)
    rules = EmbeddingPrompts(engine.limits, longest, prompting.text, skipped)
    ids = rules.encode(tokenizer, [text])
    rules.check(ids)
    params: dict[str, Any] = {"pooling": settings.mode, "normalize": settings.normalize, "skipped": skipped}
    params["dense"] = settings.dense
    vector: NDArray[np.float32] = ask(engine, ids, adapter, **params).result[0]
    return vector


def assert_names(pattern: re.Pattern[str], message: str) -> None:
    assert pattern.search(message), message


PROFILE = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROFILE
@given(made=folders())
@example(made=SentenceFolder(mode="mean", include_prompt=False, prompt="Represent this: "))
@example(made=SentenceFolder(mode="cls", include_prompt=False, prompt="Represent this: "))
@example(
    made=SentenceFolder(
        include_prompt=False, prompt="Represent this: ", tokenizer={"model_max_length": LIMIT}, appends=False
    )
)
@example(made=SentenceFolder(transformer={"processing_kwargs": {"text": {"add_special_tokens": False}}}))
@example(made=SentenceFolder(tokenizer={"model_max_length": LIMIT}))
@example(made=SentenceFolder(dense=LAYERS))
@example(made=SentenceFolder(("Transformer", "Pooling"), dense=LAYERS[:1], mode="mean"))
def test_a_base_model(made: SentenceFolder, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path(shutil.copytree(base_dir, tmp_path_factory.mktemp("made") / "model"))
    made.write(folder, HIDDEN)
    try:
        engine = started(folder)
    except ModelError as error:
        assert_names(NAMED, error.message.removeprefix(str(folder)))
        return
    try:
        assert_equal(engine, folder, folder)
    finally:
        engine.stop()


@PROFILE
@given(made=folders())
@example(made=SentenceFolder())
@example(made=SentenceFolder(mode="mean"))
@example(made=SentenceFolder(dense=LAYERS))
@example(made=SentenceFolder(("Transformer", "Pooling"), dense=LAYERS[:1], mode="mean"))
@example(made=SentenceFolder(modules=("Transformer", "Pooling")))
@example(made=SentenceFolder(prompt="Represent this: "))
@example(made=SentenceFolder(mode="mean", include_prompt=False, prompt="Represent this: "))
@example(made=SentenceFolder(mode="cls", include_prompt=False, prompt="Represent this: ", prompts={"query": "Q: "}))
@example(made=SentenceFolder(mode="lasttoken", include_prompt=False, prompt="Represent this: "))
@example(made=SentenceFolder(transformer={"max_seq_length": LIMIT}))
@example(made=SentenceFolder(tokenizer={"model_max_length": LIMIT}))
@example(made=SentenceFolder(lowers=True))
@example(made=SentenceFolder(appends=False))
def test_an_adapter(
    made: SentenceFolder, base_dir: Path, adapter_dir: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(adapter_dir, tmp_path_factory.mktemp("made") / "adapter"))
    made.write(folder, HIDDEN)
    if is_followed(made):
        assert_equal(engine, base_dir, folder)
        return
    try:
        assert_equal(engine, base_dir, folder)
    except (InvalidAdapter, ModelError) as error:
        for finding in error.findings if isinstance(error, InvalidAdapter) else (error.message,):
            assert_names(NAMED, finding)


def is_followed(made: SentenceFolder) -> bool:
    """Whether a folder differs from the base's in pooling, normalization, prompts and longest text only."""
    return (
        made.mode != "max" and made.modules[1] == "Pooling" and made.appends is None and not made.lowers
        and not (made.transformer or {}).keys() - {"max_seq_length", "tokenizer_args"}
    )  # fmt: skip
