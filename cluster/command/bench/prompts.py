"""The prompts of a plan: random token ids, random words, or the lines of a file."""

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.command.bench.plan import BenchPlan, lognormal_sigma

_WORDS = 4096  # distinct random words
_TOKENS_PER_WORD = 2  # roughly, with common tokenizers
_COMMON_SEED = 2  # added to the plan's seed for the common prompt


class PromptLine(NamedTuple):
    """One prompt: a text, or token ids."""

    content: str | list[int] | NDArray[np.int32]
    model: str | None = None  # as named in the dataset's file


def make_prompts(plan: BenchPlan) -> list[PromptLine]:
    """Return the prompts of a run, each with the common prompt before it.

    Raises:
        ValueError: The dataset's file cannot be used.
    """
    prompts = _own_prompts(plan)
    tokens = plan.text.common_prompt_tokens if plan.text else 0
    if not tokens:
        return prompts
    rng = np.random.default_rng(plan.seed + _COMMON_SEED)
    ids = rng.integers(0, plan.vocab, tokens, dtype=np.int32)
    text = _random_text(rng, _random_words(rng), tokens)
    return [prompt._replace(content=_joined(ids, text, prompt.content)) for prompt in prompts]


def draw_lengths(plan: BenchPlan, rng: np.random.Generator, length: int, ratio: float, count: int) -> list[int]:
    """Return `count` lengths between `ratio * length` and `length`, or for lognormal `length / ratio`.

    The median of a lognormal distribution is `length`.
    """
    if plan.length_distribution == "uniform":
        return uniform_lengths(rng, length, ratio, count)
    drawn = length * rng.lognormal(0.0, lognormal_sigma(plan.length_distribution), count)
    lengths: list[int] = drawn.round().astype(np.int64).clip(_shortest(length, ratio), int(length / ratio)).tolist()
    return lengths


def uniform_lengths(rng: np.random.Generator, length: int, ratio: float, count: int) -> list[int]:
    lengths: list[int] = rng.integers(_shortest(length, ratio), length, count, endpoint=True).tolist()
    return lengths


def _shortest(length: int, ratio: float) -> int:
    return max(1, int(length * ratio))


def _joined(ids: NDArray[np.int32], text: str, content: str | list[int] | NDArray[np.int32]) -> Any:
    return f"{text} {content}" if isinstance(content, str) else np.concatenate((ids, np.asarray(content, np.int32)))


def _own_prompts(plan: BenchPlan) -> list[PromptLine]:
    if plan.dataset == "file":
        lines = _read_file(plan)
        if plan.batch_size > 1 and any(line.model for line in lines):
            raise ValueError(f"--batch-size: expected 1 for a file whose lines name models, got {plan.batch_size}")
        if plan.text and plan.text.chat and not all(isinstance(line.content, str) for line in lines):
            raise ValueError("--chat: expected a file of texts, got token ids")
        return [lines[i % len(lines)] for i in range(plan.num_prompts)]
    rng = np.random.default_rng(plan.seed)
    lengths = draw_lengths(plan, rng, plan.input_len, plan.range_ratio, plan.num_prompts)
    if not (plan.as_text or (plan.text and plan.text.chat)):
        return [PromptLine(rng.integers(0, plan.vocab, length, dtype=np.int32)) for length in lengths]
    words = _random_words(rng)
    return [PromptLine(_random_text(rng, words, length)) for length in lengths]


def _random_words(rng: np.random.Generator) -> NDArray[np.str_]:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return np.array(["".join(rng.choice(letters, rng.integers(3, 9))) for _ in range(_WORDS)])


def _random_text(rng: np.random.Generator, words: NDArray[np.str_], tokens: int) -> str:
    return " ".join(rng.choice(words, max(1, tokens // _TOKENS_PER_WORD)))


def _read_file(plan: BenchPlan) -> list[PromptLine]:
    assert plan.path is not None
    try:
        # str.splitlines would also split at characters that texts and JSON may contain
        lines = [line.strip() for line in plan.path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--path: expected a readable UTF-8 file: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise ValueError(f"--path: expected at least one text, {plan.path} has none")
    if numbered[0][1].startswith("{"):
        return [_parse_entry(number, line) for number, line in numbered]
    return [PromptLine(line) for _, line in numbered]


def _parse_entry(number: int, line: str) -> PromptLine:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    fields = entry if isinstance(entry, dict) else {}
    content: Any = fields.get("text") or fields.get("input")
    model = fields.get("model")
    is_ids = isinstance(content, list) and content and all(type(token) is int for token in content)
    if not (isinstance(content, str) or is_ids) or not (model is None or isinstance(model, str)):
        raise ValueError(
            f"--path: line {number}: expected a JSON object with a text or token ids in `text` or `input`, "
            f"and optionally a name in `model`; got {line[:60]}"
        )
    return PromptLine(content, model)
