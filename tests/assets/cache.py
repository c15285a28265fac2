"""Writes the model and the adapters once and keeps them until their sources change."""

import fcntl
import hashlib
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

MADE_BY = ("torch", "transformers", "tokenizers", "peft", "safetensors")


def digest() -> str:
    """Return a hash of the assets' sources and of the versions of the libraries that write them."""
    content = hashlib.sha256(" ".join(map(version, MADE_BY)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        content.update(source.read_bytes())
    return content.hexdigest()[:16]


def is_made(folder: Path) -> bool:
    stamp = folder / ".made"
    return stamp.exists() and stamp.read_text() == digest()


def make_once(folder: Path) -> Path:
    """Write `folder`/model and `folder`/adapters unless they are current. Returns `folder`.

    Holds a lock, so that a second process never sees half a model. Keeps other adapters in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_made(folder):
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    from tests.assets.adapters import make_adapters
    from tests.assets.make import make_model

    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as name:
        scratch = Path(name)
        # PEFT writes the base's path into each adapter, so the model must be in its final place first.
        shutil.rmtree(folder / "model", ignore_errors=True)
        make_model(scratch / "model").rename(folder / "model")
        (folder / "adapters").mkdir(exist_ok=True)
        for spec in make_adapters(folder / "model", scratch / "adapters"):
            target = folder / "adapters" / spec.name
            shutil.rmtree(target, ignore_errors=True)
            spec.path.rename(target)
    (folder / ".made").write_text(digest())
