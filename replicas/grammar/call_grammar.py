"""Grammars of texts that call tools, or that have reasoning before them, made of the grammars of their parts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

ANY_TEXT: Final = r"/(.|\n)*/"
_NO_CALL: Final = r"/([^{ \t\r\n](.|\n)*)?/"  # where a call may begin a text without a tag


@dataclass(frozen=True)
class Tag:
    """A text that is written as one special token, if it has an `id`."""

    text: str
    id: int | None = None

    def lark(self, *, plain: bool = False) -> str:
        """Return it in Lark's form. `plain` is for tokenizers without the token."""
        return quoted(self.text) if plain or self.id is None else f"<[{self.id}]>"


@dataclass(frozen=True)
class CallForm:
    """How the calls of a text are written.

    Attributes:
        first: before all calls.
        before: before each call.
        name: between `before` and the name.
        arguments: between the name and the arguments.
        after: after the arguments.
        between: between calls; None for one call only.
        last: after all calls.
        is_tagged: whether a tag precedes each call.
    """

    first: tuple[Tag, ...] = ()
    before: tuple[Tag, ...] = ()
    name: str = '{"name": "'
    arguments: str = '", "arguments": '
    after: tuple[Tag, ...] = (Tag("}"),)
    between: str | None = None
    last: str = ""
    is_tagged: bool = True


@dataclass(frozen=True)
class Lead:
    """What stands before a text that follows a grammar: reasoning between tags.

    Attributes:
        opens: None if the prompt has opened the reasoning. Otherwise the text may have none.
    """

    opens: Tag | None
    closes: Tag


def calls_text(
    form: CallForm, schemas: Mapping[str, Mapping[str, Any]], *, must_call: bool, otherwise: Mapping[str, str] | None
) -> str:
    """Return the text of a grammar of kind `calls`.

    Args:
        schemas: of the arguments, by the name of the tool.
        must_call: whether other texts than calls are impossible.
        otherwise: kind and text of the grammar of a text without calls; None for any text.
    """
    content = {"form": asdict(form), "schemas": schemas, "must_call": must_call, "otherwise": otherwise}
    return json.dumps(content, ensure_ascii=False)


@dataclass(frozen=True)
class CallGrammar:
    """A grammar of kind `calls`, read from its text."""

    form: CallForm
    schemas: Mapping[str, Any]
    must_call: bool
    otherwise: Mapping[str, str] | None

    @classmethod
    def read(cls, text: str) -> "CallGrammar":
        content = json.loads(text)
        form = content["form"]
        tags = {key: tuple(Tag(**tag) for tag in form[key]) for key in ("first", "before", "after")}
        return cls(CallForm(**(form | tags)), content["schemas"], content["must_call"], content["otherwise"])

    def lark(self, *, plain: bool) -> str:
        """Return the grammar in Lark's form. The schemas are the grammars @call0, @call1 ..., others are @otherwise."""
        form = self.form

        def joined(tags: Iterable[Tag]) -> str:
            return " ".join(tag.lark(plain=plain) for tag in tags if tag.text)

        begins = (*form.first, *form.before)
        lines = []
        for index, name in enumerate(self.schemas):
            head = quoted(form.name + name + form.arguments)
            lines.append(f"call{index}: {head} @call{index} {joined(form.after)}")
        lines.append(f"call: {' | '.join(f'call{index}' for index in range(len(self.schemas)))}")
        more = "" if form.between is None else f" ({quoted(form.between)} {joined(form.before)} call)*"
        last = f" {quoted(form.last)}" if form.last else ""
        calls = f"call{more}{last}"
        if self.must_call or self.otherwise is not None:
            other = "" if self.must_call else " | @otherwise"
            return "\n".join([f"start: {joined(begins)} {calls}{other}", *lines])
        if not form.is_tagged:
            return "\n".join([f"start: {calls} | NO_CALL", f"NO_CALL: {_NO_CALL}", *lines])
        # Text up to the tag, again and again. The tag ends the text also if it consists of several tokens.
        tag, *rest = begins
        if tag.id is None or plain:
            lines.append(f"text_and_tag[lazy]: TEXT {quoted(tag.text)}")
        else:
            lines.append(f"text_and_tag: TEXT {tag.lark()}")
        once = f"text_and_tag {joined(rest)} call{last}"
        if form.last and more:
            once = f"text_and_tag {joined(rest)} {calls}"
        repeated = f"({once}){'?' if form.between is None else '*'}"
        return "\n".join([f"start: {repeated} TEXT", f"TEXT: {ANY_TEXT}", *lines])


def lead_lark(lead: Lead) -> str:
    """Return the grammar of a text with reasoning before @text."""
    lines = [f"TEXT: {ANY_TEXT}", r"NEWLINES: /\n{0,2}/"]
    if lead.closes.id is None:
        lines.append(f"reasoning[lazy]: TEXT {quoted(lead.closes.text)}")
    else:
        lines.append(f"reasoning: TEXT {lead.closes.lark()}")
    reasoning = "reasoning NEWLINES"
    before = reasoning if lead.opens is None else f"({lead.opens.lark()} {reasoning})?"
    return "\n".join([f"start: {before} @text", *lines])


def nested(lark: str, named: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return llguidance's form of a grammar and those that it refers to by name."""
    return json.dumps({"grammars": [{"lark_grammar": lark}, *({**each, "name": name} for name, each in named)]})


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
