"""Hashes of files' contents, equal on every node that has the same files."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ranklet.replicas.model.tokenizer_files import TOKENIZER_FILES, read_within_bounds
from ranklet.replicas.regular_file import open_regular

_PIECE_BYTES = 1 << 20  # each piece has its own digest, so that threads can share a file
_THREADS = 8  # of one file; not shared between files, because a disk that hangs blocks them
_CHARACTERS = 32


def piece_digests(path: Path) -> tuple[int, bytes]:
    """Return a file's size and the SHA-256 of each piece. Reads and hashes without the GIL."""
    with open_regular(path) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size

        def digest(start: int) -> bytes:
            return hashlib.sha256(os.pread(descriptor, _PIECE_BYTES, start)).digest()

        starts = range(0, size, _PIECE_BYTES)
        if len(starts) <= 1:
            return size, b"".join(map(digest, starts))
        with ThreadPoolExecutor(min(_THREADS, len(starts)), thread_name_prefix="hash") as threads:
            return size, b"".join(threads.map(digest, starts))


def file_entry(name: str, size: int, digests: bytes) -> bytes:
    """Return what stands for a file in the hash of its folder."""
    return f"{name}:{size};".encode() + digests


def tokenizer_hash(entries: Mapping[str, bytes]) -> str:
    """Return a hash of the tokenizer files among the entries of a folder; "" if there are none."""
    own = [entries[name] for name in TOKENIZER_FILES if name in entries]
    return hashlib.sha256(b"".join(own)).hexdigest()[:_CHARACTERS] if own else ""


def read_tokenizer_hash(folder: Path) -> str:
    """Return the hash of a folder's tokenizer files; "" if there are none.

    Raises:
        UnusableTokenError: a file is too large, or no file.
        OSError: a file cannot be read.
    """
    contents = {name: read_within_bounds(folder / name) for name in TOKENIZER_FILES}
    return tokenizer_hash({name: _entry(name, each) for name, each in contents.items() if each is not None})


def _entry(name: str, content: bytes) -> bytes:
    pieces = (memoryview(content)[start : start + _PIECE_BYTES] for start in range(0, len(content), _PIECE_BYTES))
    return file_entry(name, len(content), b"".join(hashlib.sha256(piece).digest() for piece in pieces))
