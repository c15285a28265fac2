"""The grammar that a text must follow, as requests and adapters' folders give it."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.grammar.call_grammar import CallGrammar, Lead, lead_lark, nested

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


GrammarKind = Literal["json_schema", "regex", "lark", "calls"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """The texts of a language.

    Attributes:
        text: a JSON schema, a regular expression that matches the whole text, a grammar in Lark's form, or what
            `call_grammar.calls_text` makes.
        lead: what stands before the text; None for nothing.
    """

    kind: GrammarKind
    text: str
    lead: Lead | None = None

    @classmethod
    def of_schema(cls, schema: Any) -> "Grammar":
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def of_choice(cls, choices: Sequence[str]) -> "Grammar":
        """Return the grammar whose texts are the choices."""
        return cls("lark", "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices))

    def definition(self, *, plain: bool = False) -> str:
        """Return llguidance's form.

        Args:
            plain: for a tokenizer that does not have the special tokens of tags.

        Raises:
            ValueError: a schema is no JSON object.
        """
        if self.lead is not None:
            first, *others = self.grammars(plain=plain)
            return nested(lead_lark(self.lead), [("text", first), *((each["name"], each) for each in others)])
        if self.kind == "lark":
            return self.text
        return json.dumps({"grammars": self.grammars(plain=plain)})

    def grammars(self, *, plain: bool) -> list[dict[str, Any]]:
        """Return llguidance's grammars. The first one may refer to the others by name."""
        from llguidance import LLMatcher

        if self.kind == "lark":
            return [{"lark_grammar": self.text}]
        if self.kind == "calls":
            calls = CallGrammar.read(self.text)
            found = [{"lark_grammar": calls.lark(plain=plain)}]
            for index, schema in enumerate(calls.schemas.values()):
                found += [each | {"name": f"call{index}"} for each in Grammar.of_schema(schema).grammars(plain=plain)]
            if calls.otherwise is not None:
                other = Grammar(calls.otherwise["kind"], calls.otherwise["text"])  # type: ignore[arg-type]
                found += [each | {"name": "otherwise"} for each in other.grammars(plain=plain)]
            return found
        if self.kind == "regex":
            made = LLMatcher.grammar_from_regex(self.text)
        else:
            made = LLMatcher.grammar_from_json_schema(self.text, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
        return list(json.loads(made)["grammars"])


@cache
def is_installed() -> bool:
    """Whether llguidance is installed, which the extra `grammar` brings."""
    return importlib.util.find_spec("llguidance") is not None


def not_enforced(problem: str) -> InvalidRequest:
    return InvalidRequest(f"the grammar of the text cannot be enforced: {problem}", param="response_format")
