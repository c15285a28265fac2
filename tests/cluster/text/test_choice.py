"""Pieces of a choice: their text, their tokens, and where they end, however the tokens arrive."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.text.choice import NOTHING, ChoiceText, Logprob, TextPiece, TokenRecord
from ranklet.cluster.text.detokenizer import Detokenizer
from ranklet.cluster.text.stops import StopStrings
from tests.cluster.text.small_tokenizers import MAKERS, SPECIAL, id_of, make
from tests.cluster.text.test_detokenizer import ids, table
from tests.cluster.text.test_stops import first_match, held


@dataclass(frozen=True)
class DrawnChoice:
    name: str
    tokens: list[int]
    logprobs: list[Logprob]
    stops: list[str]
    end_ids: frozenset[int]
    include: bool
    skip: bool
    min_tokens: int = 0

    def choice(self) -> ChoiceText:
        return ChoiceText(
            Detokenizer(table(self.name), skip_special=self.skip), StopStrings(self.stops) if self.stops else None,
            end_ids=self.end_ids, include_stop=self.include, keeps_tokens=True, min_tokens=self.min_tokens,
        )  # fmt: skip

    def texts(self) -> tuple[list[str], list[bool], list[int]]:
        """Return the text that each token completes, whether a character is incomplete behind it, and the offsets.

        The last text is the one that is left at the end.
        """
        detokenizer = Detokenizer(table(self.name), skip_special=self.skip)
        texts, within, offsets = [], [], []
        made = 0
        for token in self.tokens:
            ends = token in self.end_ids
            texts.append(detokenizer.finish() if ends and not self.include else detokenizer.push(token))
            within.append(detokenizer.is_within_character)
            offsets.append(made + len(texts[-1]) if ends and not self.include else made)
            made += len(texts[-1])
            if ends:
                break
        return [*texts, detokenizer.finish()], within, offsets

    def first_match(self, texts: Sequence[str]) -> tuple[int, str] | None:
        """Return where the text ends and its stop, which lies behind the text of the first `min_tokens` tokens."""
        before = len("".join(texts[:-1][: self.min_tokens]))
        found = first_match("".join(texts)[before:], self.stops)
        return found and (before + found[0], found[1])


@st.composite
def stops(draw: st.DrawFn, text: str) -> list[str]:
    """Draw stops: parts of the text, whatever tokens they cross, and strings that begin like them or end like them."""
    cut = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6)).map(lambda at: text[at[0] : at[0] + at[1]])
    found = draw(st.lists(st.one_of(cut, st.just(text), st.sampled_from(["\ufffd", "e", "o f", "😀"])), max_size=3))
    for stop in found[: draw(st.integers(0, len(found)))]:
        kept = draw(st.integers(1, len(stop)))
        found.append(draw(st.sampled_from([stop[:kept], stop[-kept:], stop[:kept] + "\u20ac", stop + "x"])))
    return found


@st.composite
def choices(draw: st.DrawFn) -> DrawnChoice:
    name, skip = draw(st.sampled_from(sorted(MAKERS))), draw(st.booleans())
    tokens = draw(ids(name, 12))
    special = st.sampled_from([id_of(name, token) for token in SPECIAL])
    for at in draw(st.lists(st.integers(0, len(tokens)), max_size=2)):
        tokens = [*tokens[:at], draw(special), *tokens[at:]]
    text = make(name).decode(tokens, skip_special_tokens=skip) or "x"
    end_ids = draw(st.frozensets(st.sampled_from(tokens or [0]), max_size=1))
    logprobs: list[Logprob] = [(-float(i), ((i, -0.5),)) for i in range(len(tokens))]
    return DrawnChoice(
        name, tokens, logprobs, draw(stops(text)), end_ids, draw(st.booleans()), skip, draw(st.sampled_from([0, 0, 3]))
    )


@st.composite
def streams(draw: st.DrawFn) -> tuple[DrawnChoice, list[int]]:
    """Draw a choice, and where its tokens are cut into pushes."""
    drawn = draw(choices())
    return drawn, sorted(draw(st.lists(st.integers(0, len(drawn.tokens)), max_size=10)))


def stream(drawn: DrawnChoice, cuts: Sequence[int]) -> tuple[ChoiceText, list[TextPiece]]:
    choice = drawn.choice()
    parts = [slice(start, end) for start, end in zip([0, *cuts], [*cuts, len(drawn.tokens)], strict=True)]
    pieces = [choice.push(drawn.tokens[part], drawn.logprobs[part]) for part in parts]
    return choice, [*pieces, choice.finish("stop" if choice.end_token is not None else "length")]


def joined(pieces: Sequence[TextPiece]) -> tuple[str, list[TokenRecord]]:
    return "".join(piece.text for piece in pieces), [record for piece in pieces for record in piece.tokens]


@given(streams())
def test_the_text_ends_at_the_first_stop_or_end_token(drawn: tuple[DrawnChoice, list[int]]) -> None:
    case, cuts = drawn
    choice, pieces = stream(case, cuts)
    texts, _, _ = case.texts()
    whole = "".join(texts)
    match = case.first_match(texts)
    text, _ = joined(pieces)
    if match is not None:
        end, stop = match
        assert (text, choice.matched, choice.finish_reason) == (
            whole[: end if case.include else end - len(stop)], stop, "stop"
        )  # fmt: skip
    else:
        assert (text, choice.matched) == (whole, None)
        assert choice.finish_reason == ("length" if case.end_ids.isdisjoint(case.tokens) else "stop")


@given(streams())
def test_a_stream_equals_the_whole_answer(drawn: tuple[DrawnChoice, list[int]]) -> None:
    case, cuts = drawn
    streamed, pieces = stream(case, cuts)
    whole, answer = stream(case, [])
    assert joined(pieces) == joined(answer)
    for name in ("matched", "end_token", "used_tokens", "finish_reason"):
        assert getattr(streamed, name) == getattr(whole, name)


@given(streams())
def test_tokens_leave_with_their_text(drawn: tuple[DrawnChoice, list[int]]) -> None:
    case, cuts = drawn
    choice, pieces = stream(case, cuts)
    texts, within, offsets = case.texts()
    text, records = joined(pieces)
    ends = [sum(map(len, texts[: i + 1])) + within[i] for i in range(len(texts) - 1)]
    is_cut = choice.matched is not None
    shown = [
        i for i, offset in enumerate(offsets) if not is_cut or offset < len(text) or ends[i] <= len(text)
    ][: choice.used_tokens]  # fmt: skip
    assert records == [TokenRecord(case.tokens[i], offsets[i], *case.logprobs[i]) for i in shown]
    sent, left = 0, 0
    for piece, pushed in zip(pieces, [*cuts, len(case.tokens)], strict=False):
        sent += len(piece.text)
        left += len(piece.tokens)
        if not is_cut:
            assert left == sum(end <= sent for end in ends[:pushed])


@given(streams())
def test_only_the_beginning_of_a_stop_is_held_back(drawn: tuple[DrawnChoice, list[int]]) -> None:
    case = replace(drawn[0], min_tokens=0)
    choice = case.choice()
    texts, _, _ = case.texts()
    made = sent = ""
    for token, text in zip(case.tokens, texts, strict=False):
        made += text
        sent += choice.push([token]).text
        if choice.has_ended:
            break
        assert sent == made[: len(made) - held(made, case.stops)]


@given(streams())
def test_used_tokens_end_with_the_one_that_ends_the_text(drawn: tuple[DrawnChoice, list[int]]) -> None:
    case, cuts = drawn
    choice, _ = stream(case, cuts)
    texts, _, _ = case.texts()
    match = case.first_match(texts)
    ends = [sum(map(len, texts[: i + 1])) for i in range(len(texts) - 1)]
    expected = len(ends) if match is None else next((i + 1 for i, end in enumerate(ends) if end >= match[0]), len(ends))
    assert choice.used_tokens == expected


@given(streams(), st.integers(0, 10))
def test_an_echoed_prompt_begins_the_text(drawn: tuple[DrawnChoice, list[int]], prompt: int) -> None:
    """Its offsets, and a character that it shares with the output, are those of the whole."""
    case, _ = drawn
    plain = DrawnChoice(case.name, case.tokens, case.logprobs, [], frozenset(), case.include, case.skip)
    choice = plain.choice()
    echoed = choice.echo(case.tokens[:prompt], [None, *case.logprobs[1:prompt]][:prompt])
    rest = [choice.push(case.tokens[prompt:], case.logprobs[prompt:]), choice.finish("length")]
    text, records = joined([echoed, *rest])
    expected_text, expected = joined(stream(plain, [])[1])
    if prompt and expected:
        expected[0] = TokenRecord(expected[0].id, expected[0].offset)
    assert (text, records) == (expected_text, expected)
    assert choice.used_tokens == len(case.tokens[prompt:])


def word(text: str) -> list[int]:
    return make("byte_level").encode(text).ids


def test_a_stop_in_an_echoed_prompt_does_not_count() -> None:
    choice = ChoiceText(Detokenizer(table("byte_level")), StopStrings(["fox"]))
    assert choice.echo(word("the fox")).text == "the fox"
    assert choice.push(word(" jumps")).text == " jumps"
    assert choice.push(word(" fox")).text == " "
    assert choice.finish("length").text == ""
    assert (choice.matched, choice.finish_reason) == ("fox", "stop")


def test_a_shown_end_token_may_complete_a_stop() -> None:
    (end,) = word("x")
    choice = ChoiceText(Detokenizer(table("byte_level")), StopStrings(["x"]), end_ids=(end,), include_stop=True)
    assert choice.push([end]) == TextPiece("x")
    assert choice.finish("stop") == NOTHING
    assert (choice.end_token, choice.matched) == (end, "x")


def test_a_hidden_end_token_has_a_record_and_no_text() -> None:
    end = id_of("byte_level", "<|im_end|>")
    choice = ChoiceText(Detokenizer(table("byte_level"), skip_special=False), end_ids=(end,), keeps_tokens=True)
    piece = choice.push([*word("a"), end, *word("b")])
    assert piece.text == "a"
    assert [(record.id, record.offset) for record in piece.tokens] == [(word("a")[0], 0), (end, 1)]
    assert choice.finish("stop") == NOTHING
    assert choice.used_tokens == 2


def test_a_hidden_end_token_ends_an_incomplete_character() -> None:
    half, end = id_of("byte_fallback", "<0xE4>"), id_of("byte_fallback", "</s>")
    choice = ChoiceText(Detokenizer(table("byte_fallback")), end_ids=(end,), keeps_tokens=True)
    assert choice.push([half]) == NOTHING
    assert choice.push([end]) == TextPiece("\ufffd", (TokenRecord(half, 0), TokenRecord(end, 1)))


def test_tokens_are_left_out_where_nobody_asked() -> None:
    choice = ChoiceText(Detokenizer(table("byte_level")))
    assert choice.push(word("a")) == TextPiece("a")


def test_a_stop_may_cross_characters_of_several_tokens() -> None:
    """A stop ends within no character: the bytes of one that it does not contain leave as a whole."""
    sequence = [id_of("byte_fallback_unstripped", f"<0x{byte:02X}>") for byte in "a你😀b".encode()]
    for stop, include, text in (
        ("你😀", False, "a"),
        ("你😀", True, "a你😀"),
        ("😀b", False, "a你"),
        ("😃", False, "a你😀b"),
    ):
        choice = ChoiceText(
            Detokenizer(table("byte_fallback_unstripped")), StopStrings([stop, stop + "!"]), include_stop=include
        )
        made = "".join(choice.push([token]).text for token in sequence) + choice.finish("length").text
        assert (made, choice.matched) == (text, None if stop == "😃" else stop)


def test_a_shown_special_token_may_be_a_stop() -> None:
    end = id_of("byte_level", "<|im_end|>")
    for skip, text, stop in ((False, "a", "<|im_end|>"), (True, "ab", None)):
        choice = ChoiceText(Detokenizer(table("byte_level"), skip_special=skip), StopStrings(["<|im_end|>"]))
        made = choice.push([*word("a"), end, *word("b")]).text + choice.finish("length").text
        assert (made, choice.matched) == (text, stop)
