"""Whether an adapter's config names the served base model."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from ranklet.replicas.adapters.findings import show


def check_base_name(named: Any, bases: Sequence[str]) -> Iterator[str]:
    """Yield a finding if a config names another base than one of these fnmatch patterns."""
    if named is None or named == "":
        return  # PEFT leaves it empty for models built in memory; shapes are checked all the same
    short = _short_name(str(named))
    if any(fnmatch(short.lower(), _short_name(base).lower()) for base in bases):
        return
    served = ", ".join(bases)
    yield (
        f"base_model_name_or_path: expected the served base ({served}), got {show(named)}; if it is the same model, "
        "add that name to the base's aliases (`--base-name` of `ranklet adapters verify`)"
    )


def _short_name(name: str) -> str:
    """Return the last part of a hub id or path; for a snapshot in the hub's cache, the model's name."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].rsplit("--", 1)[-1] if cached else parts[-1] if parts else name
