"""The console for tables that commands print."""

from rich.console import Console

_FILE_WIDTH = 120


def open_console() -> Console:
    """Return a console for stdout. A file or a pipe gets 120 columns: with rich's 80, numbers are cut off."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)
