"""A name for one revision of one adapter, light enough for gateways and routers to hold thousands."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ranklet.replicas.errors import AdapterNotFound

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One revision of an adapter: `name` as users say it, `path` of its folder, `revision` of its content."""

    name: str
    path: str
    revision: str


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that is verified and in a slot."""

    name: str
    revision: str
    rank: int
    modules: tuple[str, ...]
    bytes: int


def revision_of(path: str | Path) -> str:
    """A short fingerprint of an adapter folder that changes when its files do; reads no weights.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter folder: expected a folder, got {str(path)!r}, which does not exist")
    seen = hashlib.blake2b(digest_size=6)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            status = (folder / name).stat()
            seen.update(f"{name}:{status.st_size}:{status.st_mtime_ns};".encode())
        except OSError:  # a missing file is a finding of verification, not of naming
            seen.update(f"{name}:absent;".encode())
    return seen.hexdigest()
