"""The language of chat templates: Jinja in a sandbox, with the functions that transformers offers to templates."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_COMPILED_CHARS = 1 << 17  # a compiled template takes up to 1 KB for each character
PROMPT_FLAG = "add_generation_prompt"
_templates: dict[str, Template] = {}


class OutputTooLargeError(Exception):
    """The text of a template is longer than allowed."""


class GenerationBlock(Extension):
    """Renders `{% generation %}`, which marks the assistant's text for training, as its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance's attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)  # variables that it sets end with it


class TemplateNamespace(Namespace):
    """A namespace that stores no names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` is allowed
        self, *positional = args
        values = dict(*positional, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class DictFunction:
    """The function `dict` of templates. A class's own attributes would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def render(source: str, variables: Mapping[str, Any], max_chars: int) -> str:
    """Render a template.

    Raises:
        OutputTooLargeError: the text is longer than `max_chars`.
        Exception: the template fails. Its own `raise_exception` raises jinja2's TemplateError.
    """
    return "".join(_bounded(_compiled(source).generate(**variables), max_chars))


def reason_of(error: Exception) -> str:
    """Return why a template failed."""
    match error:
        case TemplateError() | OutputTooLargeError():
            return str(error)
        case RecursionError():
            return "its macros or its blocks are nested too deeply"
        case MemoryError():
            return "it takes too much memory"
    return f"{type(error).__name__}: {error}"


def template_findings(source: str) -> tuple[str, ...]:
    """Return why chat prompts cannot be made with a template; nothing if they can. Renders nothing.

    A template that never reads `add_generation_prompt` ends after the last message, so that the model goes on with any
    role.
    """
    try:
        names = {name.name for name in _environment().parse(source).find_all(nodes.Name)}
    except (TemplateError, RecursionError, ValueError) as error:
        return (f"chat template: expected a Jinja template, got: {error}",)
    if PROMPT_FLAG in names:
        return ()
    finding = (
        f"chat template: expected a template that adds the assistant's header if {PROMPT_FLAG} is true, got one that "
        "does not read it, so that prompts end after the last message"
    )
    return (finding,)


def _compiled(source: str) -> Template:
    found = _templates.get(source)
    if found is None:
        if sum(map(len, tuple(_templates))) + len(source) > _COMPILED_CHARS:
            _templates.clear()
        found = _templates[source] = _environment().from_string(source)
    return found


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": DictFunction(),
        "namespace": TemplateNamespace,
    }
    return environment


def _bounded(parts: Iterator[str], max_chars: int) -> Iterator[str]:
    length = 0
    for part in parts:
        length += len(part)
        if length > max_chars:
            raise OutputTooLargeError(f"expected a prompt of at most {max_chars} characters, got more")
        yield part


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot store {name!r}, whose name begins with an underscore")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    # Unlike Jinja's own filter, it escapes no characters of HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
