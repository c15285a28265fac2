"""The adapters that an engine refused, so that their files are not read for each request."""

from collections import OrderedDict
from collections.abc import Iterator

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.errors import RankletError

_MAX_KEPT = 256


class Refusals:
    """The errors that revisions of adapters were refused with; the oldest are forgotten."""

    def __init__(self) -> None:
        self._errors: OrderedDict[AdapterRef, RankletError] = OrderedDict()

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._errors

    def __iter__(self) -> Iterator[AdapterRef]:
        return iter(self._errors)

    def add(self, ref: AdapterRef, error: RankletError) -> None:
        self._errors[ref] = error
        if len(self._errors) > _MAX_KEPT:
            self._errors.popitem(last=False)

    def error(self, ref: AdapterRef) -> RankletError | None:
        # An error that is raised again and again would collect the frames of every request in its traceback.
        found = self._errors.get(ref)
        return found and found.with_traceback(None)

    def forget(self, name: str, keep: str | None) -> None:
        """Forget the errors of an adapter, except for the revision `keep`."""
        for ref in [ref for ref in self._errors if ref.name == name and ref.revision != keep]:
            del self._errors[ref]
