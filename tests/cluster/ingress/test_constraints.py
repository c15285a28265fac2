"""Fields that say what texts must be: each is honoured or refused by name, and a check precedes every call."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import create_autospec

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranklet.cluster.ingress.known_fields import COMPLETION_FIELDS
from ranklet.cluster.ingress.text_task import CompletionsTask
from ranklet.cluster.ingress.texts import TextModels
from ranklet.cluster.message import InferenceCall
from ranklet.cluster.replica.ranklet_file import RankletFile, read_ranklet_file
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.grammar.constraint import Constraint
from ranklet.replicas.grammar.grammar import Grammar
from tests.cluster.ingress.text_parts import DescribingReplica, TextParts
from tests.cluster.ingress.text_replica import TextReplica, reply
from tests.cluster.text_client import CHAT, COMPLETIONS

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
OF_SCHEMA = Grammar.of_schema(SCHEMA)
ANY_OBJECT = Grammar.of_schema({"type": "object"})
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "strict": False, "schema": SCHEMA}}
PATIENCE_S = 20.0  # 2 s are allowed, but a busy machine runs the tests
LARK = 'start: "a" start | "b"'


def constraint_of(fields: dict[str, Any]) -> Constraint | None:
    texts: TextModels = create_autospec(TextModels, instance=True)
    return CompletionsTask.parse(texts, orjson.dumps({"prompt": "a", **fields})).fields.constraint()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        (
            {"response_format": None, "guided_json": {}, "regex": "", "guided_choice": [], "structured_outputs": {}},
            None,
        ),
        ({"response_format": {"type": "text"}}, Constraint("response_format", None)),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, Constraint("guided_regex", Grammar("regex", "a"))),
        ({"response_format": {"type": "json_object"}}, Constraint("response_format", ANY_OBJECT)),
        ({"response_format": FORMAT}, Constraint("response_format.json_schema.schema", OF_SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, Constraint("structured_outputs.json", OF_SCHEMA)),
        ({"structured_outputs": {"json": "{}"}}, Constraint("structured_outputs.json", Grammar("json_schema", "{}"))),
        ({"structured_outputs": {"json_object": True}}, Constraint("structured_outputs.json_object", ANY_OBJECT)),
        (
            {"structured_outputs": {"regex": "a+", "json": None}},
            Constraint("structured_outputs.regex", Grammar("regex", "a+")),
        ),
        (
            {"structured_outputs": {"choice": ["a", 'b"'], "disable_fallback": True}},
            Constraint("structured_outputs.choice", Grammar("lark", r'start: "a" | "b\""')),
        ),
        ({"structured_outputs": {"grammar": LARK}}, Constraint("structured_outputs.grammar", Grammar("lark", LARK))),
        ({"guided_json": SCHEMA}, Constraint("guided_json", OF_SCHEMA)),
        ({"guided_regex": "a+"}, Constraint("guided_regex", Grammar("regex", "a+"))),
        ({"guided_choice": ["a"]}, Constraint("guided_choice", Grammar("lark", 'start: "a"'))),
        ({"guided_grammar": LARK}, Constraint("guided_grammar", Grammar("lark", LARK))),
        ({"json_schema": "{}"}, Constraint("json_schema", Grammar("json_schema", "{}"))),
        ({"regex": "a+"}, Constraint("regex", Grammar("regex", "a+"))),
    ],
)
def test_each_field_is_honoured(fields: dict[str, Any], expected: Constraint | None) -> None:
    assert constraint_of(fields) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type: expected text, json_object or json_schema"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.type: expected"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema: this field"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema: expected null"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema: expected"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": True}}}, "response_format.json_schema."),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
            "json_schema.x: this field",
        ),
        ({"response_format": "json"}, "response_format: "),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs: expected exactly one of"),
        ({"structured_outputs": {"disable_fallback": True}}, "structured_outputs: expected exactly one of"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json: expected a JSON schema"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex: expected a text"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]: expected a text"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: expected a list"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object: expected true"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern: this",
        ),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "disable_any_whitespace: this field"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag: this field"),
        ({"structured_outputs": {"ebnf": "a"}}, "structured_outputs.ebnf: expected one of"),
        ({"guided_grammar": 'root ::= "a"'}, "guided_grammar: expected a grammar in Lark's form"),
        ({"guided_grammar": "start: %json {}"}, "guided_grammar: expected no schema within the grammar"),
        ({"guided_regex": "a", "regex": "b"}, "regex: expected null beside guided_regex"),
        ({"response_format": FORMAT, "guided_json": SCHEMA}, "guided_json: expected null beside response_format"),
        ({"guided_regex": 5}, "guided_regex: "),
        ({"ebnf": "a"}, "ebnf: this field is not supported"),
        ({"structural_tag": {"a": 1}}, "structural_tag: this field is not supported"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend: this field is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        constraint_of(fields)
    assert says in caught.value.message
    assert caught.value.param in fields


def test_no_field_is_refused_and_honoured() -> None:
    assert not {"response_format", "structured_outputs", "regex"} & set(COMPLETION_FIELDS.refused)


async def answers(replica: TextReplica, call: InferenceCall[GenerateParams]) -> Any:
    replica.begin(call.number)
    return reply((11, 12))


@pytest.fixture(scope="module")
async def parts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TextParts]:
    made = TextParts(tmp_path_factory.mktemp("gateway"), DescribingReplica(*[answers] * 10_000))
    yield made
    made.close()


def fields_of(path: str, **more: Any) -> dict[str, Any]:
    prompt = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    return {"model": "base", "max_tokens": 2, **prompt} | more


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_grammar_reaches_the_replica(parts: TextParts, path: str) -> None:
    for _ in range(2):  # checked, and known
        answer = await parts.http_post(path, fields_of(path, response_format=FORMAT))
        assert answer.status_code == 200, answer.text
        assert parts.replica.calls[-1].params.grammar == OF_SCHEMA


@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_enforced_is_refused_with_its_path(parts: TextParts, *, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for _ in range(2):
        called = len(parts.replica.calls)
        answer = await parts.http_post(COMPLETIONS, fields_of(COMPLETIONS, guided_json=schema, stream=stream))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "guided_json")
        assert error["message"].startswith("guided_json: #/properties/a/uniqueItems: this keyword is not supported")
        assert len(parts.replica.calls) == called


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, OF_SCHEMA),
        ({"response_format": {"type": "text"}}, None),
        ({"regex": "a+"}, Grammar("regex", "a+")),
    ],
)
async def test_an_adapters_constraint_holds_unless_the_request_has_one(
    tmp_path: Path, fields: dict[str, Any], expected: Grammar | None
) -> None:
    (tmp_path / "legal-v2").mkdir()
    replica = DescribingReplica(answers)
    replica.constraint = Constraint("response_format of the adapter's ranklet.json", OF_SCHEMA)
    parts = TextParts(tmp_path, replica)
    answer = await parts.http_post(COMPLETIONS, fields_of(COMPLETIONS, **fields, model="legal-v2"))
    parts.close()
    assert answer.status_code == 200, answer.text
    assert replica.calls[-1].params.grammar == expected


async def test_ignore_eos_beside_a_grammar_is_refused(parts: TextParts) -> None:
    answer = await parts.http_post(COMPLETIONS, fields_of(COMPLETIONS, regex="a", ignore_eos=True))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "ignore_eos")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 99)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
KEYWORDS = (
    "type", "properties", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "required", "pattern",
    "minLength", "maxLength", "minimum", "maximum", "multipleOf", "additionalProperties", "patternProperties", "format",
    "prefixItems", "minItems", "maxItems", "not", "if", "$schema", "$id", "x-guidance", "minProperties",
)  # fmt: skip
TYPES = st.sampled_from(("string", "object", "array", "integer", "number", "null", "boolean", "#", "#/$defs/a"))
SCHEMAS = st.recursive(
    JSON | TYPES,
    lambda inner: st.dictionaries(st.sampled_from((*KEYWORDS, "a")), inner | st.lists(inner, max_size=3), max_size=4),
    max_leaves=15,
)
PIECES = (*'abc019()[]{}|*+?.^$\\/"-:,%<> \n;=&~ü', "start", "x: ", "{1,9999}", "\\d", "(?:", "[^")
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    fields=st.one_of(
        st.builds(lambda schema: {"guided_json": schema}, SCHEMAS),
        st.builds(
            lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}, SCHEMAS
        ),
        st.builds(lambda text: {"json_schema": text}, TEXTS),
        st.builds(lambda text: {"regex": text}, TEXTS),
        st.builds(lambda text: {"guided_grammar": f"start: x\nx: {text}"}, TEXTS),
        st.builds(lambda texts: {"structured_outputs": {"choice": texts}}, st.lists(TEXTS, max_size=4)),
        st.builds(lambda value: {"structured_outputs": value}, JSON),
        st.builds(lambda value: {"response_format": value}, JSON),
    )
)
async def test_no_grammar_is_a_failure_of_the_server(parts: TextParts, fields: dict[str, Any]) -> None:
    """Any schema, regular expression or grammar is served or refused, soon."""
    parts.texts.checks.checker.start()
    began_s = monotonic()
    try:
        answer = await parts.http_post(
            COMPLETIONS, json.loads(json.dumps(fields_of(COMPLETIONS, **fields), allow_nan=False))
        )
    except ValueError:
        return  # JSON has no NaN
    assert answer.status_code in (200, 400), answer.text
    assert monotonic() - began_s < PATIENCE_S
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] in fields


@pytest.mark.parametrize(
    "fields",
    [
        {
            "guided_json": {
                "allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(6)]} for i in range(12)]
            }
        },
        {"regex": "(" * 5000 + "a" + ")" * 5000},
        {"regex": "((a{1,1000}){1,1000}){1,1000}b"},
        {"guided_grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000},
        {"guided_choice": ["a" * 100] * 4097},
        {"guided_json": json.dumps({"enum": ["x" * 100] * 5000})},
    ],
)
async def test_bombs_are_served_or_refused_soon(parts: TextParts, fields: dict[str, Any]) -> None:
    parts.texts.checks.checker.start()
    began_s = monotonic()
    answer = await parts.http_post(COMPLETIONS, fields_of(COMPLETIONS, **fields))
    assert answer.status_code in (200, 400)
    assert monotonic() - began_s < PATIENCE_S
    again = await parts.http_post(COMPLETIONS, fields_of(COMPLETIONS, regex="[0-9]+"))
    assert again.status_code == 200


def test_an_adapters_folder_may_constrain_its_texts(tmp_path: Path) -> None:
    assert read_ranklet_file(tmp_path) == RankletFile()
    (tmp_path / "ranklet.json").write_text(json.dumps({"response_format": FORMAT, "tool_format": "mistral"}))
    found = read_ranklet_file(tmp_path)
    assert found.constraint is not None
    assert found.constraint.grammar == OF_SCHEMA
    assert found.tool_format == "mistral"
    for content, says in (
        ("{", "expected JSON"),
        ("[]", "expected an object"),
        ('{"temperature": 1}', "got 'temperature'"),
        ('{"response_format": {"type": "xml"}}', "response_format of the adapter's ranklet.json.type: expected text"),
        ('{"tool_format": "xml"}', "tool_format of the adapter's ranklet.json: expected one of hermes, "),
    ):
        (tmp_path / "ranklet.json").write_text(content)
        with pytest.raises(InvalidRequest) as caught:
            read_ranklet_file(tmp_path)
        assert says in caught.value.message
