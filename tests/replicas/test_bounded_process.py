"""A program that was taken over, as a chat template may do that leaves its sandbox, harms nobody but itself."""

from pathlib import Path

import pytest

from ranklet.replicas.bounded_process import BoundedProcess

PROGRAM = """
import os, sys, time
channel = int(sys.argv[1])
os.write(channel, b"ready\\n")
while question := os.read(channel, 1 << 16)[:1]:
    if question == b"s":  # the next question is longer than what the socket keeps
        os.write(channel, b"{}\\n")
    if question in b"ls":
        time.sleep(600)
    while question == b"h":  # each piece comes in time
        os.write(channel, b"{")
        time.sleep(0.1)
    reply = {b"a": b'{"answer": 1}', b"n": b"[7]", b"d": b"[" * 60000, b"m": b"[" * (2 << 20)}[question] + b"\\n"
    while reply:
        reply = reply[os.write(channel, reply):]
"""
ENDED, LATE = "it ended the process that misbehaves", "it takes more than 2 s"


@pytest.mark.parametrize(
    ("questions", "why"),
    [
        pytest.param([b"n"], ENDED, id="no object"),
        pytest.param([b"d"], ENDED, id="deeply nested"),
        pytest.param([b"m"], ENDED, id="too long"),
        pytest.param([b"l"], LATE, id="no reply"),
        pytest.param([b"h"], LATE, id="half a reply"),
        pytest.param([b"s", b"a" * (8 << 20)], LATE, id="reads no question"),
    ],
)
def test_a_program_that_misbehaves_is_ended(
    questions: list[bytes], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "misbehaving_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    process = BoundedProcess(
        "misbehaving_program", "misbehaves", time_s=2.0, grace_s=0.0, memory_bytes=1 << 30, max_reply_bytes=1 << 20
    )
    *first, last = questions
    for question in first:
        assert process.ask("first", question) == {}
    assert process.ask("last", last) == {"error": why, "ends": True}
    assert process.ask("other", b"a") == {"answer": 1}
    process.stop()
