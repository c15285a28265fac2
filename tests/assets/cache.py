"""The model and the adapters, made once and kept until what makes them changes."""

import fcntl
import hashlib
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

MADE_BY = ("torch", "transformers", "tokenizers", "peft", "safetensors")


def digest() -> str:
    """Changes with the sources of the assets and with the libraries that write them."""
    made_of = hashlib.sha256(" ".join(map(version, MADE_BY)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        made_of.update(source.read_bytes())
    return made_of.hexdigest()[:16]


def is_made(folder: Path) -> bool:
    """Whether `folder` holds what `make_once` would write now."""
    stamp = folder / ".made"
    return stamp.exists() and stamp.read_text() == digest()


def make_once(folder: Path) -> Path:
    """Write `folder`/model and `folder`/adapters unless they are there. Returns `folder`.

    Made under a lock, so that two processes at once never see half a model. Other adapters in it are left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_made(folder):
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    from tests.assets.make import make_adapters, make_model

    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as name:
        aside = Path(name)
        # PEFT notes the base's folder in each adapter: it must be where the model will stand, not aside.
        shutil.rmtree(folder / "model", ignore_errors=True)
        make_model(aside / "model").rename(folder / "model")
        (folder / "adapters").mkdir(exist_ok=True)
        for spec in make_adapters(folder / "model", aside / "adapters"):
            target = folder / "adapters" / spec.name
            shutil.rmtree(target, ignore_errors=True)
            spec.path.rename(target)
    (folder / ".made").write_text(digest())
