"""Converted adapters compute what PEFT computes with the original; what has no equal form is refused."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ranklet.replicas.conversion.convert import Conversion
from ranklet.replicas.conversion.stored_weights import ConversionError
from tests.assets.adapters import load_base, quiet, save_adapter
from tests.assets.broken import edit_config

if TYPE_CHECKING:
    from peft import PeftConfig

IDS = torch.tensor([[5, 17, 3, 99, 42, 7]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
PICKLED = pickle.dumps({"a": 1}, 2)


@pytest.fixture(scope="module")
def plain(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(model_dir, tmp_path_factory.mktemp("plain") / "plain", r=4, target_modules=TARGETS)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def stored_as(source: Path, folder: Path, write: Callable[[dict[str, Tensor], Path], None]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write(tensors_of(source), folder)
    return folder


def _in_training(name: str) -> str:
    """The name in the state dict of a model that is wrapped for distributed training."""
    return "module._orig_mod." + name.replace(".weight", ".default.weight")


def _pickled(tensors: dict[str, Tensor], folder: Path) -> None:
    torch.save(tensors, folder / "adapter_model.bin")


def _checkpoint(tensors: dict[str, Tensor], folder: Path) -> None:
    torch.save({"module": {_in_training(name): each for name, each in tensors.items()}}, folder / "adapter_model.bin")


def _shards(tensors: dict[str, Tensor], folder: Path) -> None:
    for part in range(2):
        some = dict(list(tensors.items())[part::2])
        save_file(some, folder / f"adapter_model-{part + 1:05d}-of-00002.safetensors")


def _listed_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    listed: dict[str, str] = {}
    for part in range(3):
        some = dict(list(tensors.items())[part::3])
        torch.save(some, folder / f"part{part}.bin")
        listed |= dict.fromkeys(some, f"part{part}.bin")
    (folder / "adapter_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))


@pytest.mark.parametrize("write", [_pickled, _checkpoint, _shards, _listed_shards])
def test_weights_in_other_files_stay_the_same(
    plain: Path, tmp_path: Path, write: Callable[[dict[str, Tensor], Path], None]
) -> None:
    source, target = stored_as(plain, tmp_path / "stored", write), tmp_path / "target"
    assert "the weights are in one adapter_model.safetensors now" in Conversion(source, target).run()
    torch.testing.assert_close(tensors_of(target), tensors_of(plain), rtol=0, atol=0)
    assert {each.name for each in target.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
    }  # fmt: skip


def trained(model_dir: Path, folder: Path, config: "PeftConfig") -> tuple[Tensor, Tensor]:
    """Train an adapter by one random step, and save it to `folder` and before that to `folder`-initial.

    Returns its logits, and those of the base.
    """
    from peft import get_peft_model

    with quiet(), torch.no_grad():
        torch.manual_seed(3)
        base = load_base(model_dir, "causal")(IDS).logits
        model = get_peft_model(load_base(model_dir, "causal"), config)
        model.save_pretrained(f"{folder}-initial")
        for name, weight in model.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_")):
                weight.add_(0.3 * weight.std().nan_to_num(1.0).clamp(min=0.05) * torch.randn_like(weight))
        model.save_pretrained(str(folder))
        return model(IDS).logits, base


def logits_with(model_dir: Path, adapter: Path) -> Tensor:
    from peft import PeftModel

    with quiet(), torch.no_grad():
        model = PeftModel.from_pretrained(load_base(model_dir, "causal"), str(adapter))
        logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize(
    ("fields", "by_initial"),
    [
        ({"init_lora_weights": "pissa"}, False),
        ({"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"v_proj": 2}}, False),
        ({"init_lora_weights": "olora", "alpha_pattern": {"down_proj": 3}}, False),
        ({"init_lora_weights": "olora", "rank_pattern": {"down_proj": 7}}, True),
        ({"init_lora_weights": "pissa_niter_4"}, True),
        ({"init_lora_weights": "pissa", "use_dora": True}, False),
        ({"init_lora_weights": "olora", "use_dora": True, "use_rslora": True}, True),
    ],
)
def test_an_initialisation_that_changed_the_base_is_undone(
    model_dir: Path, tmp_path: Path, fields: dict[str, Any], *, by_initial: bool
) -> None:
    from peft import LoraConfig

    source = tmp_path / "source"
    with quiet():  # PEFT warns of patterns, whose adapters it cannot convert
        config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **fields)
    expected, base = trained(model_dir, source, config)
    assert (expected - base).abs().max() > 0.1
    initial = Path(f"{source}-initial") if by_initial else None
    conversion = Conversion(source, tmp_path / "target", model_dir, initial)
    assert any("subtracted" in note for note in conversion.run())
    assert (logits_with(model_dir, tmp_path / "target") - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ("pissa", "--model"),
        ("pissa_niter_4", "expected --initial"),
        ("corda", "expected --initial"),
        ("loftq", "quantized"),
    ],
)
def test_an_initialisation_that_is_not_known_is_refused(plain: Path, tmp_path: Path, init: str, says: str) -> None:
    source = stored_as(plain, tmp_path / "source", _pickled)
    edit_config(source, init_lora_weights=init)
    with pytest.raises(ConversionError, match=says):
        Conversion(source, tmp_path / "target").run()
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def test_the_initial_adapter_has_the_scale_of_the_trained_one(model_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    source, initial = tmp_path / "source", tmp_path / "source-initial"
    trained(model_dir, source, LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj"], init_lora_weights="olora"))
    for name, other in {"rank_pattern": {"v_proj": 2}, "use_rslora": True, "lora_alpha": 7, "r": 5}.items():
        edit_config(initial, **{name: other})
        with pytest.raises(ConversionError, match=f"expected {name} .*, got"):
            Conversion(source, tmp_path / "target", initial=initial).run()


@pytest.mark.parametrize("method", ["loha", "lokr", "lokr-factors"])
def test_products_become_lora_within_the_stated_error(model_dir: Path, tmp_path: Path, method: str) -> None:
    from peft import LoHaConfig, LoKrConfig

    configs = {
        "loha": LoHaConfig(r=3, alpha=6, target_modules=TARGETS, init_weights=False),
        "lokr": LoKrConfig(r=64, alpha=64, target_modules=TARGETS, init_weights=False, decompose_factor=4),
        "lokr-factors": LoKrConfig(
            r=2, alpha=5, target_modules=TARGETS, init_weights=False, decompose_both=True, decompose_factor=8
        ),
    }
    source = tmp_path / "source"
    expected, base = trained(model_dir, source, configs[method])
    assert (expected - base).abs().max() > 0.01
    conversion = Conversion(source, tmp_path / "target", rank=128, max_error=1e-4)
    assert any("LoRA of rank 128" in note for note in conversion.run())
    assert (logits_with(model_dir, tmp_path / "target") - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ConversionError, match=r"expected an error of at most 0.0001 at rank 1, got .* Choose a larger"):
        replace(conversion, target=tmp_path / "small", rank=1).run()
    assert not (tmp_path / "small").exists()


def test_the_stated_error_is_that_of_the_weights(model_dir: Path, tmp_path: Path) -> None:
    from peft import LoHaConfig

    source = tmp_path / "source"
    trained(model_dir, source, LoHaConfig(r=4, alpha=4, target_modules=["q_proj"], init_weights=False))
    Conversion(source, tmp_path / "target", rank=4, max_error=1.0).run()
    given, made = tensors_of(source), tensors_of(tmp_path / "target")
    errors = []
    for name in {name.rpartition(".")[0] for name in given}:
        w1, w2 = (given[f"{name}.hada_w{part}_a"] @ given[f"{name}.hada_w{part}_b"] for part in (1, 2))
        kept = made[f"{name}.lora_B.weight"] @ made[f"{name}.lora_A.weight"]
        errors.append(float((w1 * w2 - kept).norm() / (w1 * w2).norm()))
    with pytest.raises(ConversionError, match=f"got {max(errors):.3g} in"):
        Conversion(source, tmp_path / "again", rank=4, max_error=0.9 * max(errors)).run()


class _MakesFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_executed(plain: Path, tmp_path: Path) -> None:
    def write(tensors: dict[str, Tensor], folder: Path) -> None:
        torch.save({**tensors, "more": _MakesFolder(tmp_path / "executed")}, folder / "adapter_model.bin")

    source = stored_as(plain, tmp_path / "source", write)
    with pytest.raises(ConversionError, match="nothing in it is executed"):
        Conversion(source, tmp_path / "target").run()
    (source / "adapter_model.bin").write_bytes(pickle.dumps(_MakesFolder(tmp_path / "executed")))
    with pytest.raises(ConversionError, match="nothing in it is executed"):
        Conversion(source, tmp_path / "target").run()
    assert not (tmp_path / "executed").exists()


def _touch(*names: str) -> Callable[[dict[str, Tensor], Path], None]:
    def write(tensors: dict[str, Tensor], folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"")

    return write


def _changed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[dict[str, Tensor], Path], None]:
    return lambda tensors, folder: torch.save(change(tensors), folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_touch(), "expected adapter_model.safetensors or adapter_model.bin"),
        (_touch("zero_to_fp32.py", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "zero_to_fp32.py . OUT"),
        (_touch("__0_0.distcp"), "accelerate merge-weights"),
        (_touch("adapter_model-00001-of-00003.bin"), "expected 00003 parts, got 1"),
        (_touch("adapter_model.safetensors"), "expected a safetensors file"),
        (_touch("adapter_model.bin.index.json"), "expected a weight_map"),
        (_changed(lambda given: {name: each[:0] for name, each in given.items()}), "stage3_gather_16bit_weights"),
        (
            _changed(lambda given: {f"{name.removesuffix('.weight')}.{other}.weight": each
                                    for name, each in given.items() for other in ("one", "two")}),
            "those of one, two",
        ),
        (_changed(lambda given: given | {f"module.{name}": each for name, each in given.items()}), "of one name"),
        (_changed(lambda given: given | {"wide": torch.zeros(1).expand(1 << 30, 1 << 20)}), "of at most .* bytes, got"),
    ],
)  # fmt: skip
def test_what_is_no_whole_adapter_is_refused(
    plain: Path, tmp_path: Path, write: Callable[[dict[str, Tensor], Path], None], says: str
) -> None:
    source = stored_as(plain, tmp_path / "source", write)
    with pytest.raises(ConversionError, match=says):
        Conversion(source, tmp_path / "target").run()
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def test_an_index_names_only_files_beside_it(plain: Path, tmp_path: Path) -> None:
    source = stored_as(plain, tmp_path / "source", _listed_shards)
    index = source / "adapter_model.bin.index.json"
    for name, says in (("../plain/part0.bin", "files beside it"), ("gone.bin", "is missing")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ConversionError, match=says):
            Conversion(source, tmp_path / "target").run()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "IA3"}, "expected LORA, LOHA or LOKR, got 'IA3'"),
        ({"peft_type": ["LORA"]}, "expected LORA, LOHA or LOKR"),
        ({"init_lora_weights": {}, "r": "four"}, "r: expected a whole number"),
        ({"init_lora_weights": ["pissa"]}, "expected --initial"),
        ({"init_lora_weights": "pissa", "alora_invocation_tokens": [7]}, "alora_invocation_tokens: expected none with"),
        ({"peft_type": "LOHA", "rank_pattern": {"a": 1}}, "rank_pattern: expected none"),
        ({"peft_type": "LOKR", "alpha": 0}, "alpha: expected a number above 0"),
        ({"peft_type": "LOHA"}, "expected LOHA of linear layers only"),
    ],
)
def test_a_config_that_cannot_be_converted_is_refused(
    plain: Path, tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    source = edit_config(stored_as(plain, tmp_path / "source", _pickled), **fields)
    with pytest.raises(ConversionError, match=says):
        Conversion(source, tmp_path / "target").run()


def test_an_existing_target_is_left_alone(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="it exists"):
        Conversion(plain, tmp_path).run()
    assert list(tmp_path.iterdir()) == []


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda end: PICKLED[: len(PICKLED) - len(end)] + end))
@settings(max_examples=50)
def test_any_bytes_are_tensors_or_refused(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = stored_as(plain, folder / "source", _touch())
    (source / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ConversionError):
        Conversion(source, folder / "target").run()
