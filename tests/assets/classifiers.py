"""Writes adapters for sequence classification with PEFT, and computes their logits with transformers."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.assets.adapters import quiet, randomize_adapter


def save_classifier(model_dir: Path, folder: Path, labels: Sequence[str], *, seed: int = 0, **lora: Any) -> Path:
    """Write a classifier with random weights, and a config.json with its labels. Returns `folder`.

    Args:
        lora: fields of `LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model

    with quiet():
        base = _load(model_dir, len(labels))
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **lora))
        randomize_adapter(model, seed=seed, strength=0.6)
        model.save_pretrained(str(folder))
    id2label = {str(index): label for index, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps({"id2label": id2label}))
    return folder


def reference_logits(
    model_dir: Path, folder: Path, prompts: Iterable[Iterable[int]], pad_id: int | None = None
) -> npt.NDArray[np.float32]:
    """Compute the logits of prompts, one at a time: float32 [prompts, labels]."""
    import torch
    from peft import PeftModel

    labels = json.loads((folder / "config.json").read_text())["id2label"]
    with quiet():
        base = _load(model_dir, len(labels))
        model: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    base.config.pad_token_id = pad_id
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([list(map(int, ids))])).logits[0] for ids in prompts]
    return np.asarray(torch.stack(rows).numpy(), dtype=np.float32)


def _load(model_dir: Path, labels: int) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(labels)
    return AutoModelForSequenceClassification.from_pretrained(
        str(model_dir), num_labels=labels, dtype=torch.float32, use_cache=False
    )
