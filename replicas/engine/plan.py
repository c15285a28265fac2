"""One step of the device: which tokens of which sequences it computes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.decode_set import DecodeSet

if TYPE_CHECKING:  # `sequence` imports this module, and `heads` imports torch
    from ranklet.replicas.engine.sequence import Sequence
    from ranklet.replicas.model.heads import Head

_NO_DECODES = DecodeSet()


class Need(NamedTuple):
    """The work that is left for a sequence.

    Attributes:
        tokens: number of tokens to compute before the first output, from `Sequence.computed` on.
        head: computes the outputs from hidden states.
        outputs: number of outputs to compute. Each output but the last is a token, which the next pass computes.
        keeps_cache: whether later passes, or other spans of the same one, read keys and values of these tokens.
        divisible: whether the tokens may be computed in several steps.
    """

    tokens: int
    head: "Head"
    outputs: int = 1
    keeps_cache: bool = False
    divisible: bool = False


class Part(NamedTuple):
    """Tokens of one sequence in a step: `tokens` from `start` on, before its first output.

    Attributes:
        epoch: `Sequence.epoch` when the step was planned. The output is dropped if it has changed.
        head: None if the step does not compute all tokens that the first output needs.
        uses_pages: whether keys and values of these tokens are kept in pages.
    """

    sequence: "Sequence"
    epoch: int
    start: int
    tokens: int
    head: "Head | None"
    uses_pages: bool = False


@dataclass(slots=True)
class StepPlan:
    """A proposed step. `Scheduler.commit` makes it take effect.

    Attributes:
        decode_set: sequences that compute one token, which was their last output.
        parts: prompts and pieces of prompts.
        final: sequences whose last output this step computes. Set by `Scheduler.commit`.
        part_rows: row of each part; None without pages. Set by `Scheduler.commit`.
        started: sequences that get their row and pages in this step. Set by `Scheduler.commit`.
        preempted: sequences whose pages are taken away; they are computed again later.
        passed: queued sequences that are ready but did not fit into the step.
        cancelled: sequences whose request was dropped.
        demand: adapters of waiting sequences, oldest first.
        tokens: number of tokens of the step.
        uses_pages: whether the step reads or writes keys and values in pages.
        has_whole: whether it has prompts that cannot be divided. They run in steps without pages.
        cost: of the step; None if no flow floods while others have requests.
        leaves_flood: whether flooding flows were left out, so that the others' step is short.
        empty_rows_cost: part of the step's cost that falls on rows that stay empty, because texts that could start wait
            for others (`gathering.py`). 0 if none wait.
    """

    decode_set: DecodeSet = _NO_DECODES
    parts: list[Part] = field(default_factory=list)
    final: list["Sequence"] = field(default_factory=list)
    part_rows: list[int | None] = field(default_factory=list)
    started: list["Sequence"] = field(default_factory=list)
    preempted: list["Sequence"] = field(default_factory=list)
    passed: list["Sequence"] = field(default_factory=list)
    cancelled: list["Sequence"] = field(default_factory=list)
    demand: list[AdapterRef] = field(default_factory=list)
    tokens: int = 0
    uses_pages: bool = False
    has_whole: bool = False
    cost: float | None = None
    leaves_flood: bool = False
    empty_rows_cost: float = 0.0

    def add(self, part: Part) -> None:
        self.parts.append(part)
        self.uses_pages = self.uses_pages or part.uses_pages
        self.has_whole = self.has_whole or not part.sequence.need.divisible
        self.tokens += part.tokens

    def leave_prompts(self, empty_rows_cost: float) -> None:
        """Take all prompts out."""
        self.parts = []
        self.tokens, self.uses_pages, self.has_whole = len(self.decodes), bool(self.decodes), False
        self.empty_rows_cost = empty_rows_cost

    def decode(self, decode_set: DecodeSet) -> None:
        self.decode_set = decode_set
        self.uses_pages = self.uses_pages or bool(self.decodes)
        self.tokens += len(self.decodes)

    @property
    def decodes(self) -> list["Sequence"]:
        return self.decode_set.sequences

    @property
    def sequences(self) -> list["Sequence"]:
        return [*self.decodes, *(part.sequence for part in self.parts)]

    def drawing(self) -> Iterator["Sequence"]:
        """Yield the sequences that have an output in this step."""
        yield from self.decodes
        yield from (part.sequence for part in self.parts if part.head is not None)

    @property
    def adapters(self) -> list[AdapterRef]:
        decoded = self.decode_set.adapters
        if not self.parts:
            return decoded
        started = (part.sequence.adapter for part in self.parts)
        return list(dict.fromkeys((*decoded, *(each for each in started if each is not None))))

    @property
    def computes(self) -> bool:
        return bool(self.parts or self.decodes)

    @property
    def is_due(self) -> bool:
        """Whether the plan changes anything."""
        return bool(self.parts or self.decodes or self.cancelled or self.preempted)

    def members(self) -> Iterator[tuple["Sequence", int]]:
        """Yield each sequence and the epoch that it was planned in, decodes first."""
        yield from zip(self.decodes, self.decode_set.epochs, strict=True)
        for part in self.parts:
            yield part.sequence, part.epoch
