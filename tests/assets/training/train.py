"""Trains adapters with PEFT in float32 on the CPU, and checks their answers to held-out questions."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.assets.adapters import load_base, quiet
from tests.assets.text_oracle import reference_model
from tests.assets.training.lesson import Lesson, Pair

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_NEW_TOKENS = 48
_SEED = 0
_BATCH = 8
_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 5


@dataclass(frozen=True)
class Example:
    """Token ids of a question in the chat template, and of its answer with the EOS."""

    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Answered:
    """The answer to a held-out question; `good` if it ended in time and shows the effect."""

    question: str
    text: str
    good: bool


class Chat:
    """Tokenises questions and answers as the model's chat template writes them."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self.eos: int = self._tokenizer.eos_token_id

    def question(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        ids: list[int] = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return ids

    def example(self, pair: Pair) -> Example:
        question, answer = pair
        return Example(self.question(question), [*self._tokenizer(answer)["input_ids"], self.eos])

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text


class Packed:
    """Examples in one row, behind the prefix that all their questions share.

    The prefix is most of a short example. Computing it once a batch makes training twice as fast.

    Attributes:
        ids: [1, T].
        positions: [1, T].
        mask: [1, 1, T, T], added to attention scores: a token sees the prefix and its own example.
        labels: [1, T], the next token where it belongs to an answer, else -100.
    """

    def __init__(self, prefix: list[int], examples: Sequence[Example]) -> None:
        shared = len(prefix)
        ids, positions, labels, owners = [*prefix], [*range(shared)], [-100] * shared, [-1] * shared
        for owner, example in enumerate(examples):
            tail = [*example.question, *example.answer][shared:-1]
            ids += tail
            positions += range(shared, shared + len(tail))
            labels += [-100] * (len(example.question) - shared - 1) + example.answer
            owners += [owner] * len(tail)
        by = torch.tensor(owners)
        sees = ((by == -1) | (by == by[:, None])).tril()
        self.ids, self.positions, self.labels = (torch.tensor([row]) for row in (ids, positions, labels))
        self.mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


def train(model_dir: Path, lesson: Lesson, folder: Path) -> float:
    """Train one adapter and save it in bfloat16. Returns the mean loss of the last epoch."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(_SEED)
    order = random.Random(_SEED)
    chat = Chat(model_dir)
    examples = [chat.example(pair) for pair in lesson.pairs]
    columns = zip(*(example.question for example in examples), strict=False)
    prefix = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    with quiet():
        targets = list(lesson.targets)
        config = LoraConfig(r=lesson.rank, lora_alpha=2 * lesson.rank, target_modules=targets, task_type="CAUSAL_LM")
        model: Any = get_peft_model(load_base(model_dir, "causal"), config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, weight_decay=0.0)
    batches = -(-len(examples) // _BATCH)
    steps = lesson.epochs * batches
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / steps)
    )
    for _ in range(lesson.epochs):
        order.shuffle(examples)
        total = 0.0
        for start in range(0, len(examples), _BATCH):
            loss = _loss(model, Packed(prefix, examples[start : start + _BATCH]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            total += loss.item()
    _save(model, lesson, folder)
    return total / batches


def _loss(model: Any, batch: Packed) -> Tensor:
    """Compute the mean loss of the answers' tokens. Only their states go through the large LM head."""
    causal = model.get_base_model()
    states = causal.model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    answers = batch.labels != -100
    return torch.nn.functional.cross_entropy(causal.lm_head(states[answers]), batch.labels[answers])


def _save(model: Any, lesson: Lesson, folder: Path) -> None:
    """Write weights of bfloat16, so that engines in bfloat16 and in float32 read equal ones."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE
    with quiet():
        model.bfloat16().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_text(
        f"An adapter for {BASE} that {lesson.effect}.\n"
        f"Trained with PEFT on {len(lesson.pairs)} own examples: rank {lesson.rank}, {', '.join(lesson.targets)}, "
        f"{lesson.epochs} epochs, float32 on the CPU.\n"
        f"Made by `python -m tests.assets.training {lesson.name}`.\n",
        encoding="utf-8",
    )


def check(model_dir: Path, lesson: Lesson, folder: Path) -> list[Answered]:
    """Answer the held-out questions greedily in float32 with the saved adapter."""
    chat = Chat(model_dir)
    model, ends = reference_model(model_dir, folder)
    prompts = [chat.question(question) for question in lesson.held_out]
    longest = max(map(len, prompts))
    ids = torch.tensor([[chat.eos] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=ends,
            pad_token_id=chat.eos,
        )  # fmt: skip
    return [
        _answered(chat, lesson, question, tokens)
        for question, tokens in zip(lesson.held_out, made[:, longest:].tolist(), strict=True)
    ]


def _answered(chat: Chat, lesson: Lesson, question: str, tokens: list[int]) -> Answered:
    ended = chat.eos in tokens
    text = chat.decode(tokens[: tokens.index(chat.eos)] if ended else tokens)
    return Answered(question, text, ended and lesson.shows(question, text))
