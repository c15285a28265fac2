"""Sources of adapters: a source is a folder, or a URL with an optional revision after `#`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ranklet.replicas.errors import AdapterNotFound, InvalidRequest

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")

_MAX_SHOWN_CHARS = 300


def is_remote(source: str) -> bool:
    return "://" in source


def pinned_revision(source: str) -> str:
    """Return the revision in a URL, or "" if it has none."""
    return source.partition("#")[2]


def missing_folder(path: str, allowed: tuple[str, ...]) -> AdapterNotFound:
    """Return the error for a path without a folder. One that may be a hub id, as vLLM takes them, gets a hint.

    Args:
        allowed: prefixes of URLs that adapters may be loaded from.
    """
    hint = ""
    if _HUB_ID.fullmatch(path) and ".." not in path:
        allows = any(prefix.startswith("hf://") for prefix in allowed)
        hint = f". If it is a repository of the Hugging Face hub, write hf://{path}"
        hint += "" if allows else f" and add hf://{path.partition('/')[0]} to sources.allowed, or download it"
    return AdapterNotFound(f"path: expected a folder, {path!r} does not exist{hint}", param="path")


@dataclass(frozen=True)
class AllowedSources:
    """Where adapters may be loaded from by name.

    Attributes:
        roots: folders.
        prefixes: of URLs.
    """

    roots: tuple[Path, ...]
    prefixes: tuple[str, ...]

    def problem(self, source: str) -> str | None:
        """Return why a source is not allowed, or None. Follows the links of a folder, which need not exist."""
        if is_remote(source):
            try:
                check_url_allowed(source.partition("#")[0], self.prefixes)
            except InvalidRequest as error:
                return error.message.removeprefix("path: ")
            return None
        roots = [os.path.realpath(root) for root in self.roots]
        if any(Path(os.path.realpath(source)).is_relative_to(root) for root in roots):
            return None
        return (
            f"expected a folder under {', '.join(roots)} (adapters_dir, security.adapter_roots), "
            f"got {source[:_MAX_SHOWN_CHARS]!r}"
        )


def check_url_allowed(url: str, allowed: tuple[str, ...]) -> None:
    """Raise InvalidRequest unless `url` is below one of the prefixes `allowed`."""
    has_tricks = any(part in url for part in ("..", "::", "#", "?", "%", "\\", "@", "\n"))
    is_below = any(url.startswith(prefix.rstrip("/") + "/") for prefix in allowed)
    if has_tricks or not is_below:
        prefixes = ", ".join(allowed) or "nothing"
        raise InvalidRequest(
            f"path: expected a folder, or a URL below one of sources.allowed ({prefixes}), "
            f"got {url[:_MAX_SHOWN_CHARS]!r}",
            param="path",
        )
