"""Hidden states and logits of causal language models, from transformers and PEFT in float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.assets.adapters import load_base, quiet
from tests.assets.oracle import attach

if TYPE_CHECKING:
    import torch


def states_and_logits(
    model_dir: Path, adapter_dir: Path | None, ids: Sequence[int]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Compute the states after the final norm [tokens, hidden] and the logits [tokens, vocab] of one text.

    Raises:
        ValueError: PEFT ignored keys of the adapter or left weights of it unset.
    """
    import torch

    with quiet():
        model = load_base(model_dir, "causal")
        if adapter_dir is not None:
            attach(model, adapter_dir)
    with torch.inference_mode():
        out = model.eval()(input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]
