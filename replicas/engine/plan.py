"""One step of the device: which tokens of which sequences it computes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ranklet.replicas.adapters.reference import AdapterRef

if TYPE_CHECKING:  # the process that owns no device imports these types without torch
    from ranklet.replicas.engine.sequence import Sequence
    from ranklet.replicas.model.heads import Head


class Need(NamedTuple):
    """The next pass of a sequence.

    Attributes:
        tokens: number of tokens to compute, from `Sequence.computed` on. It is also the cost of the pass in the queue.
        head: turns the hidden states of these tokens into an output.
        keeps_cache: whether later passes read keys and values of these tokens.
        is_final: whether the sequence is done after this pass. Its slot is then released as soon as the device is done.
    """

    tokens: int
    head: "Head"
    keeps_cache: bool = False
    is_final: bool = False


class Part(NamedTuple):
    """The tokens of one sequence in a step: `tokens` from `start` on."""

    sequence: "Sequence"
    start: int
    tokens: int
    head: "Head"
    keeps_cache: bool
    is_final: bool

    @classmethod
    def of(cls, sequence: "Sequence") -> "Part":
        return cls(sequence, sequence.computed, *sequence.need)


@dataclass(slots=True)
class StepPlan:
    """A proposed step. Nothing has changed until `Scheduler.commit`.

    Attributes:
        parts: the work of the step.
        passed: sequences that are ready and not in the step.
        cancelled: sequences whose request was dropped.
        demand: adapters of waiting sequences, oldest first.
        tokens: sum of the parts' tokens.
    """

    parts: list[Part] = field(default_factory=list)
    passed: list["Sequence"] = field(default_factory=list)
    cancelled: list["Sequence"] = field(default_factory=list)
    demand: list[AdapterRef] = field(default_factory=list)
    tokens: int = 0

    def add(self, sequence: "Sequence") -> None:
        part = Part.of(sequence)
        self.parts.append(part)
        self.tokens += part.tokens

    @property
    def sequences(self) -> list["Sequence"]:
        return [part.sequence for part in self.parts]

    @property
    def adapters(self) -> list[AdapterRef | None]:
        """Each part's adapter; None for the base model."""
        return [part.sequence.adapter for part in self.parts]
