"""A token sequence of a request, and its progress."""

from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.prefix import PrefixRoot
from ranklet.replicas.engine.plan import Need
from ranklet.replicas.model.sampling_values import SamplingValues

if TYPE_CHECKING:
    from ranklet.replicas.engine.request import Request
    from ranklet.replicas.grammar.text_grammar import TextGrammar

PATIENCE = 4
_MORE = 256  # tokens by which a full buffer grows at least


class Flow(NamedTuple):
    """Owner of a share of the engine: what one API key sends to one adapter.

    Attributes:
        adapter: name of the adapter; "" for the base model.
        key_name: name of the key; "" without keys.
    """

    adapter: str = ""
    key_name: str = ""

    def __str__(self) -> str:
        adapter = f"adapter {self.adapter!r}" if self.adapter else "the base model"
        return f"{adapter} with key {self.key_name!r}" if self.key_name else adapter


@dataclass(slots=True, eq=False)
class Sequence:
    """A token sequence and its progress.

    Attributes:
        buffer: int32: holds `ids`, and has space for more.
        given: number of last tokens of `buffer` that are output, made before the request came.
        length: number of tokens of the prompt and of the outputs that have reached the host.
        flow: owner of the share of the engine that it uses.
        index: position among the sequences of the request.
        prompt: number of leading tokens that the client sent.
        need: the work that is left; set when the sequence starts, and when it starts again after a preemption.
        computed: number of leading tokens that launched steps have computed.
        left: number of outputs that no launched step computes yet.
        epoch: number of times that launched work of this sequence became void: it was preempted, failed or ended.
        passes: number of delivered outputs.
        awaited: number of outputs that are not delivered.
        passed_over: number of steps that this sequence did not fit into although its adapter was ready.
        solo: number of outputs that it still computes without other sequences, because an earlier step with it failed.
        finishing: whether its next output is its last, because the client needs no more.
        slot: pool slot of the adapter; None for the base model.
        adapted_from: number of leading tokens that are computed without the adapter (see `first_adapted`).
        holds_slot: whether `slot` is reserved, from the first pass until the sequence is done.
        row: row of the table of sequences with pages; None without pages.
        pages: pages that hold its keys and values, in order.
        sampling: how its tokens are drawn; None if it draws none.
        grammar: what its text may go on with; None without a grammar.
        awaits_mask: whether `grammar` is being updated on another thread.
        scores: number of best alternatives to each prompt token whose logprobs are wanted; None if none are wanted.
        skipped: number of leading tokens that its pooling leaves out.
        unknown: a token id that its adapter does not have; None if it has all.
        root: root of the hashes of its pages; None if it shares no pages.
        hashes: content hashes of its leading full pages; None if it shares no pages.
        published: number of leading pages that others may share.
        reads_cache: whether it may start with pages that others have computed.
        cached_tokens: number of prompt tokens that were found in the prefix cache when it first started.
        expected_cached: number of tokens of `need` that it is expected to find in the prefix cache when it starts.
        turn: sort key in the queue.
        lead: virtual time from this sequence's own turn to its request's, which the key has.
        beyond: whether its request exceeded its flow's allowance when it arrived.
    """

    buffer: NDArray[np.int32]
    adapter: AdapterRef | None
    flow: Flow
    arrived_s: float
    request: "Request"
    index: int = 0
    given: InitVar[int] = 0
    length: int = field(init=False)
    prompt: int = field(init=False)
    need: Need = field(init=False)
    computed: int = 0
    left: int = 1
    epoch: int = 0
    passes: int = 0
    awaited: int = 1
    compute_s: float = 0.0
    passed_over: int = 0
    solo: int = 0
    cancelled: bool = False
    finishing: bool = False
    slot: int | None = None
    adapted_from: int = 0
    holds_slot: bool = False
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    sampling: SamplingValues | None = None
    grammar: "TextGrammar | None" = None
    awaits_mask: bool = False
    scores: int | None = None
    skipped: int = 0
    unknown: int | None = None
    root: PrefixRoot | None = None
    hashes: list[bytes] | None = None
    published: int = 0
    reads_cache: bool = True
    cached_tokens: int | None = None
    expected_cached: int = 0
    turn: tuple[float, int] = field(default=(0.0, 0), init=False)
    lead: float = field(default=0.0, init=False)
    beyond: bool = field(default=False, init=False)

    def __post_init__(self, given: int) -> None:
        self.length = len(self.buffer)
        self.prompt = self.length - given

    @property
    def ids(self) -> NDArray[np.int32]:
        """Return the prompt, and the output tokens that have reached the host: int32 [length]."""
        return self.buffer[: self.length]

    @property
    def work(self) -> int:
        """Return the number of tokens that it is expected to compute before its first output."""
        return self.need.tokens - self.expected_cached

    @property
    def runs_alone(self) -> bool:
        """Whether it needs a step without decodes when it is the first of the queue."""
        return bool(self.solo) or (not self.need.divisible and self.passed_over >= PATIENCE)

    @property
    def is_new_text(self) -> bool:
        """Whether it is a text of several tokens that has no row yet."""
        return self.row is None and self.need.keeps_cache and self.need.outputs > 1

    @property
    def begins_within(self) -> bool:
        """Whether its adapter changes some of its tokens but not the first."""
        return 0 < self.adapted_from < self.length

    def slot_at(self, place: int) -> int | None:
        """Return the slot of the token at this index; None for the base model."""
        return self.slot if place >= self.adapted_from else None

    def append(self, token: int) -> None:
        """Add an output token that has reached the host."""
        length = self.length
        if length == len(self.buffer):
            known, self.buffer = self.buffer, np.empty(length + max(_MORE, length // 4), dtype=np.int32)
            self.buffer[:length] = known
        self.buffer[length] = token
        self.length = length + 1

    def begin(self, need: Need) -> None:
        """Set the work that is left, from the first token on."""
        self.need, self.left, self.awaited, self.computed = need, need.outputs, need.outputs, 0

    def void(self) -> None:
        """Drop the outputs of launched steps."""
        self.epoch += 1


def flow_of(adapter: AdapterRef | None, key_name: str = "") -> Flow:
    return Flow(adapter.name if adapter else "", key_name)


def count_requests(sequences: Iterable[Sequence]) -> int:
    return len({id(sequence.request) for sequence in sequences})


def adapter_names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({sequence.adapter.name for sequence in sequences if sequence.adapter is not None}))
