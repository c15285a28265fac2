"""Errors are found by their code, and pass between processes unchanged."""

import pickle

import pytest

from ranklet.replicas.errors import (
    MAX_MESSAGE_CHARS,
    AdapterChanged,
    AdapterLoadCrashed,
    InternalError,
    InvalidAdapter,
    InvalidRequest,
    RankletError,
    Saturated,
    StillLoading,
    error_class,
)


@pytest.mark.parametrize("kind", [InvalidRequest, Saturated, AdapterLoadCrashed, InternalError])
def test_an_error_class_is_found_by_its_code(kind: type[RankletError]) -> None:
    assert error_class(kind.code) is kind


def test_an_unknown_code_is_an_internal_error() -> None:
    assert error_class("a code of a later release") is InternalError


def test_an_error_without_a_code_of_its_own_shares_its_parents_code() -> None:
    assert (AdapterChanged.code, AdapterChanged.status) == (StillLoading.code, StillLoading.status)
    assert error_class(AdapterChanged.code) is StillLoading


def test_two_errors_cannot_have_the_same_code() -> None:
    with pytest.raises(TypeError, match="saturated"):
        type("AlsoSaturated", (RankletError,), {"code": Saturated.code})


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("dimensions: expected 32 to 128, got 5", param="dimensions"),
        InvalidAdapter("legal", ["no config", "no weights"]),
        Saturated("the queue is full", retry_after_s=2.5),
    ],
)
def test_an_error_is_the_same_after_pickling(error: RankletError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)


def test_a_message_has_a_length() -> None:
    message = InvalidAdapter("legal", ["x" * 1_000_000]).message
    assert len(message) < MAX_MESSAGE_CHARS + 100
    assert message.endswith("... (1000036 characters)")
