"""Small models of four families with the texts that transformers + PEFT generate, and requests for texts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import Generation
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import RankletError
from tests.assets.families import FamilyText, family_prompts, family_texts
from tests.assets.text_oracle import ReferenceText
from tests.replicas.asking import PATIENCE_S, ref

LOGPROB_ERROR = 1e-4  # largest difference to transformers + PEFT in float32
# The same for two or three layers: 1e-5 for logits with a standard deviation of 1. Those of made models have 3, and
# rounding grows with them: transformers itself is up to 1.2e-5 from float64, depending on the processor.
LOGPROB_ROUNDING = 3e-5


@contextmanager
def checked_engine(config: EngineConfig) -> Iterator[Engine]:
    """Run an engine whose rows and pages are sound at the end."""
    engine = Engine(config)
    engine.start()
    yield engine
    engine.check_integrity()
    engine.stop()


@dataclass(frozen=True)
class AskedText:
    """A prompt for one adapter, and the text that the engine must generate."""

    adapter: AdapterRef | None
    prompt: NDArray[np.int32]
    expected: ReferenceText

    def first(self, tokens: int) -> "AskedText":
        """Return the same prompt with only the first tokens of its text."""
        text = self.expected
        return AskedText(
            self.adapter, self.prompt, ReferenceText(text.tokens[:tokens], text.logprobs[:tokens], text.margin)
        )

    def rest(self, tokens: int) -> "AskedText":
        """Return the prompt with the first tokens of its text appended, and the rest of the text."""
        text, prompt = self.expected, np.concatenate([self.prompt, self.expected.tokens[:tokens]])
        return AskedText(self.adapter, prompt, ReferenceText(text.tokens[tokens:], text.logprobs[tokens:], text.margin))


@dataclass(frozen=True)
class TextScene:
    """A model, its adapters with the base model first, and texts[adapter][prompt]."""

    family: str
    model: Path
    adapters: list[AdapterRef | None]
    prompts: list[NDArray[np.int32]]
    texts: list[list[ReferenceText]]

    def all(self) -> list[AskedText]:
        return [
            AskedText(adapter, prompt, text)
            for adapter, texts in zip(self.adapters, self.texts, strict=True)
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]


def make_scene(folder: Path, family: str) -> TextScene:
    made: FamilyText = family_texts(folder, family)
    adapters = [None, *(ref(spec.path) for spec in made.adapters)]
    return TextScene(family, made.model, adapters, family_prompts(family), made.texts)


def generate(
    engine: Engine, prompts: Sequence[NDArray[np.int32]], adapter: AdapterRef | None, max_tokens: int, **params: Any
) -> Future[Answer]:
    """Queue a greedy request for texts of a fixed length."""
    future: Future[Answer] = Future()

    def done(result: Answer | RankletError) -> None:
        if isinstance(result, RankletError):
            future.set_exception(result)
        else:
            future.set_result(result)

    settings = GenerateParams(max_tokens=max_tokens, **{"temperature": 0, "ignore_eos": True, "logprobs": 0, **params})
    engine.submit(prompts, adapter, settings, AnswerSink(done))
    return future


def request(engine: Engine, asked: AskedText) -> Future[Answer]:
    return generate(engine, [asked.prompt], asked.adapter, len(asked.expected.tokens))


def check(asked: AskedText, answer: Future[Answer]) -> Generation:
    """Check that the answer has the expected tokens and logprobs. Returns its content."""
    made: Generation = answer.result(PATIENCE_S).result
    (choice,) = made.choices
    np.testing.assert_array_equal(choice.tokens, asked.expected.tokens)
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    ours = np.array([each.logprob for each in choice.logprobs])
    np.testing.assert_allclose(ours, asked.expected.logprobs, rtol=0, atol=LOGPROB_ERROR)
    return made
