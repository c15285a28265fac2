"""A setting that changes while the service runs, such as `user_config` or the file of keys."""

import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

logger = logging.getLogger("ray.serve")
Content = TypeVar("Content")


class Keeper(Protocol):
    """Remembers the last good contents of settings for processes that start later."""

    def keep(self, name: str, content: object) -> None:
        """Remember the content of a setting. Does not block."""

    def repeat(self) -> None:
        """Remember the contents again if they were lost. Called about once a second. Does not block."""

    def last(self, name: str) -> Any:
        """Return the last good content of a setting, or None if there is none."""


class NoKeeper:
    """Remembers nothing."""

    def keep(self, name: str, content: object) -> None:
        pass

    def repeat(self) -> None:
        pass

    def last(self, name: str) -> Any:
        return None


class Setting(Generic[Content]):
    """The last good content of a setting, and why a newer content was refused. Thread-safe.

    Each new reason is logged and counted once.

    Args:
        name: label of its metrics.
        errors: class of the exceptions of a faulty content. The message says which setting it is.

    Attributes:
        problem: why the newest content was refused; None if it is in force.
        refusals: number of refused contents.
    """

    def __init__(self, name: str, errors: type[Exception], keeper: Keeper) -> None:
        self.name = name
        self.problem: str | None = None
        self.refusals = 0
        self._errors = errors
        self._keeper = keeper
        self._content: Content | None = None
        self._lock = threading.Lock()

    @property
    def content(self) -> Content:
        """The last good content. Before it, `change` has been called."""
        if self._content is None:
            raise RuntimeError(f"expected a content of {self.name}, got none yet")
        return self._content

    def change(self, read: Callable[[], Content]) -> bool:
        """Replace the content by the result of `read`. If `read` fails, the last good content stays in force.

        At the first call, that is the one that the keeper remembers. Without one, the exception of `read` is raised.

        Returns:
            Whether the new content is in force.
        """
        try:
            content = read()
        except self._errors as error:
            with self._lock:
                if self._content is None:
                    self._content = self._keeper.last(self.name)
                if self._content is None:
                    raise
                self._refuse(str(error))
            return False
        with self._lock:
            if self.problem is not None:
                logger.info("%s: the new content is good and in force", self.name)
            self._content, self.problem = content, None
        self._keeper.keep(self.name, content)
        return True

    def _refuse(self, reason: str) -> None:
        if reason != self.problem:
            self.refusals += 1
            self.problem = reason
            logger.error("%s. The last good content stays in force", reason)
