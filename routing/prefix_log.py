"""The pages that a replica tells routers of."""

from collections.abc import Iterable

_MAX_PAGES = 512  # between two reports; the latest


class PrefixLog:
    """Collects hashes of pages between two reports."""

    def __init__(self) -> None:
        self._pages: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def add(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._pages.pop(page, None)
            self._pages[page] = None

    def take(self) -> tuple[int, ...]:
        """Return the pages since the last call, the latest 512 at most."""
        pages, self._pages = self._pages, {}
        return tuple(pages)[-_MAX_PAGES:]
