"""Makes JSON schemas of the kinds that extraction and function calling use, and that JSONSchemaBench collects."""

import random
from typing import Any
from urllib.parse import quote

NAMES = ("name", "id", "total", "größe", "名前", "a/b", 'say "hi"', "first name", "$ref", "x~y", "tags", "😀")
WORDS = ("red", "grün", "青", 'a "quoted" one', "back\\slash", "two words", "", "line\nbreak", "e\u0301", "😀")
PATTERNS = (r"^[A-Z]{2}-\d{3}$", r"^(a|bc)+$", r"^[^\s@]{1,8}@[a-z]{1,8}\.com$", r"[0-9a-f]{4}")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
STEPS = (2, 3, 5, 10, 25)


class SchemaMaker:
    """Makes schemas from a seed. Most have only short texts, so that an answer of random tokens ends."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._shared: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        self._shared = {}
        kind = self._random.choice((self._object, self._object, self._object, self._list, self._any_of, self._tree))
        schema = kind(self._random.randint(1, 3))
        return {**schema, "$defs": self._shared} if self._shared else schema

    def _value(self, depth: int) -> dict[str, Any]:
        leaves = (self._text, self._number, self._integer, self._enum, self._const, self._switch, self._nullable)
        nested = (self._object, self._list, self._any_of, self._reference, self._tuple, self._one_of, self._all_of)
        return self._random.choice((*leaves, *nested) if depth > 0 else leaves)(depth - 1)

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(NAMES, self._random.randint(1, 4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._value(depth) for name in names}}
        required = [name for name in names if self._random.random() < 0.7]
        if required or self._random.random() < 0.5:
            schema["required"] = required
        others = self._random.random()
        if others < 0.6:
            schema["additionalProperties"] = False
        elif others < 0.8:
            schema["additionalProperties"] = self._value(0)
        if others < 0.1:
            schema["patternProperties"] = {"^z_[a-z]{1,3}$": self._value(0)}
        return schema

    def _list(self, depth: int) -> dict[str, Any]:
        least = self._random.randint(0, 2)
        schema = {"type": "array", "items": self._value(depth), "minItems": least}
        return {**schema, "maxItems": least + self._random.randint(0, 3)}

    def _tuple(self, depth: int) -> dict[str, Any]:
        items = [self._value(depth) for _ in range(self._random.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._value(depth) for _ in range(self._random.randint(1, 3))]}

    def _one_of(self, depth: int) -> dict[str, Any]:
        return {"oneOf": [self._integer(depth), {"type": "string", "maxLength": 4}, {"type": "null"}]}

    def _all_of(self, depth: int) -> dict[str, Any]:
        one, other = self._random.sample(NAMES, 2)
        return {
            "type": "object",
            "allOf": [
                {"properties": {one: self._value(depth)}, "required": [one]},
                {"properties": {other: self._value(depth)}},
            ],
        }

    def _reference(self, depth: int) -> dict[str, Any]:
        name = self._random.choice(("item", "größe", "a~b", "c/d"))
        if name not in self._shared:
            self._shared[name] = self._value(0)
        return {"$ref": f"#/$defs/{quote(name.replace('~', '~0').replace('/', '~1'))}"}

    def _tree(self, depth: int) -> dict[str, Any]:
        self._shared["node"] = {
            "type": "object",
            "properties": {
                "value": self._value(0),
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
        return {"$ref": "#/$defs/node"}

    def _text(self, depth: int) -> dict[str, Any]:
        kind = self._random.random()
        if kind < 0.2:
            return {"type": "string", "pattern": self._random.choice(PATTERNS)}
        if kind < 0.4:
            return {"type": "string", "format": self._random.choice(FORMATS)}
        least = self._random.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self._random.randint(0, 12)}

    def _number(self, depth: int) -> dict[str, Any]:
        low = round(self._random.uniform(-1000, 1000), self._random.randint(0, 3))
        bounds = {self._random.choice(("minimum", "exclusiveMinimum")): low}
        if self._random.random() < 0.7:
            bounds[self._random.choice(("maximum", "exclusiveMaximum"))] = round(low + self._random.uniform(1, 500), 2)
        return {"type": "number", **bounds}

    def _integer(self, depth: int) -> dict[str, Any]:
        low = self._random.randint(-2000, 2000)
        schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + self._random.randint(100, 5000)}
        return schema | ({"multipleOf": self._random.choice(STEPS)} if self._random.random() < 0.3 else {})

    def _enum(self, depth: int) -> dict[str, Any]:
        values: list[Any] = [*self._random.sample(WORDS, self._random.randint(1, 4))]
        values += self._random.sample((1, -2.5, None, True, {"a": [1]}), self._random.randint(0, 2))
        return {"enum": values}

    def _const(self, depth: int) -> dict[str, Any]:
        return {"const": self._random.choice((*WORDS, 0, None, {"k": {"größe": [True]}}))}

    def _switch(self, depth: int) -> dict[str, Any]:
        return {"type": self._random.choice(("boolean", "null"))}

    def _nullable(self, depth: int) -> dict[str, Any]:
        return {"type": ["string", "null"], "maxLength": 6}
