"""Grammars that cannot be enforced are refused, with the place."""

from typing import Any

import pytest
from llguidance import LLTokenizer

from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.grammar.refusal import refusal_of
from tests.assets.schemas import SchemaMaker

BYTES = LLTokenizer("byte")
TEXT = {"type": "string"}


def refusal(schema: Any) -> str | None:
    return refusal_of(Grammar.of_schema(schema), BYTES)


@pytest.mark.parametrize("seed", range(60))
def test_usual_schemas_are_accepted(seed: int) -> None:
    assert refusal(SchemaMaker(seed).make()) is None


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems: this keyword is not supported"),
        ({"properties": {"a/b": {"not": {}}}}, "#/properties/a~1b/not: this keyword is not supported"),
        ({"items": {"anyOf": [{}, {"contains": {}}]}}, "#/items/anyOf/1/contains: this keyword"),
        ({"if": TEXT, "then": TEXT}, "#/if: this keyword"),
        ({"$defs": {"x": {"propertyNames": {}}}, "$ref": "#/$defs/x"}, "#/$defs/x/propertyNames: this keyword"),
        ({"properties": {"a": {"dependentRequired": {}}}}, "#/properties/a/dependentRequired: this keyword"),
        ({"unevaluatedProperties": False}, "#/unevaluatedProperties: this keyword"),
        ({"properties": {"a": {"format": "zebra", **TEXT}}}, "#/properties/a: Unknown format: zebra"),
        ({"properties": {"a": {"pattern": "(?=a)", **TEXT}}}, "#/properties/a: regex parse error"),
        (
            {"type": "object", "properties": {"a": {"minLength": 3, "maxLength": 2, **TEXT}}, "required": ["a"]},
            "required property 'a' is unsatisfiable",
        ),
        ({"items": {"$ref": "#/$defs/none"}}, "#/items: Pointer '/$defs/none' does not exist"),
        ({"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}, "no text matches"),
        ({"oneOf": [TEXT, {"minLength": 3, **TEXT}]}, "oneOf"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "#/x-guidance: this keyword"),
        ({"items": {"x-guidance": {"lenient": True}}}, "#/items/x-guidance: this keyword"),
        ({"minProperties": 3, "required": ["a"]}, "#/minProperties: expected at most 2"),
        (
            {"items": {"properties": {"ab": TEXT}, "patternProperties": {"^a": {"type": "integer"}}}},
            "#/items/patternProperties: expected patterns that match no name",
        ),
        (
            {"patternProperties": {"^a": {}}, "allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"required": ["ab"]}}},
            "#/patternProperties: expected patterns that match no name",
        ),
        ({"patternProperties": {"^a": {"type": "integer"}, "b$": TEXT}}, "not disjoint"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "frob"}, "Invalid type"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_path(schema: Any, says: str) -> None:
    found = refusal(schema)
    assert found is not None
    assert says in found


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("json_schema", "{"), "expected JSON"),
        (Grammar("json_schema", "[]"), "is an object"),
        (Grammar("json_schema", "true"), "is an object"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", r"(a)\1"), "backreferences"),
        (Grammar("lark", "strt: x"), "no start rule"),
        (Grammar("lark", 'start: a\na: a "x"'), "no text matches"),
        (Grammar("lark", 'start: <|im_end|> "a"'), "special token"),
        (Grammar("lark", "start: " + "(" * 9000 + '"a"' + ")" * 9000), "nested"),
    ],
)
def test_other_grammars_are_refused_with_the_reason(grammar: Grammar, says: str) -> None:
    found = refusal_of(grammar, BYTES)
    assert found is not None
    assert says in found
    assert len(found) < 1100


@pytest.mark.parametrize(
    "grammar",
    [Grammar("regex", r"\d{3}-[a-z]+"), Grammar("lark", 'start: "a" start | "b"'), Grammar.of_choice(['a"\n', "é"])],
)
def test_other_grammars_are_accepted(grammar: Grammar) -> None:
    assert refusal_of(grammar, BYTES) is None
