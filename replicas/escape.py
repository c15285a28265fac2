"""Makes text of others safe to show: in messages, in logs and on terminals."""

import logging

_LINES = "\n\t"  # of tracebacks and of lists of findings


def escape(text: str, *, keep: str = "") -> str:
    r"""Replace characters that do not show as themselves by escapes such as `\x1b` and `\u202e`.

    These are controls (also C1, which terminals obey), line separators, characters without width, those that turn the
    direction of writing, and surrogates of bytes that are not UTF-8.

    Args:
        keep: characters that stay, such as line feeds.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)


class EscapingFormatter(logging.Formatter):
    """Formats as another formatter does, and escapes the result."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        return escape(self._formatter.format(record), keep=_LINES)
