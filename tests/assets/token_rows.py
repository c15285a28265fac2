"""Adapters whose token embedding or head differs from the base's for some tokens, in each form that PEFT writes."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.assets.adapters import LINEAR, load_base, quiet, randomize_adapter, save_adapter, seed_of
from tests.assets.broken import edit_weights

if TYPE_CHECKING:
    import torch

IDS = [45, 3, 44, 900, 41, 41 + 512]
OTHER_IDS = [46, 47, 7, 1023]
NEW_IDS = [1039, 1024, 1030]  # beyond the base's
_Q = ["q_proj"]
_ROWS = ("trainable_tokens_delta", "embed_tokens.weight", "lm_head.weight", "base_layer.weight")
# Fields of LoraConfig, and the rows of whole matrices that are changed; None for all of them.
ADAPTERS: dict[str, tuple[dict[str, Any], Iterable[int] | None]] = {
    "plain": ({"target_modules": list(LINEAR)}, ()),
    "tokens": ({"target_modules": _Q, "trainable_token_indices": IDS}, ()),
    "tokens-of-both": (
        {"target_modules": _Q, "trainable_token_indices": {"embed_tokens": IDS, "lm_head": OTHER_IDS}},
        (),
    ),
    "same-tokens-of-both": (
        {"target_modules": _Q, "trainable_token_indices": {"model.embed_tokens": IDS, "lm_head": IDS}},
        (),
    ),
    "tokens-of-head": ({"target_modules": _Q, "trainable_token_indices": {"lm_head": OTHER_IDS}}, ()),
    "tokens-ensured": (
        {"target_modules": _Q, "trainable_token_indices": IDS, "ensure_weight_tying": True},
        (),
    ),
    "tokens-and-dora": (
        {"target_modules": list(LINEAR), "use_dora": True, "trainable_token_indices": IDS},
        (),
    ),
    "tokens-and-lora-of-head": ({"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": IDS}, ()),
    "embedding": ({"target_modules": _Q, "modules_to_save": ["embed_tokens"]}, IDS),
    "head": ({"target_modules": _Q, "modules_to_save": ["lm_head"]}, OTHER_IDS),
    "both": ({"target_modules": _Q, "modules_to_save": ["embed_tokens", "lm_head"]}, IDS),
    "all-rows": ({"target_modules": _Q, "modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "embedding-ensured": (
        {"target_modules": _Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        IDS,
    ),
    "embedding-ensured-and-targeted": (
        {
            "target_modules": ["q_proj", "embed_tokens"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        OTHER_IDS,
    ),
    "embedding-and-tokens-of-head": (
        {"target_modules": _Q, "modules_to_save": ["embed_tokens"], "trainable_token_indices": {"lm_head": IDS}},
        OTHER_IDS,
    ),
    "embedding-also-targeted": (
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["embed_tokens"]},
        IDS,
    ),
    "lora-and-whole-embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, IDS),
    "lora-and-head": ({"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, OTHER_IDS),
}


# The same for models that have 1,040 tokens.
RESIZED: dict[str, tuple[dict[str, Any], Iterable[int] | None]] = {
    "resized": ({"target_modules": list(LINEAR)}, (*IDS, *NEW_IDS)),
    "resized-tokens": ({"target_modules": _Q, "trainable_token_indices": [*NEW_IDS, 41]}, ()),
    "resized-both": ({"target_modules": _Q, "modules_to_save": ["embed_tokens", "lm_head"]}, (*IDS, *NEW_IDS)),
    "resized-and-lora": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}, NEW_IDS),
    "resized-and-tied-lora": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
        NEW_IDS,
    ),
}


def save_resized_adapter(model_dir: Path, folder: Path, size: int = 1040, **lora: Any) -> Path:
    """Write the adapter of a name in `RESIZED`, that of the folder, for a model with this number of tokens."""
    import torch
    from peft import LoraConfig, get_peft_model

    fields, changed = RESIZED[folder.name]
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed_of(folder.name))  # of the new rows
        base: Any = load_base(model_dir, "causal")
        base.resize_token_embeddings(size, mean_resizing=False)
        model = get_peft_model(base, LoraConfig(**{"r": 6, **fields, **lora}))
        randomize_adapter(model, seed=seed_of(folder.name), strength=0.6)
        model.save_pretrained(str(folder))
    return edit_weights(folder, changed_rows(changed, seed_of(folder.name)))


def save_token_adapter(model_dir: Path, folder: Path, name: str | None = None, **lora: Any) -> Path:
    """Write the adapter of a name in `ADAPTERS`, by default that of the folder, and change its rows."""
    fields, changed = ADAPTERS[name or folder.name]
    save_adapter(model_dir, folder, **{"r": 6, **fields, **lora})
    return edit_weights(folder, changed_rows(changed, seed_of(folder.name)))


def changed_rows(changed: Iterable[int] | None, seed: int) -> "Callable[[dict[str, torch.Tensor]], None]":
    """Return a function that changes trained rows and, in whole matrices, those of `changed`. Tied ones stay equal."""

    def change(weights: "dict[str, torch.Tensor]") -> None:
        import torch

        before = {key: weight.clone() for key, weight in weights.items()}
        done: dict[str, torch.Tensor] = {}
        for key in sorted(weights):
            weight = weights[key]
            if not key.endswith(_ROWS):
                continue
            twin = next((each for each in done if torch.equal(before[each], weight)), None)
            if twin is not None:
                weights[key] = done[twin].clone()
                continue
            rows = list(range(len(weight)) if changed is None or key.endswith("delta") else changed)
            generator = torch.Generator().manual_seed(seed + len(done))
            weight[rows] = weight.std() * torch.randn(len(rows), weight.shape[1], generator=generator)
            done[key] = weight

    return change
