"""Finds calls of tools in a text that arrives in pieces."""

import json
import re
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from ranklet.cluster.text.json_value import JsonValue
from ranklet.cluster.text.tags import overlap
from ranklet.cluster.text.tool_format import ToolFormat

_JSON_SPACE: Final = " \t\r\n"
_MOST_SPACE: Final = 64  # characters before a call, which leave with it
_MOST_HEAD: Final = 256  # characters of a call up to its arguments, if its keys have the usual order
_KEYS: Final = ("name", "arguments", "parameters", "type", "id", "function")
_SPACE: Final = r"[ \t\r\n]{0,20}"
_HEAD: Final = re.compile(
    rf'{_SPACE}\{{{_SPACE}"name"{_SPACE}:{_SPACE}"([a-zA-Z0-9_-]{{1,64}})"{_SPACE},'
    rf'{_SPACE}"(?:arguments|parameters)"{_SPACE}:{_SPACE}(?=\{{)'
)
_FIRST_KEY: Final = re.compile(rf'{_SPACE}\{{{_SPACE}"([^"\\\x00-\x1f]{{0,64}})"')


class CallPiece(NamedTuple):
    """A part of a call.

    Attributes:
        call: number of the call in the text.
        name: of the tool, in the first piece of the call; None in the others.
        arguments: more of the JSON of its arguments, as the model wrote it.
    """

    call: int
    name: str | None
    arguments: str


