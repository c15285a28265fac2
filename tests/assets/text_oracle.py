"""Reference texts from transformers and PEFT in float32: greedy generation, and the logits of given tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.assets.adapters import load_base, quiet
from tests.assets.oracle import attach, is_causal, resize, stamp

SMALLEST_MARGIN = 5e-4  # some 50 times the rounding error of float32 logits
TokenIds = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True)
class ReferenceText:
    """One greedy text.

    Attributes:
        tokens: int32 [n], without the prompt; the EOS that ended the text is included.
        logprobs: float32 [n], of `tokens` and before any processing.
        margin: smallest distance between the logits of a token and of the second best at its place.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    margin: float


def reference_text(
    model_dir: Path,
    adapter_dir: Path | None,
    prompts: Sequence[TokenIds],
    max_tokens: int,
    *,
    ignore_eos: bool = True,
    smallest_margin: float = SMALLEST_MARGIN,
) -> list[ReferenceText]:
    """Generate greedily with transformers' `generate`, all prompts in one batch that is padded on the left.

    Raises:
        ValueError: two tokens are so close that a correct engine may choose the other one, or PEFT ignored keys of the
            adapter or left weights of it unset.
    """
    import torch
    from transformers import GenerationConfig

    model, ends = reference_model(model_dir, adapter_dir)
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor([int(token) for token in prompt])
        mask[row, longest - len(prompt) :] = 1
    eos = [] if ignore_eos else ends
    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=eos or None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=mask, generation_config=config)
    logits = torch.stack(made.logits, dim=1).double()  # [prompts, n, vocabulary]
    best, second = logits.topk(2).values.unbind(-1)
    chosen = (best - logits.logsumexp(-1)).float()
    texts = []
    for row, tokens in enumerate(made.sequences[:, longest:].tolist()):
        end = next((place + 1 for place, token in enumerate(tokens) if token in eos), len(tokens))
        margin = float((best - second)[row, :end].min())
        if margin < smallest_margin:
            raise ValueError(f"prompt {row}: two tokens differ by only {margin:.1e}; choose another prompt or seed")
        texts.append(ReferenceText(np.array(tokens[:end], np.int32), chosen[row, :end].numpy(), margin))
    return texts


def reference_logprobs(
    model_dir: Path, adapter_dir: Path | None, tokens: TokenIds, *, prompt: int | None = None
) -> NDArray[np.float32]:
    """Return the log-probabilities of every token after each token: float32 [tokens, vocabulary].

    Row i is of the token at place i + 1. One pass without a KV cache and without padding.

    Args:
        prompt: number of leading tokens in which aLoRA looks for its invocation; None for all.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.lora.variants import calculate_alora_offsets

    ids = torch.tensor([[int(token) for token in tokens]])
    with torch.inference_mode():
        model, _ = reference_model(model_dir, adapter_dir)
        options: dict[str, Any] = {}
        if isinstance(model, PeftModel) and prompt is not None:
            config: Any = model.peft_config
            (offset,) = calculate_alora_offsets(config, model.active_adapter, ids[:, :prompt])
            options["alora_offsets"] = [offset and offset + ids.shape[1] - prompt]
        logits = model(input_ids=ids, use_cache=False, **options).logits[0]
    return np.asarray(logits.double().log_softmax(-1).float().numpy(), dtype=np.float32)


def chosen_logprobs(
    model_dir: Path, adapter_dir: Path | None, tokens: TokenIds, *, prompt: int | None = None
) -> NDArray[np.float32]:
    """Return the log-probabilities of tokens[1:], each after the tokens before it: float32 [tokens - 1]."""
    table = reference_logprobs(model_dir, adapter_dir, tokens, prompt=prompt)
    chosen: NDArray[np.float32] = table[np.arange(len(tokens) - 1), np.asarray(tokens[1:])]
    return chosen


def reference_model(model_dir: Path, adapter_dir: Path | None) -> tuple[Any, list[int]]:
    """Load a causal model in float32 with its adapter, and the ids that end its texts. The last few are kept."""
    model_dir, adapter_dir = Path(model_dir), adapter_dir and Path(adapter_dir)
    return _model(model_dir, adapter_dir, stamp(model_dir), stamp(adapter_dir))


@lru_cache(maxsize=8)
def _model(model_dir: Path, adapter_dir: Path | None, *stamps: int) -> tuple[Any, list[int]]:
    with quiet():
        model: Any = load_base(model_dir, "causal")
        ids = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = None  # `generate` would take it where a call names none
        if adapter_dir is not None:
            resize(model, adapter_dir)
            wrapped = attach(model if is_causal(adapter_dir) else model.get_submodule("model"), adapter_dir)
            if wrapped.active_peft_config.alora_invocation_tokens is not None:
                model = wrapped
    return model.eval(), [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
