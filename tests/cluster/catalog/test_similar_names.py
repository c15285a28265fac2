"""Similar names are found among the names that may be shown, in bounded time."""

from ranklet.cluster.catalog.similar_names import similar_names
from ranklet.cluster.names import MAX_NAME_CHARACTERS


def test_similar_names_are_found() -> None:
    names = ["finance", "legal-v1", "legal-v2", "medical"]
    assert set(similar_names("legal", names, lambda name: True)[:2]) == {"legal-v1", "legal-v2"}
    assert similar_names("medicol", names, lambda name: True) == ["medical"]
    assert similar_names("zzzzz", names, lambda name: True) == []


def test_names_that_may_not_be_shown_are_left_out() -> None:
    assert similar_names("legal", ["legal-v1", "legal-v2"], lambda name: name.endswith("1")) == ["legal-v1"]


def test_of_many_names_few_are_looked_at() -> None:
    names, looked_at = sorted(f"{number:06}-{'x' * 190}" for number in range(50_000)), []

    def may_show(name: str) -> bool:
        looked_at.append(name)
        return name.startswith("0")

    assert similar_names("025000-" + "x" * 190, names, may_show)
    assert len(looked_at) <= 2000
    del looked_at[:]
    assert similar_names("9", names, lambda name: looked_at.append(name) or False) == []  # type: ignore[func-returns-value]
    assert len(looked_at) <= 2000


def test_no_name_is_similar_to_one_that_is_too_long() -> None:
    longest = "a" * MAX_NAME_CHARACTERS
    assert similar_names(longest, [longest], lambda name: True) == [longest]
    assert similar_names(longest + "a", [longest], lambda name: True) == []
