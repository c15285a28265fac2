"""Reads the rows of the token embedding and the head that an adapter has of its own.

PEFT's rules:

- `trainable_token_indices` names tokens, and the file has their rows. In a tied model, the head gets those of the
  embedding, unless it has other tokens of its own.
- `modules_to_save` makes a copy of the embedding or the head, also in a tied model, unless `ensure_weight_tying` ties
  both copies. The copy has no LoRA.
- Other whole matrices in a file are those of the model that was trained, which then may differ from the served one.

Of whole matrices, the rows that differ from the base's are kept. Each row is completed with what LoRA adds to it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ranklet.kernels.token_rows import PAGE, pages_for
from ranklet.replicas.adapters.adapter import AdapterRows, AdapterWeights, LoraWeight, OwnRows
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.findings import Checked, shorten, show
from ranklet.replicas.adapters.magnitudes import is_finite
from ranklet.replicas.adapters.own_stream import own_stream
from ranklet.replicas.adapters.packed_rows import rows_taken_by
from ranklet.replicas.adapters.safetensors_file import DTYPES, FLOATS, read_tensor
from ranklet.replicas.adapters.safetensors_header import StoredTensor
from ranklet.replicas.adapters.tensor_names import (
    EMBEDDING_MODULE,
    HEAD_MODULE,
    UNUSED_WHOLE,
    parse_some_rows,
    parse_whole,
)
from ranklet.replicas.adapters.token_settings import TokenSettings
from ranklet.replicas.model.modules import EMBED_TOKENS, LM_HEAD, Module

_AT_ONCE = 1 << 22  # numbers of a matrix that are read and compared at once
_MODULES = {EMBED_TOKENS: EMBEDDING_MODULE, LM_HEAD: HEAD_MODULE}
_Rows = dict[str, OwnRows]  # by name of the matrix


@dataclass(slots=True)
class StoredRows:
    """The tensors of a file with rows: of all tokens, and of those that the config names, each by matrix."""

    whole: dict[str, StoredTensor] = field(default_factory=dict)
    some: dict[str, StoredTensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.whole or self.some)

    def vocab(self, name: str, base: int) -> int:
        """Return the number of rows of a matrix of the model that was trained."""
        shapes = [self.whole[each].shape for each in (name, *_MODULES) if each in self.whole]
        return max(base, shapes[0][0]) if shapes and shapes[0] else base


def split_rows(stored: Iterable[StoredTensor]) -> Checked[tuple[StoredRows, list[StoredTensor]]]:
    """Find the tensors with rows, and return the others too."""
    found, others = StoredRows(), []
    preferences: dict[str, int] = {}
    for tensor in stored:
        name, whole = parse_some_rows(tensor.key), parse_whole(tensor.key)
        if name is not None:
            if found.some.setdefault(name, tensor) is not tensor:
                yield f"{shorten(tensor.key)}: a second tensor for {name}; expected one"
        elif whole is None:
            others.append(tensor)
        elif whole[1] < min(UNUSED_WHOLE, preferences.get(whole[0], UNUSED_WHOLE)):
            found.whole[whole[0]], preferences[whole[0]] = tensor, whole[1]
        elif whole[1] == preferences.get(whole[0]):
            yield f"{shorten(tensor.key)}: a second tensor for {whole[0]}; expected one"
    return found, others


def read_rows(
    path: Path, stored: StoredRows, weights: Mapping[Module, LoraWeight], settings: TokenSettings,
    expected: ExpectedModules, *, has_head: bool,
) -> Checked[AdapterRows]:  # fmt: skip
    """Read and check rows.

    Args:
        weights: the adapter's LoRA.
        has_head: whether the model that was trained had a head.

    Raises:
        UnreadableWeightsError: the file cannot be read.
    """
    head = expected.head if has_head else None
    bases = {EMBED_TOKENS: expected.embedding} | ({} if head is None else {LM_HEAD: head.weight})
    ties = head is not None and head.ties
    whole: _Rows = {}
    for name, tensor in stored.whole.items():
        if name in bases:
            own = yield from _differing(path, tensor, bases[name], expected)
            if own is not None:
                whole[name] = own
    some = yield from _trained(path, stored.some, settings, bases, expected, ties=ties)
    if ties and bases[LM_HEAD].data_ptr() == expected.embedding.data_ptr():
        yield from _tie_whole(whole, stored, settings)
    if not (ties and settings.ensures_tying and stored.whole):
        for name in sorted(settings.saved & bases.keys() - stored.whole.keys()):
            yield f"modules_to_save: expected the weights of {name}, the file has none"
    joined: dict[tuple[int, int], OwnRows | None] = {}
    complete: dict[str, OwnRows | None] = {}
    for name in bases:
        parts = whole.get(name), some.get(name)
        own = joined.setdefault((id(parts[0]), id(parts[1])), _joined(*parts))
        lora = weights.get(_MODULES[name])
        if name in settings.indices and name in stored.some and lora is not None:
            yield f"trainable_token_indices: {name} has LoRA too; PEFT refuses both"
        complete[name] = own if own is None or lora is None else _with_lora(own, lora, looked_up=name == EMBED_TOKENS)
    rows = AdapterRows(complete[EMBED_TOKENS], complete.get(LM_HEAD))
    yield from _check_new(rows, expected.architecture.vocab)
    yield from _check_room(rows, expected)
    return rows


def within_vocabulary(adapter: AdapterWeights, vocab: int) -> AdapterWeights:
    """Leave the LoRA of tokens beyond the base's out, whose rows contain it."""
    weights = dict(adapter.weights)
    embedding, head = weights.get(EMBEDDING_MODULE), weights.get(HEAD_MODULE)
    if embedding is not None and embedding.in_features > vocab:
        kept = embedding.a[:, :vocab].reshape(-1)
        embedding.flat[embedding.a_offset :][: len(kept)] = kept
        weights[EMBEDDING_MODULE] = replace(embedding, in_features=vocab)
    if head is not None and head.out_features > vocab:
        weights[HEAD_MODULE] = replace(head, out_features=vocab)
    return replace(adapter, weights=weights)


