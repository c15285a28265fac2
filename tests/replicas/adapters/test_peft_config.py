"""adapter_config.json is read as PEFT reads it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ranklet.replicas.adapters.findings import Checked, collect
from ranklet.replicas.adapters.peft_config import LoraSettings, PeftConfig, read_peft_config

PREFIXES = ("", "model.", "0.auto_model.")
NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.up_proj")
MODULES = [f"{prefix}layers.{layer}.{name}" for prefix in PREFIXES for layer in (0, 1, 2, 11) for name in NAMES]
MODULES += [f"{prefix}embed_tokens" for prefix in PREFIXES]

short_names = st.lists(
    st.sampled_from(["q_proj", "down_proj", "mlp.up_proj", "embed_tokens", "proj", "1.mlp.down_proj", *MODULES]),
    min_size=1, max_size=4,
)  # fmt: skip
patterns = st.sampled_from(
    [
        r".*_proj",
        r".*layers\.[02]\.self_attn\.(q|o)_proj",
        r"model\..*",
        r"layers\.1\..*",
        r".*embed_tokens",
        "q_proj",
        r".*\.1+\..*",
    ]
)
number_patterns = st.dictionaries(
    st.sampled_from(
        ["q_proj", r"layers\.[01]\..*", "^model.layers.2.mlp.down_proj", "(q|v)_proj", "proj", r"1\.mlp\.down_proj"]
    ),
    st.integers(1, 64), max_size=3,
)  # fmt: skip


def applied(fields: dict[str, Any]) -> LoraSettings:
    settings, findings = collect(PeftConfig(fields).apply(MODULES))
    assert findings == []
    assert settings is not None
    return settings


@given(
    st.sampled_from(MODULES),
    short_names | patterns,
    st.none() | short_names | patterns,
    st.none() | st.integers(0, 3) | st.lists(st.integers(0, 12), max_size=3),
    st.sampled_from([None, [], "layers", ["blocks", "layers"], "(?:lay)ers", "(lay)ers", "h"]),
)
@example(
    "model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"], None, [0], None
)  # a full name applies in any layer
@example("model.layers.1.mlp.up_proj", ["up_proj"], None, [1], "(lay)ers")
def test_targets_equal_those_of_peft(module: str, wanted: Any, excluded: Any, layers: Any, layers_pattern: Any) -> None:
    if isinstance(wanted, str):
        layers = layers_pattern = None  # PEFT refuses to combine them
    if layers is None:
        layers_pattern = None
    theirs = LoraConfig(
        target_modules=wanted, exclude_modules=excluded, layers_to_transform=layers, layers_pattern=layers_pattern
    )
    fields = {
        "target_modules": wanted,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": layers_pattern,
    }
    ours = applied(fields)
    assert ours.targets(module) == bool(check_target_module_exists(theirs, module))


@pytest.mark.parametrize("shorthand", ["all-linear", "All-Linear"])
def test_all_linear_layers_are_targeted_however_they_are_spelled(shorthand: str) -> None:
    settings = applied({"target_modules": shorthand})
    assert [module for module in MODULES if not settings.targets(module)] == [
        module for module in MODULES if module.endswith(("embed_tokens", "lm_head"))
    ]


@given(
    st.sampled_from(MODULES), st.integers(1, 64), st.integers(1, 128), number_patterns, number_patterns, st.booleans()
)
def test_ranks_and_scalings_equal_those_of_peft(
    module: str, rank: int, alpha: int, ranks: dict[str, int], alphas: dict[str, int], stabilised: bool
) -> None:
    ours = applied(
        {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": stabilised}
    )
    their_rank = ranks.get(get_pattern_key(list(ranks), module), rank)
    their_alpha = alphas.get(get_pattern_key(list(alphas), module), alpha)
    assert ours.rank(module) == their_rank
    assert ours.scaling(module) == pytest.approx(their_alpha / (math.sqrt(their_rank) if stabilised else their_rank))


def read(folder: Path, bases: tuple[str, ...] = ("model",), **fields: Any) -> tuple[LoraSettings | None, list[str]]:
    """Write a config, read it and apply it to `MODULES`."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], **fields}))
    return read_file(path, bases)


def read_file(path: Path, bases: tuple[str, ...] = ("model",)) -> tuple[LoraSettings | None, list[str]]:
    def check() -> Checked[LoraSettings | None]:
        config = yield from read_peft_config(path, bases)
        return None if config is None else (yield from config.apply(MODULES))

    return collect(check())


