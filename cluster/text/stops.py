"""Finds stop strings in text that arrives in pieces."""

from collections import deque
from collections.abc import Iterable
from typing import Final

from ranklet.replicas.errors import InvalidRequest

MAX_STOP_CHARS: Final = 8192  # of all stops together: each character takes 0.3 KB


class StopStrings:
    """The stop strings of a request, as an automaton (Aho and Corasick, 1975).

    A state stands for a prefix of a stop: the longest one that is a suffix of the text. The state's depth is the length
    of that prefix.

    Attributes:
        moves: of each state, the next state by character.
        fallbacks: of each state, the state of the longest proper suffix that is a prefix of a stop.
        depths: of each state.
        matches: of each state, the longest stop that the text ends with; None if it ends with none.
        letters: the first characters of the stops.

    Raises:
        InvalidRequest: a stop is empty, or the stops are too long.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.moves: list[dict[str, int]] = [{}]
        self.fallbacks = [0]
        self.depths = [0]
        self.matches: list[str | None] = [None]
        stops = tuple(stops)
        if not all(stops):
            raise InvalidRequest("stop: expected strings of at least one character, got an empty one", param="stop")
        length = sum(map(len, stops))
        if length > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop: expected at most {MAX_STOP_CHARS} characters in all strings together, got {length}",
                param="stop",
            )
        for stop in stops:
            self._add(stop)
        self._link()
        self.letters = frozenset(self.moves[0])

    def next(self, state: int, letter: str) -> int:
        while True:
            found = self.moves[state].get(letter)
            if found is not None:
                return found
            if not state:
                return 0
            state = self.fallbacks[state]

    def _add(self, stop: str) -> None:
        state = 0
        for letter in stop:
            found = self.moves[state].get(letter)
            if found is None:
                found = self.moves[state][letter] = len(self.moves)
                self.moves.append({})
                self.fallbacks.append(0)
                self.depths.append(self.depths[state] + 1)
                self.matches.append(None)
            state = found
        self.matches[state] = stop

    def _link(self) -> None:
        waiting = deque(self.moves[0].values())
        while waiting:
            state = waiting.popleft()
            for letter, found in self.moves[state].items():
                self.fallbacks[found] = fallback = self.next(self.fallbacks[state], letter)
                self.matches[found] = self.matches[found] or self.matches[fallback]
                waiting.append(found)


class StopScanner:
    """Holds text back while it may be the beginning of a stop.

    The text ends with the first character that completes a stop, however the text is cut into pieces. If it completes
    several, the longest one counts.

    Args:
        include: whether the stop itself is part of the text.

    Attributes:
        matched: the stop that ended the text.
    """

    def __init__(self, stops: StopStrings, *, include: bool = False) -> None:
        self.matched: str | None = None
        self._stops = stops
        self._include = include
        self._state = 0
        self._held = ""  # the longest suffix of the text that is a proper prefix of a stop

    def push(self, text: str) -> str:
        """Return the text that may leave now. After a match, there is no more text."""
        stops = self._stops
        if self.matched is not None:
            return ""
        if not self._state and stops.letters.isdisjoint(text):
            return text
        state = self._state
        for i, letter in enumerate(text):
            state = stops.next(state, letter)
            if stops.matches[state] is not None:
                return self._end(self._held + text[: i + 1], stops.matches[state] or "")
        self._state = state
        whole = self._held + text
        leaves = len(whole) - stops.depths[state]
        self._held = whole[leaves:]
        return whole[:leaves]

    def finish(self) -> str:
        """Return the text that was held back, since no more text follows."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _end(self, text: str, stop: str) -> str:
        self.matched, self._held = stop, ""
        return text if self._include else text[: -len(stop)]
