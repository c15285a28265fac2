"""Kinds of adapter folders that other tools write, beyond the six of the demo. Each must be served."""

from collections.abc import Callable
from pathlib import Path

from tests.assets.adapters import save_adapter, save_sentence_transformers_adapter

Maker = Callable[[Path, Path], Path]


def sentence_transformers(model_dir: Path, folder: Path) -> Path:
    """Saved by sentence-transformers: keys as in `bare`, inside a folder with its other files."""
    return save_sentence_transformers_adapter(model_dir, folder, r=8, target_modules=["q_proj", "v_proj"])


def bare(model_dir: Path, folder: Path) -> Path:
    """Trained on AutoModel: keys `base_model.model.layers...`."""
    return save_adapter(model_dir, folder, head="bare", r=8, target_modules=["q_proj", "up_proj", "down_proj"])


def bare_embed(model_dir: Path, folder: Path) -> Path:
    """Only embed_tokens, on AutoModel; PEFT saves the unchanged base embedding beside it."""
    return save_adapter(model_dir, folder, head="bare", r=8, target_modules=["embed_tokens"])


def task_type(model_dir: Path, folder: Path) -> Path:
    """With a task type."""
    return save_adapter(model_dir, folder, r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def layer_list(model_dir: Path, folder: Path) -> Path:
    """Only some layers."""
    return save_adapter(model_dir, folder, r=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 3])


def layer_number(model_dir: Path, folder: Path) -> Path:
    """One layer, given as a number, with the name of the layers' list."""
    return save_adapter(
        model_dir, folder, r=8, target_modules=["k_proj"], layers_to_transform=2, layers_pattern="layers"
    )


def regex(model_dir: Path, folder: Path) -> Path:
    """target_modules is a regular expression over module names."""
    return save_adapter(model_dir, folder, r=8, target_modules=r".*layers\.[02]\.self_attn\.(q|o)_proj")


def all_linear(model_dir: Path, folder: Path) -> Path:
    """The shorthand, which PEFT saves as a list."""
    return save_adapter(model_dir, folder, r=8, target_modules="all-linear")


def full_names(model_dir: Path, folder: Path) -> Path:
    """target_modules contains full module names and short ones."""
    return save_adapter(model_dir, folder, r=8, target_modules=["model.layers.0.self_attn.q_proj", "v_proj"])


def excluded(model_dir: Path, folder: Path) -> Path:
    """exclude_modules excludes some targets."""
    return save_adapter(model_dir, folder, r=8, target_modules="all-linear", exclude_modules=["o_proj"])


def odd_rank(model_dir: Path, folder: Path) -> Path:
    """A rank that is no multiple of 8, and an alpha that is no multiple of the rank."""
    return save_adapter(model_dir, folder, r=5, lora_alpha=7, target_modules=["q_proj", "gate_proj"])


def rank_one(model_dir: Path, folder: Path) -> Path:
    """The smallest rank."""
    return save_adapter(model_dir, folder, r=1, lora_alpha=2, target_modules=["down_proj"])


def patterns_by_regex(model_dir: Path, folder: Path) -> Path:
    """rank_pattern and alpha_pattern with regular expressions, under rsLoRA."""
    return save_adapter(
        model_dir,
        folder,
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={r"layers\.[01]\.self_attn\..*": 12, "^model.layers.3.mlp.down_proj": 20},
        alpha_pattern={r"layers\.\d\.mlp\.down_proj": 24},
    )


def half_precision(model_dir: Path, folder: Path) -> Path:
    """Saved in bfloat16, as adapters trained on a GPU are."""
    import torch
    from safetensors.torch import load_file, save_file

    save_adapter(model_dir, folder, r=8, target_modules=["q_proj", "v_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    halved = {key: value.to(torch.bfloat16) for key, value in weights.items()}
    save_file(halved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


VARIANTS: dict[str, Maker] = {
    maker.__name__.replace("_", "-"): maker
    for maker in (
        sentence_transformers,
        bare,
        bare_embed,
        task_type,
        layer_list,
        layer_number,
        regex,
        all_linear,
        full_names,
        excluded,
        odd_rank,
        rank_one,
        patterns_by_regex,
        half_precision,
    )
}
