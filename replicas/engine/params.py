"""Parameters of requests, one class for each kind of task. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ranklet.kernels.sampling_row import TOP_LOGPROBS
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.model.classifier import MAX_LABELS
from ranklet.replicas.model.dense_settings import DenseSettings
from ranklet.replicas.model.embedding_settings import Prompting
from ranklet.replicas.model.sampling_values import SamplingValues

MAX_BIASES: Final = 1024
MAX_STOP_IDS: Final = 512
MAX_CHOICES: Final = 128
SEED_BITS: Final = 63  # of a seed that is drawn for a request without one


@dataclass(frozen=True, slots=True)
class HeadParams:
    """The head that turns vectors of an adapter into scores.

    Attributes:
        revision: of the adapter whose folder the prompts were made by.
        tokens: the score is the logit of the second token less that of the first; None for the adapter's own head.
        labels: number of labels of the adapter's own head; None if its folder does not say.
    """

    revision: str
    tokens: tuple[int, int] | None = None
    labels: int | None = None

    @property
    def most_outputs(self) -> int:
        """Return the largest number of scores that a prompt may have."""
        return 1 if self.tokens is not None else self.labels or MAX_LABELS


@dataclass(frozen=True, slots=True)
class EmbedParams:
    """Parameters of a request for embeddings.

    Attributes:
        dimensions: leading values to keep of each vector; None keeps all.
        pooling: last, mean or cls; None as the base model's folder says. Replicas set it as the adapter's folder says.
        normalize: whether vectors have length 1; None as for `pooling`.
        skipped: number of tokens at the beginning of each prompt that mean and cls pooling leave out.
        prompting: how texts became the prompts. Replicas compare it with the adapter's folder.
        dense: layers between pooling and normalization; None for those of the base model. Replicas compare it too.
        head: computes the answer of the vectors; None answers with the vectors.
    """

    dimensions: int | None = None
    pooling: str | None = None
    normalize: bool | None = None
    skipped: int = 0
    prompting: Prompting = field(default_factory=Prompting)
    dense: tuple[DenseSettings, ...] | None = None
    head: HeadParams | None = None


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """Parameters of a text request.

    Attributes:
        temperature: 0 chooses the likeliest token.
        top_k: 0 or -1 keeps all tokens.
        presence_penalty: subtracted once from the logit of each generated token.
        frequency_penalty: subtracted from a token's logit for each time that it was generated.
        repetition_penalty: divides positive logits of tokens in the prompt or the output, and multiplies negative ones.
        logit_bias: (token id, bias) pairs.
        allowed_token_ids: the only tokens to draw; None allows all.
        min_tokens: bans the ids that end the text until this many tokens are generated.
        stop_token_ids: end the text in addition to the model's own ids.
        ignore_eos: the model's own ids do not end the text.
        n: number of choices.
        seed: makes the draws repeatable; None or -1 draws a seed.
        logprobs: number of largest logprobs at each generated token; 0 asks for the token's own only.
        prompt_logprobs: number of largest logprobs at each token of the prompt; 0 asks for the token's own only.
        cache_salt: requests with different salts share no cached pages.
        grammar: of each text; None allows any text.

    Raises:
        InvalidRequest: a value has another type or is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 0)
        _number("temperature", self.temperature, 0, 100, "use 0 for the likeliest token")
        _integer("top_k", self.top_k, -1, remedy="use 0 to keep all tokens")
        _number("top_p", self.top_p, 0, 1, "use 1 to keep all tokens", open_low=True)
        _number("min_p", self.min_p, 0, 1, "use 0 to keep all tokens")
        _number("presence_penalty", self.presence_penalty, -2, 2, "use 0 for no penalty")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "use 0 for no penalty")
        _number("repetition_penalty", self.repetition_penalty, 0.001, 1000, "use 1 for no penalty")
        _integer("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", f"at most max_tokens, which is {self.max_tokens}", self.min_tokens)
        _integer("n", self.n, 1, MAX_CHOICES, "send several requests for more choices")
        if type(self.ignore_eos) is not bool:
            raise _refusal("ignore_eos", "true or false", self.ignore_eos)
        if self.grammar is not None and self.ignore_eos:
            raise _refusal("ignore_eos", "false for a text with a grammar, which ends when it is complete", True)
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 63) - 1, "leave it out for a random seed")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, TOP_LOGPROBS)
        if not isinstance(self.cache_salt, str):
            raise _refusal("cache_salt", "a string", self.cache_salt)
        self._check_ids()

    def check(self, vocab: int) -> None:
        """Raise InvalidRequest if a token id is not in the vocabulary."""
        for name, ids in (
            ("logit_bias", [token for token, _ in self.logit_bias]),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in ids:
                _integer(name, token, 0, vocab - 1, "the base model has no other token ids")

    def sampling(self, *, seed: int, eos_ids: Sequence[int], prompt_tokens: int, choice: int = 0) -> SamplingValues:
        """Return the sampling of one choice.

        Args:
            seed: `self.seed`, or the seed that was drawn for the request.
            eos_ids: the ids of the base and the adapter that end the text.
            prompt_tokens: length of the prompt; the position of the first generated token.
        """
        stops: tuple[int, ...] = ()
        if self.min_tokens and self.grammar is None:  # a grammar's mask has the bans
            stops = (*self.stop_token_ids, *(() if self.ignore_eos else eos_ids))
        return SamplingValues(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=seed if choice == 0 else _mixed(_mixed(seed) + choice),
            logit_bias=self.logit_bias,
            banned_ids=stops,
            banned_until=prompt_tokens + self.min_tokens,
            allowed_token_ids=None if self.grammar is not None else self.allowed_token_ids,
            has_grammar=self.grammar is not None,
            logprobs=self.logprobs,
        )

    def _check_ids(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise _refusal("logit_bias", f"at most {MAX_BIASES} tokens", len(self.logit_bias))
        for token, bias in self.logit_bias:
            _integer("logit_bias", token, 0)
            _number("logit_bias", bias, -100, 100, "use allowed_token_ids to exclude all other tokens")
        _unique("logit_bias", [token for token, _ in self.logit_bias])
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise _refusal("stop_token_ids", f"at most {MAX_STOP_IDS} ids", len(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise _refusal("allowed_token_ids", "at least one id", "an empty list", "leave it out to allow all")
            for token in self.allowed_token_ids:
                _integer("allowed_token_ids", token, 0)


def _refusal(name: str, expected: str, got: Any, remedy: str = "") -> InvalidRequest:
    return InvalidRequest(f"{name}: expected {expected}, got {got!r}{remedy and '; ' + remedy}", param=name)


def _integer(name: str, value: Any, low: int, high: int | None = None, remedy: str = "") -> None:
    expected = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"
    if type(value) is not int or value < low or (high is not None and value > high):
        raise _refusal(name, expected, value, remedy)


def _number(name: str, value: Any, low: float, high: float, remedy: str, *, open_low: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and low <= value <= high and not (open_low and value == low):
        return
    raise _refusal(name, f"a number {'above' if open_low else 'from'} {low} {'up ' * open_low}to {high}", value, remedy)


def _unique(name: str, ids: Iterable[int]) -> None:
    seen: set[int] = set()
    for token in ids:
        if token in seen:
            raise _refusal(name, "each token once", token)
        seen.add(token)


def _mixed(number: int) -> int:
    """Return an int64 whose bits all depend on the bits of `number`: the last step of SplitMix64."""
    bits = number & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    bits ^= bits >> 31
    return bits - (1 << 64) if bits >> 63 else bits


_MASK = (1 << 64) - 1


Params = EmbedParams | GenerateParams
