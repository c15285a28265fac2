"""What a body makes of memory is bounded before it is parsed, whatever stands in its texts."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.ingress import json_size
from ranklet.cluster.ingress.json_size import MAX_CONTAINERS, check_containers
from ranklet.replicas.errors import InvalidRequest

LETTERS = st.text(st.sampled_from('a"\\[{:,]}\u00e9'), max_size=12)
VALUES = st.recursive(
    LETTERS | st.integers(), lambda each: st.lists(each, max_size=4) | st.dictionaries(LETTERS, each, max_size=4)
)


def containers(value: Any) -> int:
    """Count lists, objects and names of fields."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(containers, value.values()))
    return 1 + sum(map(containers, value)) if isinstance(value, list) else 0


@given(VALUES, st.integers(1, 40))
def test_lists_objects_and_names_are_counted_and_texts_are_not(value: Any, chunk: int) -> None:
    body, count = json.dumps(value).encode(), containers(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_size, "_CHUNK_BYTES", chunk)  # texts and escapes go on in the next chunk
        patch.setattr(json_size, "MAX_CONTAINERS", count)
        check_containers(body)
        if count:
            patch.setattr(json_size, "MAX_CONTAINERS", count - 1)
            with pytest.raises(InvalidRequest, match=f"expected at most {count - 1} lists"):
                check_containers(body)


@pytest.mark.parametrize("value", ["[]", "{}", '{"":0}', "[[[0]]]"])
def test_a_body_full_of_small_values_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="Send several requests"):
        check_containers(f"[{','.join([value] * MAX_CONTAINERS)}]".encode())


def test_large_batches_of_texts_and_of_token_ids_pass() -> None:
    check_containers(orjson.dumps({"input": ['if (a[0]) { b: 1 } \\ "c" ' * 100] * 2048}))
    check_containers(orjson.dumps({"input": [[7] * 512] * 2048}))
