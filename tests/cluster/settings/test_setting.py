"""A faulty new content of a setting changes nothing, and is logged, counted and shown."""

import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from ranklet.cluster.settings.settings import Settings


class Memory:
    """Remembers contents as the actor does."""

    def __init__(self) -> None:
        self.contents: dict[str, Any] = {}

    def keep(self, name: str, content: object) -> None:
        self.contents[name] = content

    def repeat(self) -> None:
        pass

    def last(self, name: str) -> Any:
        return self.contents.get(name)


def fail(reason: str) -> str:
    raise ValueError(reason)


def exported(settings: Settings) -> tuple[float | None, float | None]:
    registry = CollectorRegistry()
    registry.register(settings)
    names = ("ranklet_setting_refused", "ranklet_setting_refusals_total")
    refused, refusals = (registry.get_sample_value(name, {"setting": "quota"}) for name in names)
    return refused, refusals


def test_a_refused_content_leaves_the_last_good_one_in_force_until_a_good_one_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = Settings()
    setting = settings.setting("quota", ValueError)
    assert setting.change(lambda: "one")
    assert (settings.refused(), exported(settings)) == ({}, (0, 0))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert not setting.change(lambda: fail("quota: expected 1, got 0"))
    assert (setting.content, settings.refused()) == ("one", {"quota": "quota: expected 1, got 0"})
    assert caplog.text.count("expected 1, got 0. The last good content stays in force") == 1
    assert exported(settings) == (1, 1)
    setting.change(lambda: fail("quota: expected 1, got -1"))
    assert exported(settings) == (1, 2), "another fault is another refusal"
    assert setting.change(lambda: "two")
    assert (setting.content, settings.refused(), exported(settings)) == ("two", {}, (0, 2))


def test_the_first_content_must_be_good() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="expected 1, got 0"):
        settings.setting("quota", ValueError).change(lambda: fail("quota: expected 1, got 0"))


def test_a_process_that_starts_with_a_faulty_content_gets_the_last_good_one_of_others() -> None:
    memory = Memory()
    Settings(memory).setting("quota", ValueError).change(lambda: "one")
    later = Settings(memory)
    setting = later.setting("quota", ValueError)
    assert not setting.change(lambda: fail("quota: expected 1, got 0"))
    assert (setting.content, list(later.refused())) == ("one", ["quota"])
    with pytest.raises(ValueError, match="expected 2"):
        later.setting("another", ValueError).change(lambda: fail("another: expected 2"))


def test_an_error_of_another_class_is_raised() -> None:
    setting = Settings().setting("quota", LookupError)
    setting.change(lambda: "one")
    with pytest.raises(ValueError, match="a defect"):
        setting.change(lambda: fail("a defect"))
