"""Engines whose steps are padded, as on a GPU, answer as PEFT does in batches of all kinds of adapters and requests."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels import paged_attention
from ranklet.kernels.dispatch import NAMES
from ranklet.kernels.prefill_attention import prefill_triton
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine import paged_layout
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import Generation
from ranklet.replicas.engine.paged_layout import LayoutPacker, PagedLayout
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.model import attention, row_decoder, sampler
from ranklet.replicas.model.decoder import DeviceBatch
from ranklet.replicas.model.modules import ALL_MODULES
from tests.assets.adapters import LINEAR, save_adapter
from tests.assets.make import make_model
from tests.assets.oracle import cosine, reference_embedding
from tests.assets.text_oracle import chosen_logprobs
from tests.assets.token_rows import save_resized_adapter, save_token_adapter
from tests.replicas.asking import PATIENCE_S, assert_same, ref, submit
from tests.replicas.text_scene import LOGPROB_ROUNDING, generate

INVOCATION = (7, 8, 9)
ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": list(LINEAR)},
    "some": {"target_modules": ["v_proj", "down_proj"], "r": 9, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "bias": "all"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 3},
    "head": {"target_modules": ["o_proj", "lm_head"], "lora_alpha": 7},
    "activated": {
        "target_modules": ["k_proj", "gate_proj", "lm_head"], "task_type": "CAUSAL_LM",
        "alora_invocation_tokens": list(INVOCATION),
    },
}  # fmt: skip
WITH_TOKEN_ROWS = ("tokens-of-both", "embedding-and-tokens-of-head")
PAGE_BYTES = 2 * 2 * 2 * 64 * 16 * 4  # layers, keys and values, heads, tokens, width, bytes
LENGTHS = (70, 9, 20, 12)  # of prompts; pages have 64 tokens


class AskedLogprobs(NamedTuple):
    """A text, with the logprobs of all its tokens."""

    folder: Path | None
    prompt: NDArray[np.int32]
    answer: Future[Answer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded") / "model"
    return make_model(
        folder, architecture="llama", tied=False, text=True, layers=2, hidden_size=64, intermediate_size=96,
        head_dim=16, config={"attention_bias": True},
    )  # fmt: skip


@pytest.fixture(scope="module")
def owners(model: Path) -> list[Path | None]:
    """The base model, and adapters of all kinds."""
    made = [save_adapter(model, model.parent / name, **{"r": 6, **fields}) for name, fields in ADAPTERS.items()]
    made += [save_token_adapter(model, model.parent / name) for name in WITH_TOKEN_ROWS]
    return [None, *made, save_resized_adapter(model, model.parent / "resized")]


@pytest.fixture
def started(model: Path) -> Iterator[Callable[..., Engine]]:
    """Return a function that starts engines with padded steps."""
    made: list[Engine] = []

    def start(backend: str, **fields: Any) -> Engine:
        settings: dict[str, Any] = {
            "slots": 9, "max_rank": 16, "token_rows": 256, "max_batch_tokens": 128, "kv_cache_bytes": 4 << 20,
            "max_model_len": 96, "max_adapters_per_batch": 4, "padded_steps": True, **fields,
        }  # fmt: skip
        made.append(Engine(EngineConfig(model, backend=backend, lora_modules=ALL_MODULES, **settings)))
        made[-1].start()
        return made[-1]

    yield start
    for engine in made:
        engine.check_integrity()
        engine.stop()


def prompt_of(length: int, seed: int) -> NDArray[np.int32]:
    """Return a prompt with an invocation in the middle, and with tokens that some adapters have rows for."""
    ids = np.random.default_rng(seed).integers(20, 1000, length, dtype=np.int32)
    ids[-2:] = 45, 3
    ids[length // 2 :][: len(INVOCATION)] = INVOCATION
    return ids


def ask_text(
    engine: Engine, folder: Path | None, prompt: NDArray[np.int32], tokens: int, **params: Any
) -> AskedLogprobs:
    adapter = ref(folder) if folder else None
    return AskedLogprobs(
        folder, prompt, generate(engine, [prompt], adapter, tokens, **{"prompt_logprobs": 0, **params})
    )


def check_text(model: Path, asked: AskedLogprobs, rounding: float = LOGPROB_ROUNDING) -> Generation:
    """Compare all logprobs with those of PEFT."""
    made: Generation = asked.answer.result(PATIENCE_S).result
    (choice,) = made.choices
    tokens = np.concatenate([asked.prompt, choice.tokens])
    wanted = chosen_logprobs(model, asked.folder, tokens, prompt=len(asked.prompt))
    ours = [each.logprob for each in (*(made.prompt_logprobs or [[]])[0], *(choice.logprobs or ()))]
    assert np.abs(ours - wanted[-len(ours) :]).max() < rounding, (asked.folder, len(asked.prompt))
    return made


def loaded(engine: Engine, owners: list[Path | None], *names: str) -> list[Path | None]:
    """Load adapters of some names, all without names. Returns them and the base model."""
    some = [folder for folder in owners if folder is None or not names or folder.name in names]
    for folder in some:
        if folder is not None:
            engine.load(ref(folder))
    return some


def kinds_of(layout: PagedLayout) -> set[str]:
    """Return what a step has."""
    sizes = layout.sizes
    found = {name for name in ("decodes", "chunks", "fresh", "drawn", "pooled") if getattr(sizes, name)}
    return found | {name for name in ("scored", "drawn_lora") if getattr(layout, name)}


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[PagedLayout]:
    """The layouts of all steps with pages from now on."""
    found: list[PagedLayout] = []
    pack = LayoutPacker.pack

    def packed(*args: Any) -> PagedLayout:
        found.append(pack(*args))
        return found[-1]

    monkeypatch.setattr(LayoutPacker, "pack", packed)
    return found


@pytest.fixture
def kernels_of_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels compute attention over pages and draw tokens, and `RowDecoder` short steps of texts."""
    monkeypatch.setattr(row_decoder, "supports", lambda _: True)
    monkeypatch.setattr(attention, "prefill", prefill_triton)
    monkeypatch.setattr(attention, "decode", paged_attention.decode_triton)
    monkeypatch.setattr(paged_attention, "decode", paged_attention.decode_triton)
    monkeypatch.setattr(sampler, "sample_by_torch", sampler.sample_by_kernels)


