"""Estimates what the parts of a step cost, and divides prompts accordingly. No clock: costs only compare steps.

The unit of cost is one token of a prompt that has no tokens before it. Constants are of an H200 with bfloat16 and two
model sizes, 0.6B and 8B; GPUs of other sizes have similar ratios.
"""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from math import inf

from ranklet.replicas.model.architecture import Architecture

LEAST_PIECE = 64  # tokens of a piece of a prompt that is not its last
MOST_TEXT_TOKENS = 8192  # of a step with texts. Larger steps are hardly faster per token, and running texts wait longer
_COARSEST = 1024  # steps of more than some thousand tokens need no graph
_WEIGHT_BYTES = 2
_FLOPS_PER_BYTE = 160  # operations in products that take as long as reading a byte
_ATTENTION = 1.6  # time of an operation in attention, compared with one in products
_VALUE_BYTES = 100  # memory traffic of a token outside products, for each hidden value of each layer
_LAYER_FLOPS = 2e10  # operations in products that take as long as the launches of a layer
_MIXED_LAYER_FLOPS = 4e10  # the same, of what a layer takes longer if a step has prompts beside decodes


@dataclass(frozen=True, slots=True)
class StepCost:
    """What steps of a model cost.

    Attributes:
        step: cost of a step, whatever its size.
        mixed: further cost of a step with decodes and prompts.
        decode: cost of a decode without context.
        read: further cost of a decode for each token of its context.
        attend: further cost of a prompt's token for each token before it.
        windows: shares of the layers, and how many tokens a token sees in them.
    """

    step: float = 0.0
    mixed: float = 0.0
    decode: float = 1.0
    read: float = 0.0
    attend: float = 0.0
    windows: tuple[tuple[float, float], ...] = ((1.0, inf),)

    @classmethod
    def of(cls, shape: Architecture) -> "StepCost":
        layers = shape.layers
        weights = layers * sum(width * out for width, out in shape.module_dims().values())
        head = shape.hidden * shape.vocab
        token = 2 * weights + _FLOPS_PER_BYTE * _VALUE_BYTES * layers * shape.hidden
        read_bytes = 2 * _WEIGHT_BYTES * layers * shape.kv_heads * shape.head_dim
        return cls(
            step=(_FLOPS_PER_BYTE * _WEIGHT_BYTES * (weights + head) + _LAYER_FLOPS * layers) / token,
            mixed=_MIXED_LAYER_FLOPS * layers / token,
            decode=1 + 2 * head / token,
            read=_FLOPS_PER_BYTE * read_bytes / token,
            attend=_ATTENTION * 4 * layers * shape.heads * shape.head_dim / token,
            windows=tuple((count / layers, window or inf) for window, count in Counter(shape.windows).items()),
        )

    def decodes(self, count: int, context: float) -> float:
        """Return the cost of a step of decodes, whose contexts have `context` tokens together."""
        return self.step + count * (self.decode + self.read * self._seen(context / count))

    def piece(self, tokens: float, start: float) -> float:
        """Return the cost of a prompt's tokens behind `start` others."""
        return tokens * (1 + self.attend * self._seen(start + tokens / 2))

    def fitting(self, cost: float, start: int, most: int) -> int:
        """Return how many tokens behind `start` others cost this much, at most `most`."""
        if self.piece(most, start) <= cost:
            return most
        return bisect_right(range(1, most), cost, key=lambda tokens: self.piece(tokens, start))

    def _seen(self, context: float) -> float:
        return sum(share * min(context, window) for share, window in self.windows)


@dataclass(slots=True)
class PromptBudget:
    """What the prompts of a step may still take, while the step is planned.

    Attributes:
        tokens: number of tokens.
        cost: infinite without decodes.
        most_cost: of the step's prompts, at which the next one's piece ends; None for no such limit.
        spent: cost of the prompts in the step.
        most_text: tokens of prompts at which a text's piece ends; None for no such limit.
        decodes: number of decodes in the step.
        decodes_cost: cost of the step without prompts; 0 without decodes, or if nothing waits.
        taken: tokens of prompts in the step.
        is_spent: whether no useful piece fits any more.
        is_limited: whether the last prompt did not fit because of `most_cost` only.
    """

    costs: StepCost
    tokens: int
    cost: float = inf
    most_cost: float | None = None
    spent: float = 0.0
    most_text: int | None = None
    decodes: int = 0
    decodes_cost: float = 0.0
    taken: int = 0
    is_spent: bool = False
    is_limited: bool = False

    def limit(self, most_text: int | None, most_cost: float | None) -> None:
        """Set the limits of the next prompt."""
        self.most_text, self.most_cost, self.is_limited = most_text, most_cost, False

    def fit(self, left: int, start: int, *, is_text: bool) -> int:
        """Return how many of the last `left` tokens of a prompt, behind `start` others, fit; 0 if too few.

        Without prompts in the step, the least piece always fits, whatever it costs.
        """
        most = min(left, self._text_tokens if is_text else self.tokens)
        is_cut = is_text and self.most_text is not None and most > self.most_text - self.taken
        if is_cut and self.most_text is not None:
            most = min(most, max(self.most_text - self.taken, 0 if self.taken else LEAST_PIECE))
        if most <= 0:
            return 0
        cost = self.cost if self.most_cost is None else min(self.cost, self.most_cost - self.spent)
        tokens = most if cost == inf else self.costs.fitting(cost, start, most)
        if tokens < most:
            tokens = self._rounded(tokens)
        if tokens == left or tokens >= LEAST_PIECE:
            return tokens
        if not self.taken:
            return min(most, LEAST_PIECE)
        self.is_limited = cost < self.cost
        self.is_spent = is_cut or (cost < inf and not self.is_limited)
        return 0

    def has_space_for_more(self, prompts: int) -> bool:
        """Return whether another prompt would fit that is as long as the step's `prompts` are on average."""
        return self.spent <= prompts * self.cost and self.taken <= prompts * self.tokens

    def _rounded(self, tokens: int) -> int:
        """Make a piece smaller, so that steps have few sizes: each size needs a CUDA graph."""
        total = self.decodes + self.taken + tokens
        return tokens - total % min(_COARSEST, max(1, (1 << total.bit_length()) // 4))

    @property
    def _text_tokens(self) -> int:
        return min(self.tokens, MOST_TEXT_TOKENS - self.decodes - self.taken)

    def take(self, tokens: int, start: int, *, is_text: bool) -> None:
        self.tokens -= tokens
        self.taken += tokens
        if is_text:
            self.tokens = self._text_tokens
        cost = self.costs.piece(tokens, start)
        self.cost -= cost
        self.spent += cost
