"""Tests that lack a program are skipped by its name, and the end of a run counts them."""

import pytest

from tests import needs


def test_the_summary_counts_tests_by_what_they_need() -> None:
    reasons = [
        "Skipped: needs prometheus (apt install prometheus)",
        "Skipped: needs prometheus (apt install prometheus)",
        "Skipped: needs chromium (apt install chromium)",
        "Skipped: slow",
    ]
    assert needs.summary(reasons) == [
        "Not run: 1 test needs chromium (apt install chromium)",
        "Not run: 2 tests need prometheus (apt install prometheus)",
    ]


def test_a_missing_program_skips_marked_tests_and_users_of_a_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert needs.needs("redis-server").args == (True,)
    with pytest.raises(pytest.skip.Exception, match=r"needs redis-server \(apt install redis-server\)"):
        needs.require("redis-server")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert needs.needs("redis-server").args == (False,)
    needs.require("redis-server")
