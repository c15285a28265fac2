"""The spans of a planned step. A part with tokens before and after its adapter's first becomes two spans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ranklet.replicas.engine.launched import LaunchedStep
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.plan import Part, StepPlan


@dataclass(frozen=True, slots=True)
class PlannedSpans:
    """What a step's parts compute.

    Attributes:
        slots: pool slot of each span's adapter; None for the base model.
        parts: index of each span's part.
    """

    spans: list[TokenSpan]
    slots: list[int | None]
    parts: list[int]

    @classmethod
    def of(cls, plan: StepPlan, slots: Sequence[int | None]) -> "PlannedSpans":
        """Return the spans of a committed plan.

        Args:
            slots: pool slot of the adapter of each of `plan.parts`; None for the base model.
        """
        made = cls([], [], [])
        rows = plan.part_rows or [None] * len(plan.parts)
        for index, (part, row, slot) in enumerate(zip(plan.parts, rows, slots, strict=True)):
            before = part.sequence.adapted_from - part.start
            if before <= 0:
                made._add(index, part, row, slot)
            elif before >= part.tokens:
                made._add(index, part, row, None)
            else:
                assert row is not None, "the second span reads the keys of the first from pages"
                made._add(index, part._replace(tokens=before, head=None), row, None)
                made._add(index, part._replace(start=part.start + before, tokens=part.tokens - before), row, slot)
        return made

    def _add(self, index: int, part: Part, row: int | None, slot: int | None) -> None:
        self.spans.append(_span(part, row))
        self.slots.append(slot)
        self.parts.append(index)

    def by_part(self, launched: LaunchedStep, decodes: int) -> LaunchedStep:
        """Return a step of these spans, behind as many decodes, whose outputs name parts in place of spans."""
        if not self.parts or self.parts[-1] + 1 == len(self.parts):
            return launched

        def owner(item: int) -> int:
            return item if item < decodes else decodes + self.parts[item - decodes]

        groups = [replace(group, members=[*map(owner, group.members)]) for group in launched.groups]
        return replace(launched, groups=groups)


def _span(part: Part, row: int | None) -> TokenSpan:
    sequence, end = part.sequence, part.start + part.tokens
    span = TokenSpan(sequence.ids[part.start : end], part.start, part.head, row, skipped=sequence.skipped)
    if sequence.scores is None or part.start + 1 >= sequence.prompt:
        return span
    scored = sequence.ids[part.start + 1 : min(end + 1, sequence.prompt)]
    return span._replace(scored=scored, top=sequence.scores)
