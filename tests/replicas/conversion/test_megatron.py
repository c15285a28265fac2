"""LoRA of Megatron's modules becomes LoRA of the base's, by the order of rows that Megatron documents."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ranklet.replicas.conversion.convert import Conversion
from ranklet.replicas.conversion.stored_weights import ConversionError
from tests.assets.adapters import LINEAR, load_base, quiet, save_adapter
from tests.assets.broken import edit_weights
from tests.assets.make import make_model

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 6, 2, 16, 2
IDS = torch.tensor([[5, 17, 3, 99, 42, 7]])
WRITERS: dict[str, tuple[str, ...]] = {  # names of A, B and magnitudes
    "bridge": ("adapter.linear_in.weight", "adapter.linear_out.weight", "adapter.weight_magnitude"),
    "peft": ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "model"
    return make_model(folder, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, text=True, pooling=None)


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shared(model, tmp_path_factory.mktemp("trained") / "adapter")


def save_shared(model: Path, folder: Path, *, use_dora: bool = False) -> Path:
    """Write an adapter whose q, k and v have one A, as gate and up have."""
    save_adapter(model, folder, r=4, lora_alpha=6, target_modules=list(LINEAR), use_dora=use_dora)

    def share(weights: dict[str, Tensor]) -> None:
        for name in weights:
            for part, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
                if f"{part}.lora_A" in name:
                    weights[name] = weights[name.replace(part, first)].clone()

    return edit_weights(folder, share)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return linear_qkv's rows: for each query group its queries, then its key, then its value."""
    rows = []
    for group in range(KV_HEADS):
        for head in range(group * HEADS // KV_HEADS, (group + 1) * HEADS // KV_HEADS):
            rows += [q[head * HEAD_DIM + row] for row in range(HEAD_DIM)]
        for each in (k, v):
            rows += [each[group * HEAD_DIM + row] for row in range(HEAD_DIM)]
    return torch.stack(rows)


def as_megatron(source: Path, folder: Path, writer: str, **fields: Any) -> Path:
    stored = load_file(source / "adapter_model.safetensors")
    a, b, magnitude = WRITERS[writer]
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):

        def of(module: str, kind: str, layer: int = layer) -> Tensor:
            return stored[f"base_model.model.model.layers.{layer}.{module}_proj.{kind}"]

        prefix = f"module.decoder.layers.{layer}"
        for module, parts in (
            ("self_attention.linear_qkv", ("self_attn.q", "self_attn.k", "self_attn.v")),
            ("self_attention.linear_proj", ("self_attn.o",)),
            ("mlp.linear_fc1", ("mlp.gate", "mlp.up")),
            ("mlp.linear_fc2", ("mlp.down",)),
        ):
            tensors[f"{prefix}.{module}.{a}"] = of(parts[0], "lora_A.weight")
            for name, kind in ((b, "lora_B.weight"), (magnitude, "lora_magnitude_vector")):
                if f"base_model.model.model.layers.{layer}.{parts[0]}_proj.{kind}" in stored:
                    values = [of(part, kind) for part in parts]
                    made = fused(*values) if len(parts) == 3 else torch.cat(values)
                    tensors[f"{prefix}.{module}.{name}"] = made
    return stored_in(folder, source, tensors, **fields)