@pytest.mark.parametrize("backend", NAMES)
def test_mixed_batches_answer_as_peft_does(
    backend: str, model: Path, owners: list[Path | None], started: Callable[..., Engine], layouts: list[PagedLayout]
) -> None:
    engine = started(backend)
    check_mixed(model, engine, loaded(engine, owners), layouts)


@pytest.mark.usefixtures("kernels_of_hopper")
def test_kernels_of_hopper_answer_as_peft_does(
    model: Path, owners: list[Path | None], started: Callable[..., Engine], layouts: list[PagedLayout]
) -> None:
    engine = started("csgmv", max_batch_requests=16)
    some = loaded(engine, owners, "dora", "head", "activated", "resized")
    check_mixed(model, engine, some, layouts)


@pytest.mark.usefixtures("kernels_of_hopper")
def test_row_products_serve_short_steps_of_texts_only(
    owners: list[Path | None], started: Callable[..., Engine], layouts: list[PagedLayout],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Vectors are those of `Decoder` in steps of any size, so that they are nearer to each other."""
    engine = started("csgmv")
    folder = next(each for each in loaded(engine, owners, "linear") if each is not None)
    tokens, forward = list[int](), row_decoder.RowDecoder.forward

    def counted(self: row_decoder.RowDecoder, batch: DeviceBatch, *others: Any) -> Tensor:
        tokens.append(len(batch.ids))
        return forward(self, batch, *others)

    monkeypatch.setattr(row_decoder.RowDecoder, "forward", counted)
    ask_text(engine, folder, prompt_of(70, 0), 3, prompt_logprobs=None).answer.result(PATIENCE_S)
    with engine.paused():
        text = ask_text(engine, folder, prompt_of(71, 1), 3, prompt_logprobs=None)
        vector = submit(engine, [prompt_of(12, 2)], ref(folder))
    text.answer.result(PATIENCE_S)
    vector.result(PATIENCE_S)
    with_prompts = [each for each in layouts if each.sizes.chunks]
    assert any(each.pooled_items for each in with_prompts)
    wanted = [each.sizes.tokens for each in with_prompts if not each.pooled_items]
    assert [each for each in tokens if each > 1] == wanted != []


def check_mixed(model: Path, engine: Engine, owners: list[Path | None], layouts: list[PagedLayout]) -> None:
    """Ask for a text and vectors of each adapter at once, and compare them."""
    with engine.paused():
        texts = [
            ask_text(engine, folder, prompt_of(LENGTHS[i % 4], i), 3, logprobs=2) for i, folder in enumerate(owners)
        ]
        pooled = [folder for folder in owners if folder is None or folder.name != "activated"]
        asked = [prompt_of(12, 20), prompt_of(5, 21)]
        vectors = [submit(engine, asked, ref(folder) if folder else None) for folder in pooled]
    for text in texts:
        check_text(model, text)
    for folder, vector in zip(pooled, vectors, strict=True):
        assert_same(vector.result(PATIENCE_S).result, reference_embedding(model, folder, asked))
    again = ask_text(engine, texts[0].folder, texts[0].prompt, 3, prompt_logprobs=None)
    assert check_text(model, again).cached_tokens == 64
    found = [kinds_of(each) for each in layouts]
    assert {"decodes", "drawn", "drawn_lora"} in found
    assert {"decodes", "chunks", "fresh", "drawn", "drawn_lora", "pooled", "scored"} in found
    assert all(each.lora.rows == each.sizes.tokens > len(each.drawn_items) for each in layouts if each.sizes.chunks)


@pytest.mark.parametrize("backend", ["csgmv", "native"])
def test_prompts_of_other_ways_to_pool_answer_as_peft_does(
    backend: str, model: Path, owners: list[Path | None], started: Callable[..., Engine]
) -> None:
    """Their heads read all tokens, so their steps have no pages."""
    engine = started(backend)
    asked = [prompt_of(12, 20), prompt_of(30, 21), prompt_of(5, 22)]
    some = loaded(engine, owners, "linear", "dora", "embedding", "resized")
    with engine.paused():
        vectors = [submit(engine, asked, ref(each) if each else None, pooling="mean") for each in some]
    for folder, vector in zip(some, vectors, strict=True):
        assert_same(vector.result(PATIENCE_S).result, reference_embedding(model, folder, asked, pooling="mean"))


def test_preempted_texts_answer_as_peft_does(
    model: Path, owners: list[Path | None], started: Callable[..., Engine]
) -> None:
    """Three texts start in five pages, and then each needs one more."""
    engine = started("csgmv", kv_cache_bytes=5 * PAGE_BYTES)
    some = loaded(engine, owners, "head", "tokens-of-both")
    with engine.paused():
        texts = [ask_text(engine, folder, prompt_of(62, i), 5) for i, folder in enumerate(some)]
    for text in texts:
        check_text(model, text)
    state = engine.snapshot().kv_cache
    assert state is not None
    assert state.preemptions > 0


@pytest.mark.parametrize("backend", ["csgmv", "native"])
def test_long_steps_answer_as_peft_does(
    backend: str, model: Path, owners: list[Path | None], started: Callable[..., Engine], layouts: list[PagedLayout],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They compute LoRA only where an adapter has some, and read the keys of whole prompts from the step."""
    monkeypatch.setattr(paged_layout, "SHORT_STEP", 1024)  # a step on the CPU is shorter than the limit on a GPU
    engine = started(backend, max_batch_tokens=4096, max_model_len=2048)
    some = loaded(engine, owners, "some", "head", "resized")
    with engine.paused():
        texts = [ask_text(engine, folder, prompt_of(250 if i else 1100, i), 2) for i, folder in enumerate(some)]
    for text in texts:
        check_text(model, text)
    sizes, is_everywhere = layouts[0].sizes, layouts[0].lora.everywhere
    assert (sizes.tokens, sizes.fresh, sizes.chunks, is_everywhere) == (2048, 4, 0, False)


def test_padding_changes_no_drawn_token(owners: list[Path | None], started: Callable[..., Engine]) -> None:
    """Texts of a padded step share the features that they ask of the sampler."""
    ways: list[dict[str, Any]] = [
        {}, {"seed": 3, "temperature": 1.0}, {"seed": 4, "temperature": 0.8, "top_p": 0.9, "n": 2},
        {"presence_penalty": 0.5, "logit_bias": ((7, 2.0),), "logprobs": 2}, {"allowed_token_ids": (30, 40, 50)},
    ]  # fmt: skip
    drawn = []
    for padded in (False, True):
        engine = started("native", padded_steps=padded)
        with engine.paused():
            texts = [ask_text(engine, owners[i % 3], prompt_of(9, i), 6, **way) for i, way in enumerate(ways)]
        choices = [text.answer.result(PATIENCE_S).result.choices for text in texts]
        drawn.append([each.tokens.tolist() for made in choices for each in made])
    assert drawn[0] == drawn[1]


@pytest.mark.gpu
def test_replayed_steps_answer_as_peft_does(
    model: Path, owners: list[Path | None], started: Callable[..., Engine]
) -> None:
    """Each turn has other lengths and another order of adapters, and finds graphs of the turns before."""
    engine = started("csgmv", dtype="float32", prefix_cache=False)
    rng, some = np.random.default_rng(0), loaded(engine, owners)
    for turn in range(6):
        order = [some[i] for i in rng.permutation(len(some))]
        asked = [prompt_of(int(length), 20 + turn) for length in rng.integers(5, 16, 2)]
        pooled = [folder for folder in order if folder is None or folder.name != "activated"]
        with engine.paused():
            vectors = [submit(engine, asked, ref(folder) if folder else None) for folder in pooled]
            texts = [
                ask_text(engine, folder, prompt_of(int(rng.integers(6, 80)), 10 * turn + i), 3, prompt_logprobs=None)
                for i, folder in enumerate(order)
            ]
        for text in texts:
            check_text(model, text, 1e-3)
        for folder, vector in zip(pooled, vectors, strict=True):
            for ours, wanted in zip(
                vector.result(PATIENCE_S).result, reference_embedding(model, folder, asked), strict=True
            ):
                assert cosine(ours, wanted) > 0.99999, (folder, turn)
    assert engine.runner.graphs