def _differing(path: Path, stored: StoredTensor, base: Tensor, expected: ExpectedModules) -> Checked[OwnRows | None]:
    """Return the rows that differ from the base's, up to the rounding of either's dtype; None if none does.

    Reads and keeps little of the matrix at once, since several loads may read one.
    """
    key, (vocab, width), added = shorten(stored.key), base.shape, expected.added_tokens
    if len(stored.shape) != 2 or stored.shape[0] < vocab or stored.shape[1] != width:
        yield f"{key}: expected the base's {[vocab, width]}, got {show(list(stored.shape))}; its vocabulary differs"
        return None
    if stored.shape[0] > vocab + added:
        yield (
            f"{key}: expected rows of at most {added} tokens (engine.added_tokens) beyond the base's {vocab}, got "
            f"{stored.shape[0] - vocab}"
        )
        return None
    if stored.dtype not in DTYPES:
        yield f"{key}: expected {FLOATS}, got {shorten(stored.dtype)}"
        return None
    at_once, count = max(1, _AT_ONCE // width), 0
    ids, rows = list[Tensor](), list[Tensor]()
    with own_stream(base.device):
        for first in range(0, stored.shape[0], at_once):
            own, ours = read_tensor(path, stored.rows(first, first + at_once)), base[first : first + at_once]
            differs = torch.ones(len(own), dtype=torch.bool)  # the base has no rows beyond its own
            same_dtype = own[: len(ours)].to(base.device).to(base.dtype)
            differs[: len(ours)] = (same_dtype != ours.to(own.dtype).to(base.dtype)).any(1).cpu()
            found = differs.nonzero()[:, 0]
            count += len(found)
            if count <= _room(expected):
                ids.append(found + first)
                rows.append(own[found].to(base.dtype))
    if count > _room(expected):
        yield _too_many(key, count, expected)
        return None
    return (yield from _finite(key, OwnRows(torch.cat(ids).int(), torch.cat(rows)))) if count else None


def _trained(
    path: Path, stored: Mapping[str, StoredTensor], settings: TokenSettings, bases: Mapping[str, Tensor],
    expected: ExpectedModules, *, ties: bool,
) -> Checked[_Rows]:  # fmt: skip
    """Read the rows that `trainable_token_indices` names."""
    indices = dict(settings.indices)
    shares = False
    if ties and EMBED_TOKENS in indices:
        shares = indices.setdefault(LM_HEAD, indices[EMBED_TOKENS]) == indices[EMBED_TOKENS]
        if LM_HEAD in settings.saved:
            yield f"trainable_token_indices: of a tied model, PEFT cannot use it beside {LM_HEAD} in modules_to_save"
        if settings.ensures_tying and not shares:
            yield "trainable_token_indices: expected the same ids for both, since ensure_weight_tying ties them"
    found: _Rows = {}
    for name in bases:
        if name in stored and name not in indices:
            yield f"{shorten(stored[name].key)}: expected none, since trainable_token_indices leaves out {name}"
        elif name in stored:
            own = yield from _read_trained(path, stored[name], indices[name], bases[name], expected)
            if own is not None:
                found[name] = own
        elif name in indices and not (shares and name == LM_HEAD):
            yield f"trainable_token_indices: expected trainable_tokens_delta of {name}, the file has none"
    if shares and EMBED_TOKENS in found:
        if LM_HEAD in found and not _equal(found[LM_HEAD], found[EMBED_TOKENS]):
            yield f"{LM_HEAD}: expected the rows of {EMBED_TOKENS}, to which it is tied, got others"
        found[LM_HEAD] = found[EMBED_TOKENS]
    return found


def _read_trained(
    path: Path, stored: StoredTensor, ids: tuple[int, ...], base: Tensor, expected: ExpectedModules
) -> Checked[OwnRows | None]:
    key, (vocab, width), added = shorten(stored.key), base.shape, expected.added_tokens
    outside = [each for each in ids if not 0 <= each < vocab + added]
    if outside:
        yield (
            f"trainable_token_indices: expected ids from 0 to {vocab - 1}, and {added} more (engine.added_tokens), "
            f"got {outside[0]}"
        )
    elif len(set(ids)) != len(ids):
        ((twice, _),) = Counter(ids).most_common(1)
        yield f"trainable_token_indices: expected each id once, got {twice} more than once"
    elif stored.shape != (len(ids), width):
        yield f"{key}: expected shape {[len(ids), width]}, got {show(list(stored.shape))}"
    elif stored.dtype not in DTYPES:
        yield f"{key}: expected {FLOATS}, got {shorten(stored.dtype)}"
    elif len(ids) > _room(expected):
        yield _too_many(key, len(ids), expected)
    else:
        rows, increasing = read_tensor(path, stored), sorted(ids)
        if list(ids) != increasing:
            rows = rows[torch.tensor(ids).argsort()]
        own = OwnRows(torch.tensor(increasing, dtype=torch.int32), rows.to(base.dtype))
        return (yield from _finite(key, own))
    return None


def _finite(key: str, own: OwnRows) -> Checked[OwnRows | None]:
    if is_finite(own.rows):
        return own
    served = str(own.rows.dtype).removeprefix("torch.")
    yield f"{key}: expected numbers finite in {served}, got NaN or infinity"
    return None


def _tie_whole(whole: _Rows, stored: StoredRows, settings: TokenSettings) -> Checked[None]:
    """Give embedding and head of a tied model the same rows, unless one of them was made a matrix of its own."""
    if settings.saved and not settings.ensures_tying:
        return
    embedding, head = whole.get(EMBED_TOKENS), whole.get(LM_HEAD)
    both = stored.whole.keys() >= {EMBED_TOKENS, LM_HEAD}
    if both and not (embedding is head or (embedding and head and _equal(embedding, head))):
        yield f"{LM_HEAD}: expected the rows of {EMBED_TOKENS}, to which it is tied, got others"
    shared = embedding or head
    if shared is not None:
        whole[EMBED_TOKENS] = whole[LM_HEAD] = shared


def _equal(one: OwnRows, other: OwnRows) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.rows, other.rows)


