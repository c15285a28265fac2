"""The name of an adapter, and where its files are."""

import re
from dataclasses import dataclass
from pathlib import Path

from ranklet.cluster.catalog.source import is_remote
from ranklet.replicas.errors import UnknownModel

MAX_NAME_CHARACTERS = 200
_FORBIDDEN = re.compile(r"[/\\:\x00-\x1f\x7f]")


@dataclass(frozen=True)
class AdapterLocation:
    """The name and the source of an adapter. The files have not been read.

    Attributes:
        source: a folder, or a URL that each node downloads.
        requested_revision: from `name@revision`; None if the request named no revision.
        param: the request's field that named the adapter.
    """

    name: str
    source: str
    requested_revision: str | None = None
    param: str = "model"

    def check_revision(self, revision: str) -> None:
        """Raise UnknownModel if another revision than `revision` was requested."""
        if self.requested_revision not in (None, revision):
            raise UnknownModel(
                f"{self.param}: expected the revision of {self.name!r} that is served, {revision!r}, "
                f"got {self.requested_revision!r}",
                param=self.param,
            )

    def modified_s(self) -> int:
        """Return the folder's modification time in Unix seconds, 0 for a URL. Raises OSError."""
        return 0 if is_remote(self.source) else int(Path(self.source).stat().st_mtime)


def name_error(name: str) -> str | None:
    """Return the reason why `name` cannot be the name of an adapter, or None."""
    if not name or len(name) > MAX_NAME_CHARACTERS:
        return f"expected 1 to {MAX_NAME_CHARACTERS} characters, got {len(name)}"
    if name.startswith(".") or name != name.strip():
        return "expected a name that neither starts with a dot nor starts or ends with a blank"
    if _FORBIDDEN.search(name):
        return "expected a name without '/', '\\', ':' or control characters"
    return None
