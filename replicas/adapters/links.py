"""Where the files of an adapter's folder may be: in the folder, or where a link may lead."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def check_links(folder: Path, names: Iterable[str], roots: Sequence[Path] = ()) -> Iterator[str]:
    """Yield a finding for each file whose links lead out of the folder and of all roots.

    A snapshot in the Hugging Face hub's cache consists of links to the blobs of its repository, which may stay.

    Args:
        names: of the files, in the folder. They may be missing.
        roots: other folders that links may lead to.
    """
    real = os.path.realpath(folder)
    outside = [name for name in names if not _is_below(os.path.realpath(os.path.join(real, name)), real)]  # noqa: PTH118
    if not outside:
        return
    allowed = [os.path.realpath(root) for root in roots]
    snapshots = os.path.dirname(real)  # noqa: PTH120
    if os.path.basename(snapshots) == "snapshots":  # noqa: PTH119
        allowed.append(os.path.join(os.path.dirname(snapshots), "blobs"))  # noqa: PTH118, PTH120
    for name in outside:
        target = os.path.realpath(os.path.join(real, name))  # noqa: PTH118
        if not any(_is_below(target, root) for root in allowed):
            yield f"{name}: expected a file, got a link that leaves the folders of adapters; copy the file there"


def _is_below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)
