"""A simulated device. It writes a number for each token into pages, and draws a token from all numbers that it reads.

So a page that is stale, shared wrongly or of another adapter, a wrong slot or a lost token changes the text.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ranklet.replicas.adapters.invocation import NEVER, first_adapted
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.kv_space import KvSpace
from ranklet.replicas.engine.launched import LaunchedStep, OutputGroup
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.planned_spans import PlannedSpans
from ranklet.replicas.model.heads import Head

VOCAB = 40
END = 0  # the token that ends a text
WRONG = -1  # what a failed step writes
_MASK = (1 << 61) - 1


class SimulatedHead:
    """Passes on the outputs of the simulated device."""

    def __init__(self, *, reads_last: bool = True) -> None:
        self.reads_last = reads_last

    def results(self, arrays: Sequence[Any], count: int) -> Iterable[Any]:
        return list(arrays[0])[:count]


TEXT, LAST, MEAN = SimulatedHead(), SimulatedHead(), SimulatedHead(reads_last=False)


def numbers(last: int, tokens: Iterable[int], adapter: AdapterRef | None) -> list[int]:
    """Return the number of each token. It covers all tokens before, and the adapter that each is computed with.

    Args:
        last: number of the token before the first.
    """
    weights = zlib.crc32(adapter.revision.encode()) if adapter is not None else 1
    found = []
    for token in tokens:
        last = (last * 1_000_003 + weights * 50 + int(token)) & _MASK
        found.append(last)
    return found


def prompt_numbers(prompt: Sequence[int], adapter: AdapterRef | None) -> tuple[list[int], AdapterRef | None]:
    """Return the numbers of a prompt, and the adapter that the text after it is computed with."""
    first = 0 if adapter is None else first_adapted(np.array(prompt, np.int32), adapter.invocation)
    states = numbers(0, prompt[:first], None)
    return states + numbers(states[-1] if states else 0, prompt[first:], adapter), None if first == NEVER else adapter


def drawn(read: NDArray[np.int64]) -> int:
    return zlib.crc32(read.tobytes()) % VOCAB


def expected_text(prompt: Sequence[int], adapter: AdapterRef | None, most: int) -> list[int]:
    """Return the text that an engine must generate."""
    states, adapter = prompt_numbers(prompt, adapter)
    text: list[int] = []
    while len(text) < most and END not in text:
        text.append(drawn(np.array(states, np.int64)))
        states += numbers(states[-1], text[-1:], adapter)
    return text


class SimulatedDevice:
    def __init__(self, space: KvSpace, slots: int) -> None:
        self._table = space.table
        self._memory = np.full(space.pool.count * PAGE_TOKENS, WRONG, np.int64)
        self._last_token = np.zeros(space.table.filler + 1, np.int64)
        self.contents: list[AdapterRef | None] = [None] * slots  # None while the slot is written

    def launch(self, plan: StepPlan, slots: Sequence[int | None], *, fails: bool) -> LaunchedStep:
        """Compute a committed step at once. A step that fails writes wrong numbers and has no outputs."""
        outputs: dict[SimulatedHead, list[tuple[int, Any]]] = {TEXT: [], LAST: [], MEAN: []}
        rows = plan.decode_set.rows
        for item, (row, slot) in enumerate(zip(rows, self._table.slots[rows], strict=True)):
            position = int(self._table.lengths[row]) - 1
            read = self._write(row, position, [int(self._last_token[row])], None if slot < 0 else int(slot), fails)
            outputs[TEXT].append((item, drawn(read)))
            self._last_token[row] = drawn(read)
        planned = PlannedSpans.of(plan, slots)
        for item, (span, slot) in enumerate(zip(planned.spans, planned.slots, strict=True), len(rows)):
            head = cast(SimulatedHead | None, span.head)
            assert not (plan.uses_pages and head is MEAN)
            if span.row is not None:
                read = self._write(span.row, span.start, span.ids, slot, fails)
            else:
                assert span.start == 0
                read = np.array(numbers(0, span.ids, self._adapter(slot)), np.int64)
            if head is None:
                continue
            if head is TEXT:
                assert span.row is not None
                self._last_token[span.row] = drawn(read)
                outputs[head].append((item, drawn(read)))
            else:
                outputs[head].append((item, np.array([drawn(read)], np.float32)))
        groups = [
            OutputGroup(cast(Head, head), [item for item, _ in found], (cast(Tensor, [each for _, each in found]),))
            for head, found in outputs.items()
            if found
        ]
        return planned.by_part(LaunchedStep([] if fails else groups, "none", 0.0, 0.0, None), len(rows))

    def _adapter(self, slot: int | None) -> AdapterRef | None:
        if slot is None:
            return None
        assert self.contents[slot] is not None, "the slot holds no adapter"
        return self.contents[slot]

    def _write(self, row: int, start: int, tokens: Iterable[int], slot: int | None, fails: bool) -> NDArray[np.int64]:
        """Write tokens from position `start` on. Returns the numbers of all tokens up to the last one."""
        made = numbers(int(self._read(row, start)[-1]) if start else 0, tokens, self._adapter(slot))
        at = self._table.page_slots(row, np.arange(start, start + len(made), dtype=np.int32))
        self._memory[at] = WRONG if fails else made
        return self._read(row, start + len(made))

    def _read(self, row: int, length: int) -> NDArray[np.int64]:
        return self._memory[self._table.page_slots(row, np.arange(length, dtype=np.int32))]
