"""The result of a text call as data. Token ids and logprobs travel as bytes, see `ranklet.cluster.message`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.engine.generate import Generation, TextChoice
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.sampled import TokenLogprob

# Serve's gRPC transport refuses messages above 4 MiB. The result of one prompt cannot be split.
MAX_PROMPT_RESULT_BYTES = 7 << 19
_CHOICE_BYTES = 128  # of a choice without its tokens


@dataclass(frozen=True)
class PackedLogprobs:
    """Logprobs of consecutive tokens, and of the best alternatives to each, as many for each token."""

    logprobs: bytes  # float32 [tokens]
    top_ids: bytes  # int32 [tokens, alternatives]
    top_logprobs: bytes  # float32 [tokens, alternatives]

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprob]) -> "PackedLogprobs":
        tops = np.array([each.top for each in tokens], dtype=np.float64).reshape(-1, 2)
        return cls(
            np.array([each.logprob for each in tokens], dtype=np.float32).tobytes(),
            tops[:, 0].astype(np.int32).tobytes(),
            tops[:, 1].astype(np.float32).tobytes(),
        )

    def unpack(self, start: int = 0) -> tuple[TokenLogprob, ...]:
        """Return the logprobs of the tokens from `start` on."""
        logprobs: list[float] = np.frombuffer(self.logprobs, dtype=np.float32).tolist()
        if not self.top_ids:
            return tuple(map(TokenLogprob, logprobs[start:]))
        ids = np.frombuffer(self.top_ids, dtype=np.int32).reshape(len(logprobs), -1)[start:].tolist()
        tops = np.frombuffer(self.top_logprobs, dtype=np.float32).reshape(len(logprobs), -1)[start:].tolist()
        return tuple(
            TokenLogprob(logprob, tuple(zip(*pair, strict=True)))
            for logprob, *pair in zip(logprobs[start:], ids, tops, strict=True)
        )


@dataclass(frozen=True)
class ChoiceResult:
    """One choice; see `ranklet.replicas.engine.generate.TextChoice`."""

    tokens: bytes  # int32 [length]
    finish_reason: str
    stop_token: int | None = None
    logprobs: PackedLogprobs | None = None

    @classmethod
    def of(cls, choice: TextChoice) -> "ChoiceResult":
        logprobs = None if choice.logprobs is None else PackedLogprobs.of(choice.logprobs)
        return cls(choice.tokens.tobytes(), choice.finish_reason, choice.stop_token, logprobs)

    def ids(self) -> NDArray[np.int32]:
        """Return the token ids, int32 [length]: a view of the message."""
        return np.frombuffer(self.tokens, dtype=np.int32)


@dataclass(frozen=True)
class GenerateResult:
    """The choices of a call, prompt by prompt; see `ranklet.replicas.engine.generate.Generation`."""

    choices: tuple[ChoiceResult, ...]
    cached_tokens: int = 0
    prompt_logprobs: tuple[PackedLogprobs, ...] | None = None

    @classmethod
    def of(cls, generation: Generation) -> "GenerateResult":
        scores = generation.prompt_logprobs
        return cls(
            tuple(map(ChoiceResult.of, generation.choices)),
            generation.cached_tokens,
            None if scores is None else tuple(map(PackedLogprobs.of, scores)),
        )


def prompt_result_bytes(params: GenerateParams, prompt_tokens: int) -> int:
    """Return the largest size of the result of one prompt.

    Raises:
        InvalidRequest: no message can carry it.
    """
    choice = _CHOICE_BYTES + params.max_tokens * (4 + _logprob_bytes(params.logprobs))
    size = params.n * choice + prompt_tokens * _logprob_bytes(params.prompt_logprobs)
    if size > MAX_PROMPT_RESULT_BYTES:
        raise InvalidRequest(
            f"max_tokens: expected texts and logprobs of at most {MAX_PROMPT_RESULT_BYTES >> 10} KiB for a prompt, got "
            f"up to {size >> 10} KiB with n={params.n} and max_tokens={params.max_tokens}. Lower max_tokens, n, "
            "logprobs or prompt_logprobs",
            param="max_tokens",
        )
    return size


def _logprob_bytes(count: int | None) -> int:
    return 0 if count is None else 4 + 8 * count
