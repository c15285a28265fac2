"""The name of an adapter, and where its files are."""

from dataclasses import dataclass, field
from pathlib import Path

from ranklet.cluster.catalog.source import is_remote
from ranklet.replicas.adapters.invocation import Invocation
from ranklet.replicas.errors import UnknownModel


@dataclass(frozen=True)
class AdapterLocation:
    """The name and the source of an adapter. The files have not been read.

    Attributes:
        source: a folder, or a URL that each node downloads.
        requested_revision: from `name@revision`; None if the request named no revision.
        param: the request's field that named the adapter.
        invocation: as in `AdapterRef`; None if the adapter has none, or is not described yet.
    """

    name: str
    source: str
    requested_revision: str | None = None
    param: str = "model"
    invocation: Invocation | None = field(default=None, compare=False)

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
