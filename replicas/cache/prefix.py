"""Hashes of prefixes: two pages have the same hash only if their keys and values are the same. Imports no torch.

Keys and values of a token depend on all tokens before it, and on the weights. So the hash of a page covers the hash of
the page before it, and the first page's covers the root: the base model, the adapter, a salt and the dtype. An adapter
that changes only later tokens (aLoRA) is covered from the page of its first token on.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.content_hash import piece_digests
from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.folder import read_settings

_HASH_BYTES = 16
_REVISION_CHARACTERS = 16  # as in an adapter's revision
_CONFIG, _INDEX, _WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"


class PrefixRoot(NamedTuple):
    """Everything besides the tokens that the keys and values of a sequence depend on.

    Attributes:
        base_revision: content of the base model (see `base_revision`).
        adapter_revision: content of the adapter, never its name or path; "" for the base model.
        salt: sequences with different salts share nothing, so that response times reveal nothing about other tenants.
        dtype: dtype of keys and values.
    """

    base_revision: str
    adapter_revision: str
    salt: str
    dtype: str

    def digest(self) -> bytes:
        """Return the hash before the first page's. Each field is preceded by its length, so that different
        roots never have the same bytes.
        """
        state = hashlib.blake2b(digest_size=_HASH_BYTES, person=b"ranklet root")
        for field in self:
            content = field.encode("utf-8", "surrogatepass")  # JSON strings may hold lone surrogates
            state.update(len(content).to_bytes(8, "little") + content)
        return state.digest()


def page_hashes(
    root: PrefixRoot, ids: NDArray[np.integer], known: Sequence[bytes] = (), adapted_from: int = 0
) -> list[bytes]:
    """Return the hashes of a sequence's full pages that follow the known ones.

    Args:
        ids: all tokens of the sequence, from the first on.
        known: hashes of its first pages.
        adapted_from: number of its leading tokens that the base model computes. Pages of such tokens only have the
            hashes that they have without the adapter.
    """
    start, stop = len(known) * PAGE_TOKENS, len(ids) // PAGE_TOKENS * PAGE_TOKENS
    if start >= stop:
        return []
    content = np.asarray(ids[start:stop], dtype="<i4").tobytes()
    size = 4 * PAGE_TOKENS
    first = root._replace(adapter_revision="") if adapted_from else root
    last = known[-1] if known else first.digest()
    turn = adapted_from // PAGE_TOKENS * PAGE_TOKENS - start if adapted_from else -1
    hashes = []
    for at in range(0, len(content), size):
        if 4 * turn == at:  # the place too: with another one, the same tokens have other keys and values
            place = adapted_from.to_bytes(8, "little")
            last = hashlib.blake2b(last + root.digest() + place, digest_size=_HASH_BYTES).digest()
        last = hashlib.blake2b(last + content[at : at + size], digest_size=_HASH_BYTES).digest()
        hashes.append(last)
    return hashes


def sharable_pages(tokens: int) -> int:
    """Return how many pages a sequence may take from the cache: its last token is always computed, for its logits."""
    return (tokens - 1) // PAGE_TOKENS


def base_revision(model_dir: Path) -> str:
    """Read a base model's config and weights and return their revision, 16 hexadecimal digits.

    It covers every byte, as an adapter's revision does: a model and its fine-tuned successor have equal sizes and
    safetensors headers, and times differ between nodes with the same files. Eight threads hash about 10 GB/s, and the
    weights were just read, so they come from the page cache: 1 to 2 s for 8B parameters, without the GIL.

    Raises:
        ModelError: a file cannot be read.
    """
    whole = hashlib.sha256()
    weight_map = read_settings(model_dir / _INDEX).get("weight_map")
    shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {_WEIGHTS}
    for name in (_CONFIG, *sorted(shards)):
        try:
            size, digests = piece_digests(model_dir / name)
        except OSError as error:
            raise ModelError(f"{model_dir / name}: cannot be read: {error}") from error
        whole.update(f"{name}:{size};".encode() + digests)
    return whole.hexdigest()[:_REVISION_CHARACTERS]
