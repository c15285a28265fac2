"""Sources of adapters: a source is a folder, or a URL with an optional revision after `#`."""

import re

from ranklet.replicas.errors import AdapterNotFound, InvalidRequest

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


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


def check_url_allowed(url: str, allowed: tuple[str, ...]) -> None:
    """Raise InvalidRequest unless `url` is below one of the prefixes `allowed`."""
    has_tricks = any(part in url for part in ("..", "::", "#", "?", "%", "\\", "@", "\n"))
    is_below = any(url.startswith(prefix.rstrip("/") + "/") for prefix in allowed)
    if has_tricks or not is_below:
        prefixes = ", ".join(allowed) or "nothing"
        raise InvalidRequest(
            f"path: expected a folder, or a URL below one of sources.allowed ({prefixes}), got {url!r}", param="path"
        )
