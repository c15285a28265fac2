"""Recognises Git LFS pointers: the small text files that a clone without Git LFS has in place of large files."""

from pathlib import Path

from ranklet.replicas.regular_file import open_regular

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def is_pointer(content: bytes) -> bool:
    return content.startswith(_BEGINNING)


def pointer_problem(path: Path) -> str | None:
    """Return what is wrong with a file that is a pointer; None for any other file, and if there is none."""
    try:
        if not path.is_file():
            return None
        with open_regular(path) as file:
            beginning = file.read(len(_BEGINNING))
    except OSError:
        return None
    return pointer_message(path.name) if is_pointer(beginning) else None


def pointer_message(name: str) -> str:
    return f"{name}: expected the file itself, got a Git LFS pointer to it; run `git lfs pull` where it was cloned"
