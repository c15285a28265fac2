"""Patterns of names, of API keys and quotas alike."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.names import matches, name_error, normal_name


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("legal-*", "legal-v2", True),
        ("legal-*", "legal-", True),
        ("legal-*", "xlegal-v2", False),
        ("legal-?", "legal-2", True),
        ("legal-?", "legal-22", False),
        ("org/*", "org/legal/v2", True),
        ("legal[v2]", "legal[v2]", True),
        ("legal[v2]", "legalv", False),
        ("legal[!v]*", "legalx", False),
        ("*[*", "a[b", True),
        ("Legal", "legal", False),
        ("cafe\u0301*", "caf\u00e9-v2", True),
    ],
)
def test_only_stars_and_question_marks_are_special_in_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, [name]) is expected


def test_a_pattern_matches_a_model_by_each_of_its_names() -> None:
    assert matches("org/*", ["base", "org/base"])
    assert not matches("org/*", ["base"])
    assert not matches("*", [])


@given(st.text(max_size=30))
def test_a_name_is_a_pattern_of_itself_only(text: str) -> None:
    name = normal_name(text)
    if name_error(name) is None:
        assert matches(name, [name])
        assert matches(unicodedata.normalize("NFD", name), [name])
        assert not matches(name, [name + "x", "x" + name])


@given(st.text(max_size=30))
def test_the_normal_form_of_a_name_is_stable(text: str) -> None:
    forms = {normal_name(form) for form in (text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")))}
    assert len(forms) == 1
