"""One step of the device: which tokens of which sequences it computes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ranklet.replicas.adapters.reference import AdapterRef

if TYPE_CHECKING:  # `sequence` imports this module, and `heads` imports torch
    from ranklet.replicas.engine.sequence import Sequence
    from ranklet.replicas.model.heads import Head


class Need(NamedTuple):
    """The next pass of a sequence.

    Attributes:
        tokens: number of tokens to compute, from `Sequence.computed` on. The queue uses it as the cost of the pass.
        head: computes the output from the hidden states of these tokens.
        keeps_cache: whether later passes read keys and values of these tokens.
        is_final: whether `Task.accept` returns `Done` for this pass, so that the slot is released before the delivery.
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


@dataclass(slots=True)
class StepPlan:
    """A proposed step. `Scheduler.commit` makes it take effect.

    Attributes:
        passed: queued sequences that are ready but did not fit into the step.
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
        self.parts.append(Part(sequence, sequence.computed, *sequence.need))
        self.tokens += sequence.need.tokens

    @property
    def sequences(self) -> list["Sequence"]:
        return [part.sequence for part in self.parts]

    @property
    def adapters(self) -> list[AdapterRef | None]:
        return [part.sequence.adapter for part in self.parts]
