"""Bad folders are refused with all reasons; good ones are read bit for bit."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.replicas.adapters.adapter import AdapterWeights
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.adapters.verify import read_adapter
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import AdapterChanged, AdapterNotFound, InvalidAdapter
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import EMBEDDING
from tests.assets.adapters import AdapterSpec
from tests.assets.broken import BROKEN, WEIGHTS, edit_config, edit_weights, sound
from tests.assets.corpus import TEXTS
from tests.assets.make import make_model
from tests.assets.oracle import reference_embedding
from tests.assets.variants import VARIANTS
from tests.replicas.asking import ask, assert_same, prompts, ref

Change = Callable[[dict[str, torch.Tensor]], object]


def findings(folder: Path, expectation: ExpectedModules) -> tuple[str, ...]:
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(AdapterRef(folder.name, str(folder), "1"), expectation)
    assert all(finding in caught.value.message for finding in caught.value.findings)
    return caught.value.findings


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_folder_is_refused_with_the_reason(
    name: str, model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    found = "\n".join(findings(BROKEN[name].make(model_dir, tmp_path / name), expectation))
    for word in BROKEN[name].says:
        assert word in found


def test_each_reason_is_a_finding(model_dir: Path, tmp_path: Path, expectation: ExpectedModules) -> None:
    found = findings(BROKEN["several"].make(model_dir, tmp_path / "several"), expectation)
    for word in BROKEN["several"].says:
        assert sum(word in finding for finding in found) >= 1
    assert len(found) >= len(BROKEN["several"].says)


@pytest.mark.parametrize("name", VARIANTS)
def test_common_kinds_of_adapters_answer_as_peft_does(
    name: str, model_dir: Path, tmp_path: Path, engine: Engine
) -> None:
    folder = VARIANTS[name](model_dir, tmp_path / name)
    texts = TEXTS[:3]
    answer = ask(engine, prompts(model_dir, texts), ref(folder))
    assert_same(answer.result, reference_embedding(model_dir, folder, texts))


def test_the_adapters_of_the_demo_are_read_bit_for_bit(
    adapter_specs: list[AdapterSpec], expectation: ExpectedModules
) -> None:
    for spec in adapter_specs:
        adapter = read_adapter(ref(spec.path), expectation)
        assert adapter.rank == spec.rank
        assert {name for _, name in adapter.weights} == set(spec.targets)
        saved = safetensors.torch.load_file(spec.path / WEIGHTS)
        lora = {key: tensor for key, tensor in saved.items() if "lora_" in key}
        assert 2 * len(adapter.weights) == len(lora)
        for (layer, name), weight in adapter.weights.items():
            middle = "" if layer == EMBEDDING else f"layers.{layer}."
            keys = [key for key in lora if middle in key and f".{name}." in key]
            for key in keys:
                assert torch.equal(weight.a if "_A" in key else weight.b, lora[key])
            assert len(keys) == 2


def _grouped_wrongly(weights: dict[str, torch.Tensor]) -> None:
    for key in [key for key in weights if "q_proj" in key]:
        weights[key.replace("self_attn", "mlp")] = weights.pop(key)


def _eighths(weights: dict[str, torch.Tensor]) -> None:
    for key in list(weights):
        weights[key] = weights[key].to(torch.float8_e4m3fn)


def _twice(weights: dict[str, torch.Tensor]) -> None:
    key = next(key for key in sorted(weights) if "layers.0" in key and "q_proj.lora_A" in key)
    weights[key.replace("base_model.model.model.", "base_model.model.")] = weights[key].clone()


def _negative_layer(weights: dict[str, torch.Tensor]) -> None:
    key = next(key for key in sorted(weights) if "layers.0" in key)
    weights[key.replace("layers.0", "layers.-1")] = weights.pop(key)


def _embedding_resized(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.embed_tokens.weight"] = torch.randn(1300, 128)


def _magnitude(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_grouped_wrongly, "mlp.q_proj"),
        (_eighths, "F8_E4M3"),
        (_twice, "second tensor"),
        (_negative_layer, "layers.-1"),
        (_embedding_resized, "got 276"),
        (_magnitude, "lora_magnitude_vector"),
        (lambda weights: weights.clear(), "target_modules"),
    ],
)
def test_findings_name_tensors_that_do_not_fit(
    change: Change, says: str, model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    folder = edit_weights(sound(model_dir, tmp_path / "odd"), change)
    assert any(says in finding for finding in findings(folder, expectation))


def test_findings_escape_control_characters(model_dir: Path, tmp_path: Path, expectation: ExpectedModules) -> None:
    """A tensor's name may contain any character; messages reach logs and terminals."""
    folder = sound(model_dir, tmp_path / "control")
    edit_weights(folder, lambda weights: weights.update({"\x1b[2J\nräuber\u202e": torch.ones(1)}))
    (finding,) = findings(edit_config(folder, **{"\x00new": 1}), expectation)[1:]
    assert r"\x1b[2J\nräuber\u202e" in finding
    assert all(each.isprintable() for each in findings(folder, expectation))