def stored_in(folder: Path, source: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def logits_with(model: Path, adapter: Path) -> Tensor:
    from peft import PeftModel

    with quiet(), torch.no_grad():
        logits: Tensor = PeftModel.from_pretrained(load_base(model, "causal"), str(adapter))(IDS).logits
    return logits


@pytest.mark.parametrize(("writer", "use_dora"), [("peft", False), ("bridge", True)])
def test_fused_modules_are_divided_by_query_groups(model: Path, tmp_path: Path, writer: str, *, use_dora: bool) -> None:
    trained = save_shared(model, tmp_path / "trained", use_dora=use_dora)
    source = as_megatron(trained, tmp_path / "source", writer, megatron_config={"hidden_size": 128})
    assert any("Megatron" in note for note in Conversion(source, tmp_path / "target", model).run())
    expected = logits_with(model, trained)
    assert (logits_with(model, tmp_path / "target") - expected).abs().max() < 1e-4
    with quiet(), torch.no_grad():
        assert (load_base(model, "causal")(IDS).logits - expected).abs().max() > 0.1


def test_canonical_lora_of_some_layers_keeps_its_own_a(model: Path, tmp_path: Path) -> None:
    plain = save_adapter(
        model, tmp_path / "plain", r=4, target_modules=["q_proj", "v_proj", "up_proj"], layers_to_transform=[1]
    )
    sides = {"lora_A": "linear_in", "lora_B": "linear_out"}
    modules = {"self_attn": "self_attention.linear_qkv", "mlp": "mlp.linear_fc1"}
    tensors = {}
    for name, tensor in load_file(plain / "adapter_model.safetensors").items():
        *_, layer, block, module, side, _ = name.split(".")
        part = module.removesuffix("_proj")
        tensors[f"decoder.layers.{layer}.{modules[block]}.adapter.adapter_{part}.{sides[side]}.weight"] = tensor
    source = stored_in(tmp_path / "source", plain, tensors)
    Conversion(source, tmp_path / "target", model).run()
    assert (logits_with(model, tmp_path / "target") - logits_with(model, plain)).abs().max() < 1e-4


def test_a_base_with_fused_modules_keeps_them(tmp_path: Path) -> None:
    model = make_model(tmp_path / "phi", architecture="phi3", layers=1, heads=4, kv_heads=2, text=True, pooling=None)
    plain = save_adapter(model, tmp_path / "plain", r=4, target_modules=["qkv_proj", "gate_up_proj"])
    stored = load_file(plain / "adapter_model.safetensors")
    attention, mlp = (f"base_model.model.model.layers.0.{name}_proj" for name in ("self_attn.qkv", "mlp.gate_up"))
    q, k, v = stored[f"{attention}.lora_B.weight"].split([128, 64, 64])
    rows = torch.cat([q[:64], k[:32], v[:32], q[64:], k[32:], v[32:]])
    tensors = {
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": stored[f"{attention}.lora_A.weight"],
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight": rows,
        "decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight": stored[f"{mlp}.lora_A.weight"],
        "decoder.layers.0.mlp.linear_fc1.adapter.linear_out.weight": stored[f"{mlp}.lora_B.weight"],
    }
    Conversion(stored_in(tmp_path / "source", plain, tensors), tmp_path / "target", model).run()
    made = load_file(tmp_path / "target" / "adapter_model.safetensors")
    torch.testing.assert_close(made, stored, rtol=0, atol=0)


def _renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def _halved(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if "linear_qkv" in name and "linear_out" in name:
            tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()


def _doubled(tensors: dict[str, Tensor]) -> None:
    (name,) = [name for name in tensors if "layers.0.mlp.linear_fc2" in name and "linear_in" in name]
    tensors[name.replace("linear_in", "lora_a")] = tensors[name] + 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_doubled, "a second tensor for lora_A of down_proj in layer 0; expected one"),
        (_renamed("mlp.linear_fc1", "mlp.experts.linear_fc1"), r"mlp.experts.*dense layers; export it with Megatron-B"),
        (_renamed("layers.1.", "layers.2."), "in 2 dense layers"),
        (_renamed("linear_fc1.adapter", "linear_fc1.adapter.adapter_q"), "expected an adapter of gate_proj or up_proj"),
        (_renamed("adapter.linear_in", "adapter.layer_norm"), "expected LoRA of linear_qkv"),
        (_halved, r"expected 160 rows for this base, got \[80, 4\]; if it is one part of several, export it with"),
    ],
)
def test_other_forms_are_refused(
    model: Path, trained: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    source = edit_weights(as_megatron(trained, tmp_path / "source", "bridge"), change)
    with pytest.raises(ConversionError, match=says):
        Conversion(source, tmp_path / "target", model).run()
    assert not (tmp_path / "target").exists()


def test_what_the_order_of_rows_needs_is_asked_for(model: Path, trained: Path, tmp_path: Path) -> None:
    source = as_megatron(trained, tmp_path / "source", "bridge", alpha_pattern={"linear_qkv": 2})
    for folder, says in ((None, "expected --model"), (model, "alpha_pattern: expected none")):
        with pytest.raises(ConversionError, match=says):
            Conversion(source, tmp_path / "target", folder).run()


@pytest.mark.parametrize("name", ["mp_rank_00", "common.pt", "weights/common.pt", "iter_0000100", "adapter.nemo"])
def test_checkpoints_of_megatron_are_refused_with_the_tool(tmp_path: Path, name: str) -> None:
    (tmp_path / "source" / name).mkdir(parents=True)
    with pytest.raises(ConversionError, match="a checkpoint of Megatron: export it with Megatron-Bridge's"):
        Conversion(tmp_path / "source", tmp_path / "target").run()
