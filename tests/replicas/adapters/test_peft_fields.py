"""replicas/PEFT.md tells the truth about every field that PEFT has."""

import dataclasses
import inspect
from types import ModuleType

import peft
import pytest

from tests.replicas.adapters import test_classifiers, test_peft_config, test_verify
from tests.replicas.adapters.peft_fields import FIELDS, FILE, Followed, Refused, Unused, message, table
from tests.replicas.engine import test_activated_lora, test_column_terms, test_token_rows

_TESTS: tuple[ModuleType, ...] = (
    test_classifiers, test_peft_config, test_verify, test_column_terms, test_token_rows, test_activated_lora
)  # fmt: skip


def test_the_table_lists_the_fields_of_peft() -> None:
    assert list(FIELDS) == [field.name for field in dataclasses.fields(peft.LoraConfig)]
    assert FILE.read_text(encoding="utf-8") == table(), "run `python -m tests.replicas.adapters.peft_fields`"


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_treated_as_the_table_says(name: str) -> None:
    match FIELDS[name]:
        case Followed(test, _):
            assert any(inspect.isfunction(getattr(module, test, None)) for module in _TESTS)
        case Unused(example, _):
            assert message(name, example) == ""
        case Refused(example):
            assert message(name, example).startswith(f"{name}: ")
