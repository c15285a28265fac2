"""The sequences that hold pages, a row and their adapter's slot."""

from collections import Counter
from typing import TypeVar

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.decode_set import DecodeSet
from ranklet.replicas.engine.kv_space import next_page
from ranklet.replicas.engine.sequence import Flow, Sequence

Key = TypeVar("Key")


class Holders:
    """Sequences with pages, called holders.

    Attributes:
        all: in the order in which they started.
        decoding: those whose next pass computes one token, in any order.
        paused: those of them that are in no step until their last token and a mask are there.
        adapters: number of holders by adapter.
        flows: number of holders by flow.
        decoding_flows: number of decoding sequences by flow, without paused ones.
    """

    def __init__(self) -> None:
        self.all: dict[Sequence, None] = {}
        self.decoding: dict[Sequence, None] = {}
        self.paused = set[Sequence]()
        self.adapters: Counter[AdapterRef] = Counter()
        self.flows: Counter[Flow] = Counter()
        self.decoding_flows: Counter[Flow] = Counter()
        self._decode_set: DecodeSet | None = None  # None after a change

    def __len__(self) -> int:
        return len(self.all)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self.all

    def preemptible(self) -> list[Sequence]:
        """Return the sequences that have outputs left, in the order in which they started."""
        return [each for each in self.all if each.left and not each.cancelled]

    def undelivered(self) -> list[Sequence]:
        """Return the sequences whose outputs are not all delivered, also those whose last output is launched."""
        return [each for each in self.all if not each.cancelled]

    def pages_in_work(self) -> set[bytes]:
        """Return the content hashes of the pages that prompts with computed pieces compute next."""
        return {page for each in self.prompts() if (page := next_page(each)) is not None}

    def prompts(self) -> list[Sequence]:
        """Return the sequences of whose prompts some pieces are computed, but not the last."""
        return [each for each in self.all.keys() - self.decoding.keys() if each.left]

    def decode_set(self) -> DecodeSet:
        """Return the decoding sequences that are not paused, in the order in which they started."""
        if self._decode_set is None:
            ready = self.decoding.keys() - self.paused if self.paused else self.decoding
            self._decode_set = DecodeSet.of(each for each in self.all if each in ready)
        return self._decode_set

    def add(self, sequence: Sequence) -> None:
        self.all[sequence] = None
        self.flows[sequence.flow] += 1
        if sequence.adapter is not None:
            self.adapters[sequence.adapter] += 1

    def remove(self, sequence: Sequence) -> None:
        self.stop_decoding(sequence)
        del self.all[sequence]
        _decrease(self.flows, sequence.flow)
        if sequence.adapter is not None:
            _decrease(self.adapters, sequence.adapter)

    def start_decoding(self, sequence: Sequence) -> None:
        if sequence not in self.decoding:
            self.decoding[sequence] = self._decode_set = None
            self.decoding_flows[sequence.flow] += 1

    def stop_decoding(self, sequence: Sequence) -> None:
        if sequence in self.decoding:
            self.pause(sequence)
            self.paused.remove(sequence)
            del self.decoding[sequence]

    def pause(self, sequence: Sequence) -> None:
        """Leave a decoding sequence out of the next steps."""
        if sequence not in self.paused:
            self.paused.add(sequence)
            self._decode_set = None
            _decrease(self.decoding_flows, sequence.flow)

    def resume(self, sequence: Sequence) -> None:
        """Undo `pause`, if the sequence is still paused."""
        if sequence in self.paused:
            self.paused.remove(sequence)
            self._decode_set = None
            self.decoding_flows[sequence.flow] += 1


def _decrease(counter: Counter[Key], key: Key) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
