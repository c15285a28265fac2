"""Sources of adapters: a source is a folder, or a URL with an optional revision after `#`."""

from ranklet.replicas.errors import InvalidRequest


def is_remote(source: str) -> bool:
    return "://" in source


def pinned_revision(source: str) -> str:
    """Return the revision in a URL, or "" if it has none."""
    return source.partition("#")[2]


def check_url_allowed(url: str, allowed: tuple[str, ...]) -> None:
    """Raise InvalidRequest unless `url` is below one of the prefixes `allowed`."""
    has_tricks = any(part in url for part in ("..", "::", "#", "?", "%", "\\", "@", "\n"))
    is_below = any(url.startswith(prefix.rstrip("/") + "/") for prefix in allowed)
    if has_tricks or not is_below:
        prefixes = ", ".join(allowed) or "nothing"
        raise InvalidRequest(
            f"path: expected a folder, or a URL below one of sources.allowed ({prefixes}), got {url!r}", param="path"
        )
