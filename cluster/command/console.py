"""The console for tables that commands print."""

from rich.console import Console
from rich.text import Text

from ranklet.replicas.escape import escape

_FILE_WIDTH = 120


def open_console() -> Console:
    """Return a console for stdout. A file or a pipe gets 120 columns: with rich's 80, numbers are cut off."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def plain(value: object) -> Text:
    """Return a value for a console as it is: without markup, and without characters that a terminal obeys."""
    return Text(plain_lines(value))


def plain_lines(value: object) -> str:
    """Return text of one or more lines without characters that a terminal obeys."""
    return escape(str(value), keep="\n")
