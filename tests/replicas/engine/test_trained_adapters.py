"""A real model with trained adapters answers as transformers + PEFT do in float32, token for token."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.engine.engine import Engine
from tests.assets.text_oracle import SMALLEST_MARGIN, reference_logprobs
from tests.assets.training.lesson import HELD_OUT
from tests.assets.training.lessons import LESSONS, TRAINED
from tests.assets.training.train import BASE, MAX_NEW_TOKENS, Chat
from tests.replicas.asking import PATIENCE_S, ref
from tests.replicas.text_scene import generate

QUESTIONS = (HELD_OUT[0], HELD_OUT[-1])


def test_the_base_and_each_adapter_answer_and_stop(smollm_dir: Path, make_engine: Callable[..., Engine]) -> None:
    """All questions run in the same batches, each under the base and every adapter."""
    chat = Chat(smollm_dir)
    prompts = [np.array(chat.question(question), np.int32) for question in QUESTIONS]
    folders = [None, *(TRAINED / lesson.name for lesson in LESSONS)]
    engine = make_engine(smollm_dir, slots=4, max_model_len=256, dtype="float32", base_aliases=(BASE,))
    engine.start()
    with engine.paused():
        asked = [
            generate(engine, prompts, ref(folder) if folder else None, MAX_NEW_TOKENS, ignore_eos=False)
            for folder in folders
        ]
    answers = [answer.result(PATIENCE_S).result.choices for answer in asked]
    seen: set[bytes] = set()
    for folder, choices in zip(folders, answers, strict=True):
        for prompt, choice in zip(prompts, choices, strict=True):
            assert folder is None or choice.finish_reason == "stop"
            assert (choice.tokens[-1] == chat.eos) == (choice.finish_reason == "stop")
            assert_greedy(smollm_dir, folder, prompt, choice.tokens)
            seen.add(choice.tokens.tobytes())
    assert len(seen) == len(folders) * len(prompts), "two models gave the same answer"
    engine.check_integrity()


def assert_greedy(model: Path, folder: Path | None, prompt: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
    """Check that each token is the reference's best after those before it. One pass is faster than `generate`."""
    table = reference_logprobs(model, folder, np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(table.argmax(1), tokens)
    second, best = np.partition(table, -2, axis=1)[:, -2:].T
    assert (best - second).min() > SMALLEST_MARGIN, "another CPU may choose another token; choose another question"
