"""Engine settings that are out of range are refused by name."""

from pathlib import Path
from typing import Any

import pytest

from ranklet.replicas.config import EngineConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": 0}, "slots: expected at least 1, got 0"),
        ({"max_rank": -1}, "max_rank"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"max_batch_requests": 0}, "max_batch_requests"),
        ({"max_waiting_tokens": 0}, "max_waiting_tokens"),
        ({"max_wait_s": 0.0}, "max_wait_s: expected more than 0 or null, got 0.0"),
        ({"max_adapters_per_batch": 0}, "max_adapters_per_batch"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"host_cache_bytes": -1}, "host_cache_bytes"),
        ({"kv_cache_fraction": 0.0}, "kv_cache_fraction: expected more than 0 and at most 0.98, got 0.0"),
        ({"kv_cache_fraction": 0.99}, "kv_cache_fraction"),
        ({"kv_cache_fraction": float("nan")}, "kv_cache_fraction"),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes: expected at least 0 or null, got -1"),
        ({"decode_slowdown": 0.9}, "decode_slowdown: expected at least 1, got 0.9"),
        ({"decode_slowdown": float("nan")}, "decode_slowdown"),
        ({"backend": "cuda"}, "backend: expected one of auto, fastest, native"),
        ({"dtype": "int8"}, "dtype"),
        ({"lora_modules": ("q_proj", "lm_tail")}, "lm_tail"),
    ],
)
def test_a_field_out_of_range_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
        EngineConfig(Path("model"), **fields)
    assert message in str(refused.value)


def test_model_dir_may_be_a_string() -> None:
    assert EngineConfig("model").model_dir == Path("model")  # type: ignore[arg-type]


@pytest.mark.parametrize(("slots", "asked", "mixed"), [(8, None, 8), (8, 3, 3), (2, 5, 2)])
def test_adapters_per_batch_never_exceed_the_slots(slots: int, asked: int | None, mixed: int) -> None:
    assert EngineConfig(Path("m"), slots=slots, max_adapters_per_batch=asked).adapters_per_batch == mixed
