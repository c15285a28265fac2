"""The chat template of a model: makes one prompt of the messages of a chat, as transformers does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ranklet.cluster.text.render_process import Renderer, TemplateFailedError
from ranklet.cluster.text.template_language import PROMPT_FLAG
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    UnusableTokenError,
    content_of,
    read_tokenizer_file,
    read_within_bounds,
)

TEMPLATE_FILE: Final = "chat_template.jinja"
MAX_TEMPLATE_CHARS: Final = 1 << 16
_END_MARK = "THE_FINAL_MESSAGE_ENDS_HERE "  # the space shows whether the template removes spaces there
_REASONING = ("reasoning_content", "thinking", "reasoning")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Other fields of the request set them, or the server does.
_RESERVED = frozenset(
    {
        "messages", "conversation", "tools", "documents", "chat_template", PROMPT_FLAG, "continue_final_message",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
        "return_assistant_tokens_mask", "sanitize_control_tokens",
    }
)  # fmt: skip

Message = Mapping[str, Any]


class ChatTemplate:
    """A chat template, with what it needs of the tokenizer.

    Args:
        source: Jinja.
        special_tokens: texts of special tokens by the names that templates use, such as `bos_token`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], renderer: Renderer) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._renderer = renderer

    def reads(self, name: str) -> bool:
        """Return whether the template may read a variable."""
        return name in self._source

    def prompt(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None, documents: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """Return the prompt of a chat. Blocks.

        Args:
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: end within the last message, so that the model goes on with it.
            arguments: the request's `chat_template_kwargs`.

        Raises:
            InvalidRequest: the template fails, or the arguments contradict each other.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                f"continue_final_message: expected false while {PROMPT_FLAG} is true, got true. Set {PROMPT_FLAG} to "
                "false to continue the final message",
                param="continue_final_message",
            )
        prepared = [_prepared(message) for message in messages]
        if not prepared:
            raise InvalidRequest("messages: expected at least one message, got none", param="messages")
        final = _mark_end(prepared[-1]) if continue_final_message else ""
        variables: dict[str, Any] = {**self._special_tokens, **_checked(arguments or {})}
        variables |= {"messages": prepared, "tools": tools, "documents": documents}
        variables[PROMPT_FLAG] = add_generation_prompt
        try:
            text = self._renderer.render(self._source, variables)
        except TemplateFailedError as failure:
            raise InvalidRequest(f"messages: the chat template refuses them: {failure}", param="messages") from failure
        return _cut(text, final) if continue_final_message else text


def folder_template(folder: Path) -> str | None:
    """Return the chat template of a model's or an adapter's folder; None if it has none.

    Raises:
        UnusableTokenError: a file cannot be read, or is too large.
    """
    try:
        stored = read_within_bounds(folder / TEMPLATE_FILE)
        source = None if stored is None else stored.decode("utf-8")
    except (OSError, ValueError) as error:
        raise UnusableTokenError(f"{TEMPLATE_FILE}: expected a template, got: {error}") from error
    if source is None:
        source = _configured(read_tokenizer_file(folder / TOKENIZER_CONFIG_FILE).get("chat_template"))
    if source is not None and len(source) > MAX_TEMPLATE_CHARS:
        raise UnusableTokenError(f"chat template: expected at most {MAX_TEMPLATE_CHARS} characters, got {len(source)}")
    return source


def folder_special_tokens(folder: Path) -> dict[str, str]:
    """Return the texts of a folder's special tokens by the names that chat templates use.

    Raises:
        UnusableTokenError: the file cannot be read.
    """
    config = read_tokenizer_file(folder / TOKENIZER_CONFIG_FILE)
    found = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        content = content_of(token) if isinstance(token, dict) else token
        if isinstance(content, str) and content:
            found[name] = content
    return found


def _configured(template: Any) -> str | None:
    """Return the template of a tokenizer's config, or the one named `default` of its list."""
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _checked(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    reserved = sorted(_RESERVED & arguments.keys())
    if reserved:
        raise InvalidRequest(
            f"chat_template_kwargs: expected none of the names that the server sets, got {', '.join(reserved)}",
            param="chat_template_kwargs",
        )
    return arguments


def _prepared(message: Message) -> dict[str, Any]:
    """Return a message without empty fields, and with its reasoning under the names that templates read."""
    found = {name: value for name, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _mark_end(message: dict[str, Any]) -> str:
    """Mark the end of a message's text. Returns the text before the mark."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_MARK
        return content
    parts = [dict(part) for part in content] if isinstance(content, list) else []
    for part in reversed(parts):
        if isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] += _END_MARK
            message["content"] = parts
            return text
    raise InvalidRequest("continue_final_message: expected a final message with text, got none", param="messages")


def _cut(text: str, final: str) -> str:
    """Return the prompt up to the mark. If the template removed the spaces behind the mark, those before it go too."""
    end = text.rfind(_END_MARK.strip())
    if end < 0 or final.strip() not in text:
        raise InvalidRequest(
            "continue_final_message: expected a chat template that keeps the final message unchanged, got one that "
            "changes or drops it",
            param="continue_final_message",
        )
    before = text[:end]
    return before if text.startswith(_END_MARK, end) else before.rstrip()