class ToolCalls:
    """Splits a text into calls and what stands beside them. The result does not depend on how the text is cut.

    A call becomes known with its name, and its arguments leave as they come: they are always the beginning of a JSON
    object. What is no call of a known tool stays text. White space around calls belongs to them.

    Args:
        names: of the tools.
        most: number of calls; further ones stay text. None for any number.

    Attributes:
        made: number of calls.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], most: int | None = None) -> None:
        self.made = 0
        self._ended = 0  # calls whose arguments have ended
        self._form = form
        self._names = names
        self._most = most
        self._waiting = ""  # text that is not understood yet
        self._passed: list[str] = []  # what stands before it, in case that it is no call
        self._begin = 0  # of the call in `_passed`
        self._call = JsonValue()
        self._scanned = 0  # characters of `_waiting` that `_call` has
        self._step: Callable[[], bool] = self._between
        self._found: list[str | CallPiece] = []

    @property
    def are_complete(self) -> bool:
        """Whether the arguments of each call have ended."""
        return self._ended == self.made

    def push(self, text: str) -> list[str | CallPiece]:
        """Add text. Returns the texts and pieces of calls that may leave now."""
        self._waiting += text
        while self._waiting and self._step():
            pass
        return self._take()

    def finish(self) -> list[str | CallPiece]:
        """Return the rest, since no more text follows."""
        if self._step != self._behind and not (self.made and self._is_formal()):
            self._found += [*self._passed, self._waiting]
        self._waiting = ""
        self._passed.clear()
        return self._take()

    def _take(self) -> list[str | CallPiece]:
        found = [each for each in self._found if each != ""]
        self._found = []
        return found

    # Each step reads the beginning of what waits. It returns whether to go on: False waits for more text.

    def _between(self) -> bool:
        """Read the beginning of the text, or what follows a call."""
        form = self._form
        rest = self._waiting.lstrip(self._separators())
        if len(self._waiting) - len(rest) <= _MOST_SPACE and self._may_call():
            if rest.startswith(form.opens):
                return self._open(len(self._waiting) - len(rest) + len(form.opens))
            if form.is_bare and rest.startswith("{"):
                return self._open(len(self._waiting) - len(rest))
            if form.opens.startswith(rest):
                return False
        self._step = self._text
        return True

    def _text(self) -> bool:
        if not self._may_call():
            self._leave(len(self._waiting))
            return False
        at = self._waiting.find(self._form.opens)
        if at < 0:
            self._leave(len(self._waiting) - overlap(self._waiting, self._form.opens))
            return False
        self._leave(at)
        return self._open(len(self._form.opens))

    def _open(self, length: int) -> bool:
        self._pass(length)
        self._begin_call(self._list if self._form.is_list else self._head)
        return True

    def _list(self) -> bool:
        rest = self._waiting.lstrip(_JSON_SPACE)
        space = len(self._waiting) - len(rest)
        if space > _MOST_SPACE or (rest and rest[0] != "["):
            return self._refuse(0)
        if rest:
            self._pass(space + 1)
            self._step = self._head
        return bool(rest)

    def _head(self) -> bool:
        """Read a call up to its arguments, or as a whole if its keys have another order."""
        head = _HEAD.match(self._waiting)
        if head is not None:
            if head[1] not in self._names:
                return self._refuse(head.end())
            self._begin_arguments(head[1])
            self._call = JsonValue()
            self._call.push(head[0])
            self._waiting = self._waiting[head.end() :]
            self._step = self._arguments
            return True
        key = _FIRST_KEY.match(self._waiting)
        if key is not None and key[1] not in _KEYS:
            return self._refuse(key.end())
        self._scanned += self._call.push(self._waiting[self._scanned :])
        if not (self._call.is_complete or self._call.is_broken or self._scanned > _MOST_HEAD):
            return False
        self._begin = len(self._passed)
        self._pass(self._scanned)
        self._step = self._object
        return self._object()

    def _object(self) -> bool:
        """Read a call whose keys have another order up to its end."""
        if not (self._call.is_complete or self._call.is_broken):
            self._pass(self._call.push(self._waiting))
        if self._call.is_broken:
            return self._refuse(0)
        if not self._call.is_complete:
            return False
        found = _call_of("".join(self._passed[self._begin :]))
        if found is None or found[0] not in self._names:
            return self._refuse(0)
        self._begin_arguments(found[0])
        self._found.append(CallPiece(self.made - 1, None, found[1]))
        self._ended += 1
        self._end_call()
        return True

    def _arguments(self) -> bool:
        length = self._call.push(self._waiting, until_depth=1)
        if length:
            self._found.append(CallPiece(self.made - 1, None, self._waiting[:length]))
            self._waiting = self._waiting[length:]
        if self._call.depth == 1:
            self._ended += 1
            self._step = self._behind
            return True
        if self._call.is_broken:
            self._step = self._text
            return True
        return False

    def _behind(self) -> bool:
        """Read the rest of a call behind its arguments."""
        length = self._call.push(self._waiting)
        self._pass(length)
        if self._call.is_complete:
            self._end_call()
        elif self._call.is_broken:
            return self._refuse(0)
        return True

    def _end_call(self) -> None:
        self._passed.clear()
        self._step = self._close if self._form.closes else self._between

    def _close(self) -> bool:
        """Read what ends a call, or a list of calls."""
        closes = self._form.closes
        rest = self._waiting.lstrip(_JSON_SPACE)
        space = len(self._waiting) - len(rest)
        if space > _MOST_SPACE:
            self._step = self._text
        elif rest.startswith(closes):
            self._waiting = rest[len(closes) :]
            self._step = self._between
        elif closes.startswith(rest):
            return False
        elif self._form.is_list and rest[0] == "," and self._may_call():
            self._pass(space + 1)
            self._begin_call(self._head)
        else:
            self._step = self._between
        return True

    def _may_call(self) -> bool:
        return self._most is None or self.made < self._most

    def _begin_call(self, step: Callable[[], bool]) -> None:
        self._call, self._scanned = JsonValue(), 0
        self._step = step

    def _begin_arguments(self, name: str) -> None:
        self._found.append(CallPiece(self.made, name, ""))
        self._passed.clear()
        self.made += 1

    def _pass(self, length: int) -> None:
        self._passed.append(self._waiting[:length])
        self._waiting = self._waiting[length:]

    def _leave(self, length: int) -> None:
        self._found.append(self._waiting[:length])
        self._waiting = self._waiting[length:]

    def _refuse(self, length: int) -> bool:
        """Let what was passed and the next characters be text."""
        self._pass(length)
        self._found += self._passed
        self._passed.clear()
        self._step = self._text
        return True

    def _separators(self) -> str:
        return f"{_JSON_SPACE};" if self._form.is_bare and self.made else _JSON_SPACE

    def _is_formal(self) -> bool:
        """Return whether the last characters, which follow a call, only end or separate calls."""
        rest = self._waiting.lstrip(self._separators())
        return (self._step == self._close and self._form.closes.startswith(rest)) or (
            self._step == self._between and not rest
        )


def _call_of(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments of a call; None for JSON that is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    if isinstance(call.get("function"), dict):  # as OpenAI writes a call
        call = call["function"]
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not (isinstance(arguments, str) and _is_object(arguments)):
        return None
    return (name, arguments) if isinstance(name, str) else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
