"""A faulty `user_config` is refused with a sentence that says what was expected, what was there, and what to do."""

from typing import Any

import pytest

from ranklet.cluster.config import AdapterList, GatewayUserConfig
from ranklet.cluster.settings.user_config import read_user_config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"adaptors": {}},
            r"unknown key 'adaptors' \(did you mean 'adapters'\?\)\. Known: adapters, tokens_per_minute",
        ),
        (
            {"tokens_per_minute": {"free-*": 0}},
            r"tokens_per_minute\.free-\*: expected a number greater than or equal to 1, got 0",
        ),
        (
            {"tokens_per_minute": {"free-*": "many"}},
            r"tokens_per_minute\.free-\*: expected a valid integer, got 'many'",
        ),
        (
            {"tokens_per_minute": {"free-*": True}},
            r"tokens_per_minute: free-\*: expected a number of at least 1, got true",
        ),
        ({"tokens_per_minute": {"free-*": None}}, r"tokens_per_minute\.free-\*: expected a valid integer, got None"),
        ({"tokens_per_minute": 5}, r"tokens_per_minute: expected a valid dictionary, got 5"),
        ({"adapters": "x"}, r"adapters: expected a valid dictionary, got 'x'"),
        ({"adapters": {1: "/x"}}, r"adapters\.1: expected a valid string, got 1"),
        ({"adapters": {"x": None}}, r"adapters\.x: expected a path, got None"),
        ({"adapters": [{"name": "x"}]}, r"adapters: expected a map of name to path, or a list"),
        ({"adapters": {"x": "s3://bucket/x"}}, r"adapters: x: expected a folder, got s3://bucket/x"),
        (["adapters"], r"expected a map, got \['adapters'\]"),
        ("adapters", r"expected a map, got 'adapters'"),
        (0, r"expected a map, got 0"),
    ],
)
def test_a_fault_is_named_with_its_remedy(content: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^user_config of the Gateway: {sentence}") as refused:
        read_user_config(GatewayUserConfig, content, "Gateway")
    assert str(refused.value).endswith("Correct it in the file and deploy the file again")
    assert "\n" not in str(refused.value)


def test_all_faults_are_named() -> None:
    content = {"tokens_per_minute": {"a-*": 0, "b-*": -5}}
    with pytest.raises(ValueError, match=r"a-\*: .* got 0; .*b-\*: .* got -5"):
        read_user_config(GatewayUserConfig, content, "Gateway")


def test_replicas_have_no_quotas() -> None:
    with pytest.raises(ValueError, match=r"^user_config of the Replica: unknown key 'tokens_per_minute'"):
        read_user_config(AdapterList, {"tokens_per_minute": {}}, "Replica")


@pytest.mark.parametrize("content", [None, {}, {"adapters": None, "tokens_per_minute": None}])
def test_a_removed_or_empty_content_sets_nothing(content: Any) -> None:
    assert read_user_config(GatewayUserConfig, content, "Gateway") == GatewayUserConfig()
