"""Reference answers from transformers and PEFT in float32. The base is loaded once and PEFT switches its adapters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.assets.adapters import load_base, quiet
from tests.demo.client import EmbeddedTexts
from tests.demo.models import DemoModel

if TYPE_CHECKING:
    import torch

Vectors = dict[str, np.ndarray]  # float32 [texts, hidden] by model name


class Reference:
    """Computes one text at a time, without padding and without a KV cache.

    Raises:
        ValueError: PEFT ignored keys of an adapter or left weights of it unset.
    """

    def __init__(self, served: DemoModel) -> None:
        import torch
        from peft import PeftConfig, PeftModel
        from transformers import AutoTokenizer

        torch.set_num_threads(1)  # Ray starts and the replica computes at the same time
        self._served = served
        self._tokenizer: Any = AutoTokenizer.from_pretrained(served.model_dir)
        first = served.adapters[0]
        with quiet():
            base = load_base(served.model_dir, "causal")
            self._model: Any = PeftModel(base, PeftConfig.from_pretrained(str(first.path)), first.name).eval()
            for adapter in served.adapters:
                result = self._model.load_adapter(str(adapter.path), adapter.name)
                unset = [key for key in result.missing_keys if "lora_" in key and adapter.name in key.split(".")]
                if result.unexpected_keys or unset:
                    raise ValueError(f"{adapter.name}: PEFT left unused {result.unexpected_keys} and unset {unset}")

    def vectors(self, sent: Sequence[EmbeddedTexts]) -> Vectors:
        return {each.model: np.stack([self._vector(each.model, text) for text in each.texts]) for each in sent}

    def _vector(self, name: str, text: str) -> np.ndarray:
        """Return the last token's state, as both models pool. Its length does not change a cosine."""
        states, _ = self._run(name, self.encode(text))
        return np.asarray(states[-1].numpy(), np.float32)

    def equal_tokens(self, name: str, question: str, tokens: Sequence[int]) -> int:
        """Return how many leading tokens of an answer are those that greedy generation gives.

        One pass over the answer shows it: a token is right if it is the most probable one after those before it.
        """
        messages = [{"role": "user", "content": question}]
        prompt: list[int] = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        _, logits = self._run(name, [*prompt, *tokens])
        best = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return next((place for place, token in enumerate(tokens) if token != best[place]), len(tokens))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    @property
    def eos(self) -> int:
        """Id of the token that ends an answer."""
        found: int = self._tokenizer.eos_token_id
        return found

    def _run(self, name: str, ids: Sequence[int]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the states after the final norm [tokens, hidden] and the logits [tokens, vocabulary]."""
        import torch

        with torch.inference_mode(), self._adapted(name):
            out = self._model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][0], out.logits[0]

    @contextmanager
    def _adapted(self, name: str) -> Iterator[None]:
        if name == self._served.base:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(name)
            yield
