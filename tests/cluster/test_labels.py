"""Only the busiest adapters have a label of their own."""

from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.labels import BASE, OTHER, UNKNOWN, AdapterLabels


@given(st.lists(st.text("abcdef", min_size=1, max_size=2), max_size=300), st.integers(1, 4))
def test_no_more_adapters_than_the_limit_have_a_label(adapters: list[str], limit: int) -> None:
    dropped: list[str] = []
    labels = AdapterLabels(limit, dropped.append)
    given_out = {labels.label(adapter) for adapter in adapters}
    assert len(given_out - {OTHER} - set(dropped)) <= limit
    assert labels.label(None) == labels.label("") == BASE


def test_a_busy_adapter_takes_the_label_of_a_less_busy_one() -> None:
    dropped: list[str] = []
    labels = AdapterLabels(1, dropped.append)
    assert labels.label("quiet") == "quiet"
    assert labels.label("busy") == OTHER
    assert labels.label("busy", 1000) == "busy"
    assert dropped == ["quiet"]
    assert labels.label("quiet") == OTHER


def test_no_adapter_shares_the_label_of_something_else() -> None:
    labels = AdapterLabels(10)
    names = [BASE, OTHER, UNKNOWN, f"name:{BASE}", "name:", "legal"]
    given_out = [labels.label(name) for name in names]
    assert len(set(given_out)) == len(names)
    assert not {BASE, OTHER, UNKNOWN} & set(given_out)
    assert given_out[-1] == "legal"
    assert [labels.current(label) for label in given_out] == given_out


def test_the_series_of_a_name_with_a_label_of_its_own_are_dropped_by_that_label() -> None:
    dropped: list[str] = []
    labels = AdapterLabels(1, dropped.append)
    label = labels.label(OTHER)
    labels.label("busy", 1000)
    assert dropped == [label]
