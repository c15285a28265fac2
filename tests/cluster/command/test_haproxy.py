"""The program that starts HAProxy passes its arguments on, and never runs itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from ranklet.cluster.command.haproxy import PROGRAM_VARIABLE, write_haproxy
from tests.needs import require


def test_the_program_runs_the_given_haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRAM_VARIABLE, "/bin/echo")
    program = tmp_path / "new folder" / "haproxy"
    assert write_haproxy(program)
    done = subprocess.run([program, "-c", "an argument"], capture_output=True, text=True, check=True)
    assert done.stdout == "-c an argument\n"


def test_the_program_is_written_again_over_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("haproxy")
    program = tmp_path / "haproxy"
    monkeypatch.setenv(PROGRAM_VARIABLE, str(program))
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "ranklet.cluster.command.haproxy", program], check=True)
    done = subprocess.run([program, "-v"], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.startswith("HAProxy version")
