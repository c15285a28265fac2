"""What the text of a chat's answer consists of: reasoning, content and calls of tools."""

from dataclasses import dataclass
from typing import NamedTuple

from ranklet.cluster.text.reasoning import Reasoning, Stage, ThinkTags
from ranklet.cluster.text.tool_calls import CallPiece, ToolCalls
from ranklet.cluster.text.tool_format import ToolFormat


class AnswerPiece(NamedTuple):
    """A part of an answer. Its calls stand anywhere beside its content."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallPiece, ...] = ()

    def joined(self, other: "AnswerPiece") -> "AnswerPiece":
        return AnswerPiece(self.reasoning + other.reasoning, self.content + other.content, self.calls + other.calls)


@dataclass(frozen=True)
class AnswerParts:
    """What an answer may consist of.

    Attributes:
        tags: of reasoning, in which no calls are looked for; None if the model does not think.
        stage: where the answer begins.
        separates: whether reasoning is no content.
        tool_format: of calls; None without tools.
        names: of the tools.
        most_calls: None for any number.
    """

    tags: ThinkTags | None = None
    stage: Stage = "start"
    separates: bool = False
    tool_format: ToolFormat | None = None
    names: frozenset[str] = frozenset()
    most_calls: int | None = None

    @property
    def is_content(self) -> bool:
        """Whether the whole text is content."""
        return self.tool_format is None and not self.separates


class SplitAnswer:
    """Splits the text of one answer, which arrives in pieces."""

    def __init__(self, parts: AnswerParts) -> None:
        self._separates = parts.separates
        self._reasoning = None
        if parts.tags is not None and not parts.is_content:
            self._reasoning = Reasoning(parts.tags, parts.stage, keeps_tags=not parts.separates)
        self._calls = None
        if parts.tool_format is not None:
            self._calls = ToolCalls(parts.tool_format, parts.names, parts.most_calls)

    @property
    def has_called(self) -> bool:
        """Whether there are calls, and all of them are complete."""
        return self._calls is not None and self._calls.made > 0 and self._calls.are_complete

    def push(self, text: str) -> AnswerPiece:
        """Add text. Returns what may leave now."""
        reasoning, text = self._reasoning.push(text) if self._reasoning else ("", text)
        return self._piece(reasoning, self._calls.push(text) if self._calls else [text])

    def finish(self) -> AnswerPiece:
        """Return the rest, since no more text follows."""
        reasoning, text = self._reasoning.finish() if self._reasoning else ("", "")
        return self._piece(reasoning, [*self._calls.push(text), *self._calls.finish()] if self._calls else [text])

    def _piece(self, reasoning: str, found: list[str | CallPiece]) -> AnswerPiece:
        content = "".join(each for each in found if isinstance(each, str))
        calls = tuple(each for each in found if isinstance(each, CallPiece))
        if self._separates:
            return AnswerPiece(reasoning, content, calls)
        return AnswerPiece("", reasoning + content, calls)
