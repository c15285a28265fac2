"""LoRA on `lm_head` gives the logits of PEFT, on tied and untied bases, and is refused where it has no slots."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranklet.kernels import native
from ranklet.kernels.batch import plan
from ranklet.kernels.row_subset import subset
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.packed import pack
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.verify import read_adapter
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import InvalidAdapter
from ranklet.replicas.model.architecture import read_architecture, read_config
from ranklet.replicas.model.decoder import Decoder
from ranklet.replicas.model.end_of_text import EndOfText
from ranklet.replicas.model.lm_head import LmHead
from ranklet.replicas.model.modules import ALL_MODULES, HEAD, LM_HEAD, LORA_MODULES
from tests.assets.adapters import save_adapter
from tests.assets.broken import edit_config, edit_weights
from tests.assets.causal import states_and_logits
from tests.assets.make import make_model
from tests.assets.oracle import reference_embedding
from tests.replicas.adapters.scene import Scene
from tests.replicas.asking import ask, assert_same, ref

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab_size": 500, "pooling": None,
}  # fmt: skip
IDS = [7, 300, 4, 4, 250, 11, 90, 2]
TARGETS: dict[str, Any] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "only-head": {"target_modules": ["lm_head"]},
    "pattern": {"target_modules": r".*(q_proj|lm_head)"},
    "full-name": {"target_modules": ["model.embed_tokens"]},
    "pattern-of-full-name": {"target_modules": r"model\.embed_tokens"},
    "all-linear": {"target_modules": "all-linear"},
    "some-layers": {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1]},
    "rs-ranks": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True,
        "rank_pattern": {"embed_tokens": 6, "lm_head": 3}, "alpha_pattern": {"lm_head": 20, "embed_tokens": 5},
    },
}  # fmt: skip


class Base:
    """A base model, and what its engine would expect of adapters."""

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        self.folder = folder
        self.architecture = read_architecture(config)
        self.model = Decoder(self.architecture, config, folder, 64, CPU, torch.float32)
        self.end_of_text = EndOfText(folder, config, self.architecture.vocab)

    @property
    def head(self) -> LmHead:
        assert isinstance(self.model.lm_head, LmHead)
        return self.model.lm_head

    def expected(self, modules: tuple[str, ...] = ALL_MODULES, head: LmHead | None = None) -> ExpectedModules:
        return ExpectedModules(
            self.architecture, 8, modules, ("*",), self.model.embedding, head or self.head, self.end_of_text, slots=3
        )

    def pool(self) -> AdapterPool:
        return AdapterPool(self.architecture, 3, 8, ALL_MODULES, CPU, torch.float32)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(make_model(tmp_path_factory.mktemp("tied") / "model", **SMALL))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("untied") / "model"
    return Base(make_model(folder, **SMALL, tied=False, architecture="llama"))


@pytest.fixture(params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tied: Base, untied: Base) -> Base:
    return tied if request.param == "tied" else untied


def adapter(base: Base, folder: Path, **lora: Any) -> Path:
    return save_adapter(base.folder, folder, **{"r": 4, "lora_alpha": 8, **lora})


def load(base: Base, pool: AdapterPool, slot: int, folder: Path) -> None:
    pool.load(slot, pack(read_adapter(ref(folder), base.expected()), torch.float32))


def check(base: Base, folder: Path) -> None:
    """Compare the logits of all tokens with PEFT's, given PEFT's states."""
    states, wanted = states_and_logits(base.folder, folder, IDS)
    pool = base.pool()
    load(base, pool, 1, folder)
    lora = replace(plan([len(IDS)], [1])[1], implementation=native)
    torch.testing.assert_close(base.head.logits(states, pool.head, lora), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ensured", [False, True], ids=["free", "ensured"])
@pytest.mark.parametrize("name", TARGETS)
def test_logits_equal_those_of_peft(name: str, ensured: bool, base: Base, tmp_path: Path) -> None:
    check(base, adapter(base, tmp_path / name, **TARGETS[name], ensure_weight_tying=ensured))


def test_lora_on_the_tied_embedding_reaches_the_head_only_if_ensured(tied: Base, tmp_path: Path) -> None:
    for ensured in (False, True):
        folder = adapter(tied, tmp_path / str(ensured), **TARGETS["embedding"], ensure_weight_tying=ensured)
        read = read_adapter(ref(folder), tied.expected())
        assert ((HEAD, "lm_head") in read.weights) == ensured


def test_lora_on_a_tied_head_leaves_the_embedding_alone(tied: Base, tmp_path: Path) -> None:
    read = read_adapter(ref(adapter(tied, tmp_path / "a", **TARGETS["head"])), tied.expected())
    assert {name for _, name in read.weights} == {"q_proj", "lm_head"}


def _without_head(weights: dict[str, torch.Tensor]) -> None:
    for key in [key for key in weights if "lm_head" in key]:
        del weights[key]


def test_a_tied_head_without_tensors_has_the_embeddings_lora(tied: Base, tmp_path: Path) -> None:
    """Tools that save each weight once leave the head's copy out."""
    folder = adapter(tied, tmp_path / "whole", **TARGETS["rs-ranks"], ensure_weight_tying=True)
    whole, shared = tied.pool(), tied.pool()
    load(tied, whole, 0, folder)
    load(tied, shared, 0, edit_weights(folder, _without_head))
    assert whole.head is not None
    assert shared.head is not None
    assert torch.equal(whole.head.a, shared.head.a)
    assert torch.equal(whole.head.b, shared.head.b)
    assert whole.head.meta[0] == shared.head.meta[0]
    assert whole.head.b[0].any()


