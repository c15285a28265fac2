"""The grammar that a text must follow, as requests and adapters' folders give it."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from ranklet.replicas.errors import InvalidRequest

MAX_GRAMMAR_BYTES: Final = 256 << 10
NOT_INSTALLED: Final = "constrained output needs llguidance, which is not installed: pip install 'ranklet[grammar]'"

# Of a JSON text. Space is bounded, since a model that begins to write it may never stop. Each character has one
# spelling, since a key that is spelled with an escape would not count as that key.
_JSON_OPTIONS: Final = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ ]|\n[ \t]{0,60}",
    "json_allowed_escapes": '"\\bfnrt',
    "lenient": False,
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """The texts of a language.

    Attributes:
        text: a JSON schema, a regular expression that matches the whole text, or a grammar in Lark's form.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @classmethod
    def of_schema(cls, schema: Any) -> "Grammar":
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def of_choice(cls, choices: Sequence[str]) -> "Grammar":
        """Return the grammar whose texts are the choices."""
        return cls("lark", "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices))

    def definition(self) -> str:
        """Return llguidance's form. Raises ValueError for a schema that is no JSON object."""
        from llguidance import LLMatcher

        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.text)
        if self.kind == "lark":
            return LLMatcher.grammar_from_lark(self.text)
        return LLMatcher.grammar_from_json_schema(self.text, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]


@cache
def is_installed() -> bool:
    """Whether llguidance is installed, which the extra `grammar` brings."""
    return importlib.util.find_spec("llguidance") is not None


def not_enforced(problem: str) -> InvalidRequest:
    return InvalidRequest(f"the grammar of the text cannot be enforced: {problem}", param="response_format")
