"""Text of others is escaped where a terminal or a reader would take it for something else."""

import pickle

import pytest

from ranklet.replicas.errors import InvalidAdapter, InvalidRequest
from ranklet.replicas.escape import escape

SHOWN = (
    ("\x1b[31mred", r"\x1b[31mred"),
    ("\x9b31mred", r"\x9b31mred"),  # C1: what `\x1b[` does, in one character
    ("a\u202egpj.exe", r"a\u202egpj.exe"),
    ("\u2066isolated\u2069", r"\u2066isolated\u2069"),
    ("z\u200bw", r"z\u200bw"),
    ("l\u2028s\u2029p", r"l\u2028s\u2029p"),
    ("\ufeffmark", r"\ufeffmark"),
    ("tag\U000e0041", r"tag\U000e0041"),
    ("\udcff", r"\udcff"),
    ("a\nb\rc\x08\x7f", r"a\nb\rc\x08\x7f"),
)


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_what_does_not_show_as_itself_is_escaped(text: str, shown: str) -> None:
    assert escape(text) == shown
    assert escape(shown) == shown
    assert shown.isprintable()


@pytest.mark.parametrize("text", ["", "legal-v2", "café 日本語 <b> \\ '", "שלום مرحبا"])
def test_all_other_text_stays(text: str) -> None:
    assert escape(text) == text


def test_what_is_kept_stays_and_nothing_else() -> None:
    assert escape("a\n\tb\r\x1b", keep="\n\t") == "a\n\tb\\r\\x1b"


@pytest.mark.parametrize(("text", "shown"), SHOWN[:-1])
def test_messages_of_errors_are_escaped(text: str, shown: str) -> None:
    for error in (InvalidRequest(f"model: got {text}"), InvalidAdapter("x", [f"got {text}"])):
        for received in (error, pickle.loads(pickle.dumps(error))):
            assert shown in received.message
            assert shown in str(received)
            assert text not in received.message
    assert len(InvalidAdapter("x", ["one", "two"]).message.splitlines()) == 3