def refusal(base: Base, folder: Path, expected: ExpectedModules | None = None) -> str:
    with pytest.raises(InvalidAdapter) as refused:
        read_adapter(ref(folder), expected or base.expected())
    return refused.value.message


def test_a_tied_head_with_other_tensors_is_refused(tied: Base, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["base_model.model.lm_head.lora_B.weight"][3, 1] += 1

    folder = adapter(tied, tmp_path / "a", **TARGETS["both"], ensure_weight_tying=True)
    assert "ensure_weight_tying ties them" in refusal(tied, edit_weights(folder, change))


def test_an_alpha_with_which_a_tied_head_overflows_is_refused(tied: Base, tmp_path: Path) -> None:
    folder = adapter(tied, tmp_path / "a", **TARGETS["embedding"], ensure_weight_tying=True)
    edit_config(edit_weights(folder, _without_head), alpha_pattern={"lm_head": 3e38})
    assert "1 modules give outputs beyond 1e+15, which overflow in float32: lm_head" in refusal(tied, folder)


@pytest.mark.parametrize("name", ["head", "only-head"])
def test_a_server_without_slots_for_the_head_says_what_they_cost(name: str, base: Base, tmp_path: Path) -> None:
    message = refusal(base, adapter(base, tmp_path / name, **TARGETS[name]), base.expected(LORA_MODULES))
    assert "lm_head: this server keeps no slots for it; add it to engine.lora_modules, which takes 1 MB" in message
    assert base.expected().head_bytes == 3 * 16 * (500 + 48) * 4


def test_an_ensured_tie_needs_slots_for_the_head(tied: Base, tmp_path: Path) -> None:
    folder = adapter(tied, tmp_path / "a", **TARGETS["embedding"], ensure_weight_tying=True)
    for each in (folder, edit_weights(folder, _without_head)):
        assert "add it to engine.lora_modules" in refusal(tied, each, tied.expected(LORA_MODULES))
    free = adapter(tied, tmp_path / "free", **TARGETS["embedding"])
    assert read_adapter(ref(free), tied.expected(LORA_MODULES)).rank == 4


def test_a_model_that_only_embeds_serves_adapters_of_the_head_without_reading_it(tied: Base, tmp_path: Path) -> None:
    """Hidden states do not depend on the head."""
    expected = replace(tied.expected(LORA_MODULES), head=None)
    for ensured in (False, True):
        folder = adapter(tied, tmp_path / f"both{ensured}", **TARGETS["both"], ensure_weight_tying=ensured)
        read = read_adapter(ref(folder), expected)
        assert {name for _, name in read.weights} == {"q_proj", "embed_tokens"}
    only = read_adapter(ref(adapter(tied, tmp_path / "only", **TARGETS["only-head"])), expected)
    assert (only.weights, only.rank) == ({}, 0)
    pool = tied.pool()
    pool.load(0, pack(only, torch.float32))
    assert pool.ranks(0) == {}


def test_an_adapter_of_a_bare_model_has_no_head_to_tie(tied: Base, tmp_path: Path) -> None:
    folder = adapter(tied, tmp_path / "a", head="bare", **TARGETS["both"], ensure_weight_tying=True)
    read = read_adapter(ref(folder), tied.expected(LORA_MODULES))
    assert {name for _, name in read.weights} == {"q_proj", "embed_tokens"}


def test_missing_and_misshapen_halves_of_the_head_are_refused(base: Base, tmp_path: Path) -> None:
    a, b = "base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"
    folder = adapter(base, tmp_path / "half", **TARGETS["head"])
    assert "lm_head: expected lora_A and lora_B, lora_B is missing" in refusal(
        base, edit_weights(folder, lambda weights: weights.pop(b))
    )
    assert "1 modules that target_modules names have no tensors: lm_head" in refusal(
        base, edit_weights(folder, lambda weights: weights.pop(a))
    )
    narrow = adapter(base, tmp_path / "narrow", **TARGETS["head"])
    edit_weights(narrow, lambda weights: weights.update({b: weights[b][:-1].contiguous()}))
    assert "lm_head: lora_B: expected shape [500, 4], got [499, 4]" in refusal(base, narrow)
    left_out = adapter(base, tmp_path / "left-out", **TARGETS["head"])
    assert "1 modules have tensors but target_modules leaves them out: lm_head" in refusal(
        base, edit_config(left_out, target_modules=["q_proj"])
    )


def test_rows_of_several_adapters_and_of_none_keep_their_own_head(base: Base, tmp_path: Path) -> None:
    """The head reads some rows of each text: the last ones of most, all of one, none of another."""
    pool = base.pool()
    folders: list[Path | None] = [None]
    for slot, name in enumerate(("head", "embedding", "rs-ranks")):
        folders.append(adapter(base, tmp_path / name, **TARGETS[name], ensure_weight_tying=slot == 1))
        load(base, pool, slot, folders[-1])  # type: ignore[arg-type]
    texts = [IDS[: 3 + i] for i in range(6)]
    owners = [None, 0, 2, 1, 0, 2]
    order, lora = plan([len(text) for text in texts], owners)
    made = [folders[0 if owner is None else owner + 1] for owner in owners]
    both = [states_and_logits(base.folder, made[i], texts[i]) for i in order]
    states, wanted = (torch.cat(parts) for parts in zip(*both, strict=True))
    ends = np.cumsum([len(texts[i]) for i in order])
    rows = np.unique(np.concatenate([ends[[0, 1, 3, 5]] - 1, np.arange(ends[1], ends[2])]))
    kept = subset(replace(lora, implementation=native), rows)
    found = base.head.logits(states[rows], pool.head, kept)
    torch.testing.assert_close(found, wanted[rows], rtol=1e-5, atol=1e-5)


def test_a_head_that_is_not_used_is_left_out_with_a_note(base: Base, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "head", **TARGETS["head"])
    said = "lm_head: embeddings do not use the LoRA of the head; "
    assert read_adapter(ref(folder), base.expected()).notes == (f"{said}texts do",)
    without = read_adapter(ref(folder), replace(base.expected(LORA_MODULES), head=None))
    assert without.notes == (f"{said}it is left out",)
    assert {name for _, name in without.weights} == {"q_proj"}
    assert read_adapter(ref(adapter(base, tmp_path / "q", target_modules=["q_proj"])), base.expected()).notes == ()


# The tokens that end texts


def test_an_adapters_end_of_text_is_read_with_it(tied: Base, tmp_path: Path) -> None:
    folder = adapter(tied, tmp_path / "a", target_modules=["q_proj"])
    assert read_adapter(ref(folder), tied.expected()).end_ids == ()
    tokens = json.loads((tied.folder / "tokenizer.json").read_text())["added_tokens"]
    token = tokens[0]["content"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": token}}))
    read = read_adapter(ref(folder), tied.expected())
    assert read.end_ids == (tokens[0]["id"],)
    assert pack(read, torch.float32).end_ids == read.end_ids


def test_an_unknown_end_of_text_is_a_finding(tied: Base, tmp_path: Path) -> None:
    folder = adapter(tied, tmp_path / "a", target_modules=["q_proj"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|gone|>"}))
    assert "one of the folder's added tokens, got '<|gone|>'" in refusal(tied, folder)
    assert read_adapter(ref(folder), replace(tied.expected(), head=None)).end_ids == ()


def test_the_end_of_an_adapters_texts_is_known_after_loads_from_disk_and_host(tied: Base, tmp_path: Path) -> None:
    token = json.loads((tied.folder / "tokenizer.json").read_text())["added_tokens"][1]
    refs = []
    for name in ("one", "two"):
        folder = adapter(tied, tmp_path / name, target_modules=["q_proj"])
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token["content"]}))
        refs.append(ref(folder))
    scene = Scene(tied.pool(), tied.expected(), slots=1)
    for wanted, tier in ((refs[0], "disk"), (refs[1], "disk"), (refs[0], "host")):
        scene.load(wanted)
        assert scene.records[-1].tier == tier
        assert scene.manager.info(wanted).end_ids == (token["id"],)
    scene.manager.stop()


@pytest.mark.parametrize("modules", [ALL_MODULES, LORA_MODULES], ids=["slots", "no-slots"])
@pytest.mark.parametrize("ensured", [False, True], ids=["free", "ensured"])
def test_vectors_do_not_depend_on_the_head(
    ensured: bool, modules: tuple[str, ...], tied: Base, tmp_path: Path, make_engine: Callable[..., Engine]
) -> None:
    folder = adapter(tied, tmp_path / "both", **TARGETS["both"], ensure_weight_tying=ensured)
    engine = make_engine(tied.folder, lora_modules=modules, kv_cache_bytes=None if LM_HEAD in modules else 0)
    engine.start()
    answer = ask(engine, [np.asarray(IDS, dtype=np.int32)], ref(folder))
    assert_same(answer.result, reference_embedding(tied.folder, folder, [IDS]))
