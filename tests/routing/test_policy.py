"""The settings of the routing policy."""

import math
from dataclasses import fields
from typing import Any

import pytest

from ranklet.routing.policy import RENAMED, Policy, check_policy

WRONG: list[tuple[str, Any]] = [
    ("extra_home_cost_s", -1), ("prefetch_wait_s", math.nan), ("max_load_per_home", 0),
    ("other_router_cost_s", math.inf), ("tie_window_s", "much"), ("eviction_cost_s", None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_value_out_of_range_is_refused_with_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Policy(**{field: value})
    [finding] = check_policy({field: value})
    assert finding.startswith(f"{field}: expected")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_name_is_refused_with_the_new_one(old: str, new: str) -> None:
    assert check_policy({old: 1.0}) == [f"{old}: renamed to {new}"]
    assert new in {each.name for each in fields(Policy)}
    assert old not in {each.name for each in fields(Policy)}


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    [finding] = check_policy({"extra_home_cost": 1.0})
    assert "did you mean extra_home_cost_s?" in finding


def test_every_finding_is_returned_and_valid_settings_have_none() -> None:
    assert len(check_policy({"spill": 1, "tie_window_s": -1, "scatter_s": 2, "max_load_per_home": 1})) == 3
    assert check_policy({each.name: getattr(Policy(), each.name) for each in fields(Policy)}) == []
