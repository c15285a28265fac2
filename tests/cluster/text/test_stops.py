"""Stops are found at their first end, and only text that may begin a stop is held back."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ranklet.cluster.text.stops import MAX_STOP_CHARS, StopScanner, StopStrings
from ranklet.replicas.errors import InvalidRequest

LETTERS = "ab😀"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)
TEXT = st.text(LETTERS + "c", max_size=30)


def first_match(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Return where the text ends and its longest stop, looking at each end from the left."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def held(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest suffix that is a proper prefix of a stop."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


@st.composite
def pieces(draw: st.DrawFn) -> list[str]:
    text = draw(TEXT)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(pieces(), STOPS, st.booleans())
@example(["abab", "a", "b😀"], ["abab😀", "b😀"], False)
@example(["aab"], ["aab", "ab", "b"], False)
@example(["aaaa"], ["aaaa"], True)
def test_the_text_ends_at_the_first_end_of_a_stop(parts: list[str], stops: list[str], include: bool) -> None:
    scanner = StopScanner(StopStrings(stops), include=include)
    text = "".join(parts)
    sent = "".join(map(scanner.push, parts)) + scanner.finish()
    match = first_match(text, stops)
    if match is None:
        assert (sent, scanner.matched) == (text, None)
    else:
        end, stop = match
        assert (sent, scanner.matched) == (text[: end if include else end - len(stop)], stop)


@given(pieces(), STOPS)
def test_only_the_beginning_of_a_stop_is_held_back(parts: list[str], stops: list[str]) -> None:
    scanner = StopScanner(StopStrings(stops))
    made = sent = ""
    for part in parts:
        made += part
        sent += scanner.push(part)
        if scanner.matched is not None:
            return
        assert len(made) - len(sent) == held(made, stops)


@given(STOPS)
def test_a_stop_that_is_the_whole_text(stops: list[str]) -> None:
    scanner = StopScanner(StopStrings(stops))
    shortest = min(stops, key=len)
    assert scanner.push(shortest) == scanner.finish() == ""
    assert scanner.matched == shortest


def test_nothing_leaves_behind_a_stop() -> None:
    scanner = StopScanner(StopStrings(["b"]), include=True)
    assert scanner.push("abc") == "ab"
    assert scanner.push("more") == scanner.finish() == ""


def test_choices_share_the_stops_of_a_request() -> None:
    stops = StopStrings(["ab"])
    first, second = StopScanner(stops), StopScanner(stops)
    assert (first.push("xa"), second.push("b")) == ("x", "b")
    assert first.push("b") == ""
    assert (first.matched, second.matched) == ("ab", None)


def too_long() -> Iterator[list[str]]:
    yield ["a" * (MAX_STOP_CHARS + 1)]
    yield ["a" * MAX_STOP_CHARS, "b"]


@pytest.mark.parametrize("stops", [[""], ["a", ""], *too_long()])
def test_unusable_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="stop: expected") as raised:
        StopStrings(stops)
    assert raised.value.param == "stop"


def test_a_text_that_repeats_the_beginning_of_a_long_stop_takes_linear_time() -> None:
    scanner = StopScanner(StopStrings(["a" * 4000 + "b"]))
    sent = "".join(scanner.push("a") for _ in range(20_000))
    assert len(sent) == 16_000