def test_numbers_must_be_finite_in_the_served_dtype(
    model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    def grow(weights: dict[str, torch.Tensor]) -> None:
        weights[next(iter(sorted(weights)))][0, 0] = 70_000.0

    folder = edit_weights(sound(model_dir, tmp_path / "large"), grow)
    assert read_adapter(ref(folder), expectation).rank == 8
    halves = ExpectedModules(
        expectation.architecture, 64, expectation.modules, expectation.bases, expectation.embedding.half()
    )
    assert any("float16" in finding for finding in findings(folder, halves))


def test_limits_of_the_pool_are_findings(model_dir: Path, tmp_path: Path, expectation: ExpectedModules) -> None:
    folder = sound(model_dir, tmp_path / "eight")
    small = ExpectedModules(expectation.architecture, 4, ("q_proj",), ("model",), expectation.embedding)
    found = "\n".join(findings(folder, small))
    assert "engine.max_rank" in found
    assert "engine.lora_modules" in found
    assert "down_proj" in found


def test_a_path_without_a_folder_is_not_found(tmp_path: Path, expectation: ExpectedModules) -> None:
    (tmp_path / "file").write_text("")
    for path in ("gone", "file", "file/under", "a\0b"):
        with pytest.raises(AdapterNotFound, match="does not exist"):
            read_adapter(AdapterRef("x", str(tmp_path / path), "1"), expectation)


def test_a_pipe_in_place_of_a_file_is_refused_without_reading_it(
    model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    for name in (WEIGHTS, "adapter_config.json"):
        folder = sound(model_dir, tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert any(name in finding for finding in findings(folder, expectation))


def test_a_finding_names_the_vocabulary_of_both_models(
    tmp_path: Path, model_dir: Path, architecture: Architecture, expectation: ExpectedModules
) -> None:
    """The models differ in the vocabulary only, so only embed_tokens shows it."""
    other = make_model(tmp_path / "model", vocab_size=900)
    folder = sound(other, tmp_path / "embed", target_modules=["embed_tokens"])
    found = "\n".join(findings(folder, expectation))
    assert "1024" in found
    assert "900" in found


# Damaged files


@pytest.fixture(scope="module")
def intact(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = sound(model_dir, tmp_path_factory.mktemp("corrupt") / "adapter", r=2, target_modules=["v_proj"])
    return folder, (folder / WEIGHTS).read_bytes()


def test_files_that_change_while_they_are_read_are_neither_served_nor_refused(
    model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    """A refusal would be remembered for the revision before the change."""
    folder = sound(model_dir, tmp_path / "adapter")
    before = Revisions().reference("x", str(folder))
    read_adapter(before, expectation)
    edit_config(folder, target_modules=["no_such"])
    with pytest.raises(AdapterChanged, match="Try again"):
        read_adapter(before, expectation)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterChanged, match="Try again"):
        read_adapter(before, expectation)


def check(folder: Path, content: bytes, expectation: ExpectedModules) -> None:
    """The adapter is refused, or read as safetensors reads it."""
    (folder / WEIGHTS).write_bytes(content)
    try:
        adapter: AdapterWeights = read_adapter(AdapterRef("x", str(folder), "1"), expectation)
    except InvalidAdapter:
        return
    tensors = safetensors.torch.load(content)
    assert len(tensors) == 2 * len(adapter.weights)
    for (layer, name), weight in adapter.weights.items():
        stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        assert torch.equal(weight.a, tensors[f"{stem}.lora_A.weight"])
        assert torch.equal(weight.b, tensors[f"{stem}.lora_B.weight"])
        assert torch.isfinite(weight.a).all()


@settings(max_examples=60)
@given(st.data())
def test_a_truncated_file_is_refused(
    intact: tuple[Path, bytes], expectation: ExpectedModules, data: st.DataObject
) -> None:
    folder, content = intact
    check(folder, content[: data.draw(st.integers(0, len(content) - 1))], expectation)


@settings(max_examples=150)
@given(st.data())
def test_a_file_with_flipped_bits_is_refused_or_read_as_safetensors_does(
    intact: tuple[Path, bytes], expectation: ExpectedModules, data: st.DataObject
) -> None:
    folder, content = intact
    spoilt = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        spoilt[place] ^= 1 << data.draw(st.integers(0, 7))
    check(folder, bytes(spoilt), expectation)


@given(st.integers(0, 2**64 - 1) | st.sampled_from([2**63, 2**31, 100_000_001, 0, 1]))
def test_any_header_length_is_refused_or_read_as_safetensors_does(
    intact: tuple[Path, bytes], expectation: ExpectedModules, length: int
) -> None:
    folder, content = intact
    check(folder, length.to_bytes(8, "little") + content[8:], expectation)


@pytest.mark.parametrize("dtype", ["BOOL", "F4", "F6_E2M3", "F8_E5M2", "F8_E8M0", "C64", "I64", "U8", "Q9", ""])
def test_a_dtype_that_is_no_float_is_refused(
    intact: tuple[Path, bytes], expectation: ExpectedModules, dtype: str
) -> None:
    folder, content = intact
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    again = header.replace(b'"F32"', f'"{dtype}"'.encode())
    (folder / WEIGHTS).write_bytes(len(again).to_bytes(8, "little") + again + content[8 + len(header) :])
    assert findings(folder, expectation)


def test_the_intact_file_is_read(intact: tuple[Path, bytes], expectation: ExpectedModules) -> None:
    folder, content = intact
    (folder / WEIGHTS).write_bytes(content)
    adapter = read_adapter(ref(folder), expectation)
    assert adapter.rank == 2
    check(folder, content, expectation)


def test_an_adapter_may_name_the_base_by_an_alias(
    model_dir: Path, tmp_path: Path, expectation: ExpectedModules
) -> None:
    folder = edit_config(sound(model_dir, tmp_path / "hub"), base_model_name_or_path="Acme/Embedder-v1")
    assert any("Acme/Embedder-v1" in finding for finding in findings(folder, expectation))
    known = ExpectedModules(
        expectation.architecture, 64, expectation.modules, ("model", "acme/embedder-*"), expectation.embedding
    )
    assert read_adapter(ref(folder), known).rank == 8
