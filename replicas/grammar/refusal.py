"""Why a grammar cannot be enforced. May take long, or all memory: runs in a process of its own."""

import json
import re
from itertools import islice
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from ranklet.replicas.grammar.call_grammar import CallGrammar
from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.grammar.subschemas import Subschema, of_same_value, subschemas

# Of one lexer, which all texts of a grammar share. Usual schemas need 1,000 states, of about 400 bytes each.
LIMITS = LLParserLimits(verbose_errors=False, max_lexer_states=50_000)
_FULL = "lexer error: too many"
_UNKNOWN_KEYS = re.compile(r'Unimplemented keys: \["([^"]+)"')
_MOST_LOCATED = 256  # schemas that are compiled alone to find the one at fault
_MAX_CHARS = 500


def refusal_of(grammar: Grammar, tokenizer: LLTokenizer) -> str | None:
    """Return why a grammar cannot be enforced; None if it can be.

    Args:
        tokenizer: of bytes, since most reasons do not depend on the tokens.
    """
    if grammar.kind == "calls":
        return _refusal_of_calls(grammar, tokenizer)
    if grammar.kind != "json_schema":
        return _problem(grammar, tokenizer)
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        return f"expected JSON, got: {error}"
    if not isinstance(schema, dict):
        return "expected a JSON schema that is an object"
    for each in subschemas(schema):
        problem = _not_enforced(schema, each)
        if problem is not None:
            return problem
    problem = _problem(grammar, tokenizer)
    return None if problem is None else _located(schema, problem, tokenizer)


def _refusal_of_calls(grammar: Grammar, tokenizer: LLTokenizer) -> str | None:
    calls = CallGrammar.read(grammar.text)
    for name, schema in calls.schemas.items():
        problem = refusal_of(Grammar.of_schema(schema), tokenizer)
        if problem is not None:
            return f"the parameters of {name}: {problem}"
    if calls.otherwise is not None:
        problem = refusal_of(Grammar(calls.otherwise["kind"], calls.otherwise["text"]), tokenizer)  # type: ignore[arg-type]
        if problem is not None:
            return f"the format of texts without calls: {problem}"
    return _problem(grammar, tokenizer)


def _problem(grammar: Grammar, tokenizer: LLTokenizer) -> str | None:
    """Return what llguidance does not accept; None if it accepts all."""
    try:
        matcher = LLMatcher(tokenizer, grammar.definition(plain=True), log_level=0, limits=LIMITS)
    except ValueError as error:
        return str(error)[:_MAX_CHARS]
    if not matcher.is_error():
        warnings = matcher.get_grammar_warnings()
        if warnings:
            return warnings[0][:_MAX_CHARS]
        mask = np.zeros((1, -(-tokenizer.vocab_size // 32)), dtype=np.int32)
        fill_next_token_bitmask(matcher, mask)
    return problem_of(matcher)


def is_full(matcher: LLMatcher) -> bool:
    """Whether a matcher cannot go on because its lexer has no room for more states."""
    return matcher.is_error() and _FULL in matcher.get_error()


def problem_of(matcher: LLMatcher) -> str | None:
    """Return why a matcher whose mask was computed cannot go on; None if it can, or if the text is complete."""
    if not matcher.is_error() and (matcher.is_accepting() or not matcher.is_stopped()):
        return None
    # llguidance appends its state.
    reason = matcher.get_error().partition("\n<")[0].strip()
    return "no text matches" if reason.startswith("NoExtension") else reason[:_MAX_CHARS]


def _not_enforced(root: dict[str, Any], found: Subschema) -> str | None:
    """Return what llguidance would not enforce in a schema, though it accepts it."""
    path, schema = found
    if "x-guidance" in schema:
        return f"{path}/x-guidance: this keyword is not supported"
    least = schema.get("minProperties")
    named = schema.get("required")
    keys = 1 + (len(set(map(str, named))) if isinstance(named, list) else 0)
    if isinstance(least, int | float) and least > keys:
        return (
            f"{path}/minProperties: expected at most {keys}, one more than `required` names, got {least}: the same key "
            "might be written twice"
        )
    patterns = schema.get("patternProperties")
    if isinstance(patterns, dict):
        names = [
            name
            for each in of_same_value(root, schema)
            for key in ("properties", "required")
            if isinstance(each.get(key), dict | list)
            for name in each[key]
            if isinstance(name, str)
        ]
        for pattern in patterns:
            overlapping = _first_match(pattern, names)
            if overlapping is not None:
                return (
                    f"{path}/patternProperties: expected patterns that match no name of `properties` or `required`, "
                    f"got {pattern!r}, which matches {overlapping!r}"
                )
    return None


def _first_match(pattern: str, names: list[str]) -> str | None:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return names[0] if names else None  # llguidance may read it, and then nothing is known of it
    return next((name for name in names if compiled.search(name)), None)


def _located(schema: dict[str, Any], problem: str, tokenizer: LLTokenizer) -> str:
    """Begin a problem with the path of the keyword or the schema that has it, if one is found."""
    found = _UNKNOWN_KEYS.match(problem)
    if found is not None:
        path = next((each.path for each in subschemas(schema) if found[1] in each.schema), None)
        return problem if path is None else f"{path}/{found[1]}: this keyword is not supported"
    roots = {key: schema[key] for key in ("$schema", "$defs", "definitions") if key in schema}
    # Inner schemas come last, and an outer one has the problems of those within it.
    for each in reversed(list(islice(subschemas(schema), _MOST_LOCATED))):
        if _problem(Grammar.of_schema(roots | each.schema), tokenizer) == problem:
            return f"{each.path[-_MAX_CHARS:]}: {problem}"
    return problem