@pytest.mark.parametrize(
    ("named", "bases"),
    [
        ("Qwen/Qwen3-Embedding-0.6B", ("Qwen3-Embedding-0.6B",)),
        ("qwen/qwen3-embedding-0.6b", ("Qwen3-Embedding-0.6B",)),  # the hub ignores case
        ("/data/models/base/", ("base",)),
        ("C:\\models\\base", ("base",)),
        ("Qwen/Qwen3-Embedding-8B", ("local", "Qwen3-Embedding-*")),
        ("Qwen/Qwen3-Embedding-0.6B", ("/srv/Qwen3-Embedding-0.6B", "Qwen/Qwen3-Embedding-0.6B")),
        (
            "/home/ann/.cache/huggingface/hub/models--Qwen--Qwen3-Embedding-0.6B/snapshots/c54f2e6e80b2d7b7de06f51cec4959f6b3e03418",
            ("Qwen3-Embedding-0.6B",),
        ),
        ("", ("base",)),
        (None, ("base",)),
    ],
)
def test_names_of_the_served_base_are_accepted(tmp_path: Path, named: str | None, bases: tuple[str, ...]) -> None:
    assert read(tmp_path, bases, base_model_name_or_path=named)[1] == []


@pytest.mark.parametrize(
    "named", ["Qwen/Qwen3-0.6B", "/", "other", ["base"], 7, "base2", "models--x--other/snapshots/base"]
)
def test_another_base_is_refused_by_name(tmp_path: Path, named: Any) -> None:
    (finding,) = read(tmp_path, ("base",), base_model_name_or_path=named)[1]
    assert repr(named) in finding
    assert "base_model_name_or_path" in finding


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"rank_pattern": {"(?i)q_proj": 4}},
            "(?i)q_proj",
        ),  # valid alone, but not inside the pattern that PEFT makes of it
        ({"rank_pattern": {"q_proj[": 4}}, "q_proj["),
        ({"alpha_pattern": {"*": 4}}, "*"),
        ({"target_modules": "(q_proj"}, "(q_proj"),
        ({"exclude_modules": "+"}, "+"),
        ({"layers_to_transform": [0], "layers_pattern": "(?i)layers"}, "(?i)layers"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"lm_head": 10**400}}, "rank_pattern: expected an object of ranks up to 2147483647"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
        ({"r": True}, "r:"),
        ({"r": 8.0}, "r:"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"layers_to_transform": "1"}, "layers_to_transform"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "layers_to_transform: PEFT does not combine"),
        ({"layers_pattern": "h", "target_modules": "all-linear"}, "layers_pattern: PEFT does not combine"),
        ({"layers_pattern": ["h"]}, "layers_pattern: expected layers_to_transform"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights"),
    ],
)
def test_findings_name_wrong_values(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    _, findings = read(tmp_path, **fields)
    assert any(says in finding for finding in findings), findings


def test_all_findings_are_reported_together(tmp_path: Path) -> None:
    _, findings = read(tmp_path, use_dora=True, bias="some", base_model_name_or_path="x/other", lora_bias=True)
    for name in ("use_dora", "bias", "x/other", "lora_bias"):
        assert any(name in finding for finding in findings), name
    _, findings = read(tmp_path, r=0, lora_alpha="8", target_modules=[])
    for name in ("r:", "lora_alpha", "target_modules"):
        assert any(finding.startswith(name) for finding in findings), name


def test_every_default_that_peft_writes_is_accepted(tmp_path: Path) -> None:
    """Fails when a new version of PEFT writes a field that is not read here."""
    for extra in ({}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "gaussian"}):
        LoraConfig(r=4, target_modules=["q_proj"], **extra).save_pretrained(str(tmp_path))
        config, findings = read_file(tmp_path / "adapter_config.json")
        assert findings == []
        assert config is not None


def test_missing_fields_have_the_defaults_of_peft(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"target_modules": ["q_proj"]}')
    config, findings = read_file(tmp_path / "adapter_config.json")
    assert findings == []
    assert config is not None
    default = LoraConfig()
    assert (config.rank(MODULES[0]), config.scaling(MODULES[0])) == (default.r, default.lora_alpha / default.r)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"]
)
def test_a_file_that_is_no_json_object_is_one_finding(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    config, findings = read_file(path)
    assert config is None
    assert len(findings) == 1
    assert findings[0].startswith("adapter_config.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = sorted(LoraConfig().to_dict())


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5))
def test_any_json_gives_findings_or_settings_for_every_module(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-config"
    folder.mkdir(exist_ok=True)
    config, findings = read(folder, **fields)
    if config is None:
        assert findings
        return
    for module in MODULES:
        assert isinstance(config.targets(module), bool)
        assert config.rank(module) >= 1
        assert math.isfinite(config.scaling(module))
