"""The console for what commands print."""

from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ranklet.replicas.escape import escape

_FILE_WIDTH = 120
_GAP = "  "


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


def print_line(text: str | Text, *, to_stderr: bool = False) -> None:
    """Print text as it is: without markup, without line breaks of its own, and escaped if it is no `Text`."""
    shown = text if isinstance(text, Text) else plain(text)
    Console(stderr=to_stderr, highlight=False, soft_wrap=True).print(shown)


def print_whole_table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print a table whose cells are never cut, one line a row, for people and for programs.

    Args:
        right: titles of the columns that are aligned to the right.
    """
    lines = [titles, *([escape(cell) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = []
        for title, cell, width in zip(titles, line, widths, strict=True):
            blanks = " " * (width - cell_len(cell))
            cells.append(blanks + cell if title in right else cell + blanks)
        print_line(_GAP.join(cells).rstrip())
