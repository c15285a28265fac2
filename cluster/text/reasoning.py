"""Splits a text into the reasoning between its tags and the answer behind them."""

import re
from dataclasses import dataclass
from typing import Final, Literal

from ranklet.cluster.text.tags import overlap

_MOST_SPACE: Final = 64  # characters before the first tag
_NEWLINES: Final = 2  # next to a tag, which belong to it
Stage = Literal["start", "reasoning", "answer"]


@dataclass(frozen=True)
class ThinkTags:
    """The texts around reasoning. They may be special tokens."""

    opens: str
    closes: str

    @property
    def texts(self) -> tuple[str, str]:
        return self.opens, self.closes

    def stage_after(self, prompt: str) -> Stage:
        """Return where the text that follows a prompt begins. Some templates open the reasoning, or leave it out."""
        end = prompt[-_MOST_SPACE - len(self.closes) :].rstrip()
        if end.endswith(self.opens):
            return "reasoning"
        return "answer" if end.endswith(self.closes) else "start"


_KNOWN: Final = (ThinkTags("<think>", "</think>"), ThinkTags("[THINK]", "[/THINK]"))


def tags_of(template: str) -> ThinkTags | None:
    """Return the tags of reasoning that a chat template names; None if it names none."""
    return next((tags for tags in _KNOWN if tags.closes in template), None)


class Reasoning:
    """Splits a text into reasoning and answer. The result does not depend on how the text is cut.

    Args:
        stage: where the text begins.
        keeps_tags: whether the tags are part of the reasoning.
    """

    def __init__(self, tags: ThinkTags, stage: Stage, *, keeps_tags: bool) -> None:
        self._tags = tags
        self._stage: Stage = stage
        self._keeps_tags = keeps_tags
        self._waiting = ""
        self._newlines = 0  # that may follow, and then belong to the last tag
        self._end = re.compile(rf"\n{{0,{_NEWLINES}}}{re.escape(tags.closes)}")
        self._ends = ["\n" * count + tags.closes for count in range(_NEWLINES, -1, -1)]

    def push(self, text: str) -> tuple[str, str]:
        """Add text. Returns the reasoning and the answer that may leave now."""
        if self._stage == "answer" and not self._newlines:
            return "", text
        text = self._waiting + text
        reasoning = ""
        if self._stage == "start":
            rest = text.lstrip(" \t\r\n")
            space = len(text) - len(rest)
            if space <= _MOST_SPACE and self._tags.opens.startswith(rest):
                self._waiting = text
                if rest != self._tags.opens:
                    return "", ""
            if space > _MOST_SPACE or not rest.startswith(self._tags.opens):
                self._stage, self._waiting = "answer", ""
                return "", text
            reasoning, text = self._drop(text, space + len(self._tags.opens))
            self._stage, self._newlines = "reasoning", _NEWLINES
        if self._stage == "reasoning":
            more, text = self._drop_newlines(text)
            reasoning += more
            found = self._end.search(text)
            if found is None:
                leaves = len(text) - max(overlap(text, each) for each in self._ends)
                self._waiting = text[leaves:]
                return reasoning + text[:leaves], ""
            reasoning += text[: found.start()]
            more, text = self._drop(text[found.start() :], found.end() - found.start())
            reasoning += more
            self._stage, self._newlines, self._waiting = "answer", _NEWLINES, ""
        more, text = self._drop_newlines(text)
        return reasoning + more, text

    def finish(self) -> tuple[str, str]:
        """Return the rest, since no more text follows."""
        rest, self._waiting = self._waiting, ""
        return (rest, "") if self._stage == "reasoning" else ("", rest)

    def _drop_newlines(self, text: str) -> tuple[str, str]:
        if not text:
            return "", ""
        count = 0
        while count < min(self._newlines, len(text)) and text[count] == "\n":
            count += 1
        self._newlines = self._newlines - count if count == len(text) else 0
        return self._drop(text, count)

    def _drop(self, text: str, length: int) -> tuple[str, str]:
        """Return what the reasoning keeps of the first characters, and the rest."""
        return text[:length] if self._keeps_tags else "", text[length:]
