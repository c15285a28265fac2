"""Names of adapters that an unknown name may have been meant for."""

import difflib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from ranklet.cluster.names import MAX_NAME_CHARACTERS

_LOOKED_AT: Final = 1000  # on each side of where the name would stand
_COMPARED: Final = 50  # of those that may be shown, on each side


def similar_names(name: str, names: Sequence[str], may_show: Callable[[str], bool]) -> list[str]:
    """Return up to three similar names. The time is bounded: of many names, only the neighbours are compared.

    Args:
        names: sorted.
        may_show: whether the client may see this name.
    """
    if len(name) > MAX_NAME_CHARACTERS:
        return []
    place = bisect_left(names, name)
    before = filter(may_show, reversed(names[max(0, place - _LOOKED_AT) : place]))
    behind = filter(may_show, names[place : place + _LOOKED_AT])
    return difflib.get_close_matches(name, [*islice(before, _COMPARED), *islice(behind, _COMPARED)], n=3, cutoff=0.5)