def _joined(whole: OwnRows | None, some: OwnRows | None) -> OwnRows | None:
    """Return the rows of both; where both have a token, those of `some`."""
    if whole is None or some is None:
        return whole or some
    kept = ~torch.isin(whole.ids, some.ids)
    ids, order = torch.cat([whole.ids[kept], some.ids]).sort()
    return OwnRows(ids, torch.cat([whole.rows[kept], some.rows])[order])


def _with_lora(own: OwnRows, lora: LoraWeight, *, looked_up: bool) -> OwnRows:
    ids = own.ids.long()
    inner, outer = (lora.a[:, ids].t(), lora.b.t()) if looked_up else (lora.b[ids], lora.a)
    added = inner.float() @ outer.float()
    return OwnRows(own.ids, torch.add(own.rows.float(), added, alpha=lora.scaling).to(own.rows.dtype))


def _check_new(rows: AdapterRows, base: int) -> Checked[None]:
    """Check the rows of tokens beyond those of the base model."""
    vocab = rows.vocab(base)
    if vocab > base and rows.embedding is not None and int((rows.embedding.ids >= base).sum()) != vocab - base:
        yield f"{EMBED_TOKENS}: expected rows of all tokens from {base} to {vocab - 1}, since the base has none of them"
    if rows.head is not None and int(rows.head.ids[-1]) >= vocab:
        yield f"{LM_HEAD}: expected rows of tokens up to {vocab - 1}, as {EMBED_TOKENS} has, got {rows.head.ids[-1]}"


def _check_room(rows: AdapterRows, expected: ExpectedModules) -> Checked[None]:
    needed = rows_taken_by(rows)
    if needed > _room(expected):
        yield _too_many(f"{EMBED_TOKENS} and {LM_HEAD}", needed, expected)


def _room(expected: ExpectedModules) -> int:
    return pages_for(expected.token_rows) * PAGE


def _too_many(name: str, rows: int, expected: ExpectedModules) -> str:
    rows = pages_for(rows) * PAGE
    row_bytes = expected.embedding.shape[1] * expected.embedding.element_size()
    return (
        f"{name}: {rows} rows differ from the base's, {_megabytes(rows * row_bytes)}; this server keeps "
        f"{expected.token_rows} (engine.token_rows), {_megabytes(expected.token_rows * row_bytes)}. Raise it, or train "
        "single tokens"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
