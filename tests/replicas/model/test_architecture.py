"""Dimensions and rotary tables equal those of transformers; unsupported configs are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.architecture import Architecture, read_architecture, read_config, rotary_tables
from tests.assets.make import LLAMA3_ROPE

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def config(kind: str, **fields: Any) -> Any:
    head = {
        "qwen3": "Qwen3",
        "qwen2": "Qwen2",
        "llama": "Llama",
        "mistral": "Mistral",
        "smollm3": "SmolLM3",
        "phi3": "Phi3",
        "gemma3_text": "Gemma3",
    }[kind]
    defaults: dict[str, Any] = {"architectures": [f"{head}ForCausalLM"], "pad_token_id": None}
    return AutoConfig.for_model(kind, **SHAPE, **{**defaults, **fields})


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "mistral", "smollm3", "gemma3_text"])
@pytest.mark.parametrize("head_dim", [None, 32])
def test_dimensions_equal_those_of_transformers_modules(kind: str, head_dim: int | None) -> None:
    model_config = config(kind, **({} if head_dim is None else {"head_dim": head_dim}))
    shape = read_architecture(model_config)
    with torch.device("meta"):
        layer = AutoModel.from_config(model_config).layers[0]
    for name, (wide, out) in shape.module_dims().items():
        linear = getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name)
        assert (linear.in_features, linear.out_features) == (wide, out), name
    assert shape.qk_norm == hasattr(layer.self_attn, "q_norm")
    assert shape.layers == 3
    assert shape.max_position == 512


@pytest.mark.parametrize(
    ("kind", "fields", "windows"),
    [
        ("mistral", {"sliding_window": 7}, (7, 7, 7)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": 512}, (None, None, None)),  # no prompt is longer
        ("llama", {}, (None, None, None)),
        ("qwen2", {"sliding_window": 7}, (None, None, None)),  # given but not used
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, (None, 7, 7)),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (5, None, 5),
        ),
    ],
)
def test_each_layer_has_its_window(kind: str, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read_architecture(config(kind, **fields)).windows == windows


def test_modules_of_a_fused_family_equal_those_of_transformers() -> None:
    model_config = config("phi3")
    shape = read_architecture(model_config)
    with torch.device("meta"):
        layer = AutoModel.from_config(model_config).layers[0]
    linears = {
        name.rpartition(".")[2]: (module.in_features, module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {name: shape.dims(name) for name in shape.stored_modules()} == linears


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"hidden_activation": "silu"}, "hidden_activation: expected gelu_pytorch_tanh, got silu"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, "dynamic"),
    ],
)
def test_unsupported_options_of_gemma_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    with pytest.raises(ModelError, match=message):
        read_architecture(config("gemma3_text", **layers, **fields))


PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def test_partially_rotated_heads_and_longrope() -> None:
    partial = read_architecture(config("phi3", rope_parameters=dict(PARTIAL)))
    assert (partial.rotated, partial.max_position, partial.longrope) == (12, 512, False)
    long = read_architecture(config("phi3", rope_parameters=dict(LONGROPE), original_max_position_embeddings=128))
    assert (long.rotated, long.max_position, long.longrope) == (None, 128, True)


def test_parts_of_heads_that_cannot_be_rotated_are_refused() -> None:
    rope = {**PARTIAL, "partial_rotary_factor": 0.2}
    with pytest.raises(ModelError, match="partial_rotary_factor: expected an even part of heads of 16 columns, got 3"):
        read_architecture(config("phi3", rope_parameters=rope))


@pytest.mark.parametrize(
    ("fields", "layers"), [({"no_rope_layers": [1, 0, 0, 1]}, (1, 2)), ({"no_rope_layer_interval": 3}, (2,))]
)
def test_layers_without_rotary_embeddings(fields: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert read_architecture(config("smollm3", **fields)).unrotated == layers


def test_too_few_no_rope_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="no_rope_layers: expected a number for each of 3 layers, got 1"):
        read_architecture(config("smollm3", no_rope_layers=[1], layer_types=["full_attention"] * 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"architectures": ["Phi3SmallForCausalLM"]}, "Phi3SmallForCausalLM"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ({"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 128}}, "longrope"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"architectures": None}, "(none)"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"is_causal": False}, "is_causal"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_an_unsupported_config_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as refused:
        read_architecture(config("qwen3", **fields))
    assert message in refused.value.message
    assert "expected" in refused.value.message


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {**LLAMA3_ROPE, "rope_theta": 5e5},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: f"{rope['rope_type']}-{rope['rope_theta']:g}",
)
def test_rotary_tables_equal_those_of_transformers(rope: dict[str, Any]) -> None:
    model_config = config("llama", rope_parameters=rope)
    shape: Architecture = read_architecture(model_config)
    cos, sin = rotary_tables(model_config, shape, 300, torch.device("cpu"))
    assert cos.shape == sin.shape == (300, shape.head_dim // 2)
    their_cos, their_sin = LlamaRotaryEmbedding(model_config)(torch.zeros(1), torch.arange(300)[None])
    half = shape.head_dim // 2
    torch.testing.assert_close(cos, their_cos[0, :, :half], rtol=0, atol=2e-6)
    torch.testing.assert_close(sin, their_sin[0, :, :half], rtol=0, atol=2e-6)


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a folder"):
        read_config(tmp_path / "missing")
    for content in ("{", "[]", "{}", json.dumps({"model_type": "no-such-model"})):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json"):
            read_config(tmp_path)
