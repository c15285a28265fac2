"""Verifies a PEFT folder completely before any of it is served.

Serving an adapter with a key that matches no module, or a module without its keys, would give the base model's vectors
or wrong ones. Both are findings. All findings are reported together.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ranklet.replicas.adapters.adapter import AdapterRows, AdapterWeights, LoraWeight
from ranklet.replicas.adapters.added_tokens import check_rows
from ranklet.replicas.adapters.column_terms import StoredTerms, check_terms, read_terms
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.findings import Checked, collect, join, shorten
from ranklet.replicas.adapters.folder_check import FolderDifferences, notes_on
from ranklet.replicas.adapters.fused import divide, parts_of
from ranklet.replicas.adapters.invocation import check_activated
from ranklet.replicas.adapters.links import check_links
from ranklet.replicas.adapters.magnitudes import check_magnitudes
from ranklet.replicas.adapters.own_rows import StoredRows, read_rows, split_rows, within_vocabulary
from ranklet.replicas.adapters.peft_config import LoraSettings, read_peft_config
from ranklet.replicas.adapters.pinned_memory import Allocate, pageable
from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef
from ranklet.replicas.adapters.revision import files_in, marks_of
from ranklet.replicas.adapters.safetensors_file import DTYPES, FLOATS, read_tensors
from ranklet.replicas.adapters.safetensors_header import StoredTensor, UnreadableWeightsError, read_header
from ranklet.replicas.adapters.saved_head import read_head
from ranklet.replicas.adapters.tensor_names import (
    EMBEDDING_MODULE,
    HEAD_MODULE,
    full_names,
    parse_key,
    parse_term,
)
from ranklet.replicas.adapters.tied_head import tied
from ranklet.replicas.adapters.tokenizer_check import ComparedTokenizer
from ranklet.replicas.errors import AdapterChanged, AdapterNotFound, InvalidAdapter
from ranklet.replicas.model.added_tokens import AddedToken
from ranklet.replicas.model.modules import ALL_MODULES, EMBED_TOKENS, LM_HEAD, Module
from ranklet.replicas.model.tokenizer_files import UnusableTokenError

Pairs = dict[Module, dict[str, StoredTensor]]  # the tensors of each module, by side: A or B


def read_adapter(ref: AdapterRef, expected: ExpectedModules, allocate: Allocate = pageable) -> AdapterWeights:
    """Read and verify an adapter folder.

    Args:
        allocate: makes the memory for the weights.

    Raises:
        AdapterNotFound: the folder does not exist.
        AdapterChanged: its files are no longer those of the reference.
        InvalidAdapter: it cannot be served; the error lists every reason.
        Unavailable: comparing its tokenizer with the base model's takes too much time.
    """
    folder = Path(ref.path)
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter {ref.name!r}: expected a folder, {ref.path!r} does not exist", param="model")
    adapter, findings = collect(_verify(ref, folder, expected, allocate))
    is_other = not findings and adapter is not None and adapter.invocation != ref.invocation
    if is_other or (ref.marks and marks_of(folder) != ref.marks):
        raise AdapterChanged(f"adapter {ref.name!r}: its files have changed while they were read. Try again")
    if findings or adapter is None:
        raise InvalidAdapter(ref.name, findings)
    return adapter


def _verify(
    ref: AdapterRef, folder: Path, expected: ExpectedModules, allocate: Allocate
) -> Checked[AdapterWeights | None]:
    outside = list(check_links(folder, files_in(folder), expected.roots))
    if outside:
        yield from outside
        return None
    base = expected.base_folder
    comparison = None if base is None else base.compare_tokenizer(ref)  # while the weights are read
    differences = FolderDifferences() if base is None else (yield from base.check(folder))
    adapter = yield from _read_all(ref, folder, expected, allocate)
    compared = ComparedTokenizer() if comparison is None else comparison.result()
    yield from compared.findings
    end_ids = yield from _end_ids(folder, compared.added, expected)
    if adapter is None:
        return None
    yield from check_rows(compared.added, adapter.rows.vocab(expected.architecture.vocab))
    notes = differences.notes + notes_on(compared.added) + adapter.notes
    return replace(adapter, end_ids=end_ids, notes=notes, dense=differences.dense)


def _read_all(
    ref: AdapterRef, folder: Path, expected: ExpectedModules, allocate: Allocate
) -> Checked[AdapterWeights | None]:
    """Read and check the config and the weights; returns the adapter without what other files say."""
    path, notes = folder / WEIGHTS_FILE, tuple[str, ...]()
    config = yield from read_peft_config(folder / CONFIG_FILE, expected.bases)
    stored = yield from _read_header(path)
    names = full_names([tensor.key for tensor in stored or ()], expected.every_module())
    settings = (yield from config.apply(names.values())) if config is not None else None
    if settings is None or stored is None:
        return None
    try:
        stored_rows, others = yield from split_rows(stored)
        head, lora = yield from read_head(path, others, expected.architecture.hidden, expects=settings.classifies)
        pairs, stored_terms = yield from _match(lora, names.keys())
        ties = settings.ties_head and expected.head is not None and expected.head.ties and HEAD_MODULE in names
        ties = ties and EMBED_TOKENS not in settings.tokens.saved  # the copy has no LoRA
        yield from _check_targets(pairs, names, settings, expected, ties=ties)
        yield from check_activated(settings.invocation, pairs.keys(), expected.architecture.vocab)
        notes += _head_notes(pairs, expected, ties=ties)
        if expected.head is None:
            pairs.pop(HEAD_MODULE, None)
            stored_terms.pop(HEAD_MODULE, None)
        sound: Pairs = {}
        for module, sides in pairs.items():
            rank = settings.rank(names[EMBEDDING_MODULE if ties and module == HEAD_MODULE else module])
            shapes = _shapes(module, rank, stored_rows, expected)
            if (yield from _check_pair(names[module], sides, rank, shapes, expected.max_rank)):
                sound[module] = sides
        adapter = _read(ref, path, sound, names, settings, expected.embedding.dtype, allocate)
        usable = yield from check_terms(
            stored_terms, pairs.keys(), names, settings, expected.linears, expected.widths, expected.modules
        )
        if ties and settings.uses_dora:
            yield "use_dora: not supported beside ensure_weight_tying; train the adapter with one of them"
        if ties:
            adapter = yield from tied(adapter, settings.scaling(names[HEAD_MODULE]))
        notes += yield from check_magnitudes(adapter, names, alone=not (stored_terms or stored_rows))
        has_head = HEAD_MODULE in names
        rows = yield from read_rows(path, stored_rows, adapter.weights, settings.tokens, expected, has_head=has_head)
        if rows and settings.invocation is not None:  # rows count for all tokens, LoRA only for the last ones
            yield "alora_invocation_tokens: not supported beside trained rows of tokens; train the adapter without them"
        yield from _check_rows_beside_terms(rows, adapter, settings)
        adapter = divide(
            within_vocabulary(replace(adapter, rows=rows), expected.architecture.vocab), expected.architecture
        )
        if usable and len(sound) == len(pairs):
            linears, shape = expected.linears, expected.architecture
            terms = yield from read_terms(path, stored_terms, adapter, names, linears, shape)
            adapter = replace(adapter, terms=terms)
    except UnreadableWeightsError as error:
        yield str(error)
        return None
    return replace(adapter, notes=notes, head=head, invocation=settings.invocation)


def _check_rows_beside_terms(rows: AdapterRows, adapter: AdapterWeights, settings: LoraSettings) -> Checked[None]:
    """Yield fields whose column terms an adapter's own rows would not have."""
    for field, is_used in (("use_dora", settings.uses_dora), ("lora_bias", settings.has_lora_bias)):
        for module, own in ((EMBEDDING_MODULE, rows.embedding), (HEAD_MODULE, rows.head)):
            if is_used and own is not None and module in adapter.weights:
                yield f"{field}: not supported on {module[1]} beside trained rows of it; leave one of them out"


def _head_notes(pairs: Pairs, expected: ExpectedModules, *, ties: bool) -> tuple[str, ...]:
    if not ties and HEAD_MODULE not in pairs:
        return ()
    used = "it is left out" if expected.head is None else "texts do"
    return (f"{LM_HEAD}: embeddings do not use the LoRA of the head; {used}",)


def _end_ids(folder: Path, added: Sequence[AddedToken], expected: ExpectedModules) -> Checked[tuple[int, ...]]:
    if expected.head is None or expected.end_of_text is None:
        return ()
    try:
        return expected.end_of_text.adapter_ids(folder, {token.content: token.id for token in added})
    except UnusableTokenError as error:
        yield str(error)
        return ()


def _read_header(path: Path) -> Checked[list[StoredTensor] | None]:
    if not path.is_file():
        yield _missing_weights(path)
        return None
    try:
        return read_header(path)
    except UnreadableWeightsError as error:
        yield str(error)
        return None


def _missing_weights(path: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in path.parent.glob(pattern))
    if pickles:
        return (
            f"{shorten(pickles[0])}: pickle is never read; expected {path.name} (PEFT: safe_serialization=True), which "
            "`ranklet adapters convert` makes"
        )
    return f"{path.name}: expected the weights that PEFT saves; the file is missing"


def _match(stored: Iterable[StoredTensor], modules: Collection[Module]) -> Checked[tuple[Pairs, StoredTerms]]:
    pairs: Pairs = {}
    terms: StoredTerms = {}
    unmatched = []
    for tensor in stored:
        term = parse_term(tensor.key)
        if term is not None and term[0] in modules:
            if term[1] in terms.setdefault(term[0], {}):
                yield f"{tensor.key}: a second tensor for layer {term[0][0]} {term[0][1]}; expected one"
            terms[term[0]][term[1]] = tensor
            continue
        found = parse_key(tensor.key)
        if found is None or found.module not in modules:
            unmatched.append(tensor.key)
            continue
        sides = pairs.setdefault(found.module, {})
        if found.side in sides:
            yield f"{tensor.key}: a second tensor for layer {found.module[0]} {found.module[1]}; expected one"
        sides[found.side] = tensor
    if unmatched:
        yield f"{len(unmatched)} tensors match no module of the base model: {join(unmatched)}"
    return pairs, terms


def _check_targets(
    pairs: Pairs, names: dict[Module, str], settings: LoraSettings, expected: ExpectedModules, *, ties: bool
) -> Checked[None]:
    whole = settings.tokens.saved  # PEFT puts no LoRA on them
    targeted = {module for module, name in names.items() if settings.targets(name) and module[1] not in whole}
    if ties:
        targeted.add(EMBEDDING_MODULE)
    if ties or expected.head is None:  # with or without tensors of the head
        targeted = (targeted - {HEAD_MODULE}) | (pairs.keys() & {HEAD_MODULE})
    missing = [names[module] for module in targeted - pairs.keys()]
    if missing:
        yield f"{len(missing)} modules that target_modules names have no tensors: {join(missing)}"
    untargeted = [names[module] for module in pairs.keys() - targeted]
    if untargeted:
        yield f"{len(untargeted)} modules have tensors but target_modules leaves them out: {join(untargeted)}"
    if not pairs:
        yield f"target_modules: expected some of {', '.join(ALL_MODULES)}; no tensor belongs to one"
    unserved = sorted(parts_of(name for _, name in pairs) - {LM_HEAD, *expected.modules})
    if unserved:
        yield f"{', '.join(unserved)}: this server keeps no slots for them; add them to engine.lora_modules"
    adapts_head = expected.head is not None and (ties or HEAD_MODULE in pairs)
    if adapts_head and LM_HEAD not in expected.modules:
        yield (
            f"{LM_HEAD}: this server keeps no slots for it; add it to engine.lora_modules, which takes "
            f"{math.ceil(expected.head_bytes / 1e6)} MB of device memory for {expected.slots} slots"
        )


def _shapes(
    module: Module, rank: int, rows: StoredRows, expected: ExpectedModules
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B. Beside a whole matrix with more tokens than the base's, they have as many."""
    a, b = expected.shapes(module[1], rank)
    if module == EMBEDDING_MODULE:
        return (rank, rows.vocab(module[1], a[1])), b
    return (a, (rows.vocab(module[1], b[0]), rank)) if module == HEAD_MODULE else (a, b)


def _check_pair(
    name: str, sides: dict[str, StoredTensor], rank: int, shapes: Iterable[tuple[int, int]], max_rank: int
) -> Checked[bool]:
    sound = True
    if rank > max_rank:
        sound = False
        yield f"{name}: expected a rank of at most {max_rank} (engine.max_rank), got {shorten(str(rank))}"
    for side, shape in zip("AB", shapes, strict=True):
        tensor = sides.get(side)
        if tensor is not None and tensor.shape == shape and tensor.dtype in DTYPES:
            continue
        sound = False
        if tensor is None:
            yield f"{name}: expected lora_A and lora_B, lora_{side} is missing"
        elif tensor.shape != shape:
            yield f"{name}: lora_{side}: expected shape {shorten(str(list(shape)))}, got {list(tensor.shape)}"
        else:
            yield f"{name}: lora_{side}: expected {FLOATS}, got {tensor.dtype}"
    return sound


def _read(
    ref: AdapterRef, path: Path, pairs: Pairs, names: dict[Module, str], settings: LoraSettings, dtype: torch.dtype,
    allocate: Allocate,
) -> AdapterWeights:  # fmt: skip
    tensors = (tensor for sides in pairs.values() for tensor in sides.values())
    flat, offsets = read_tensors(path, tensors, dtype, allocate)
    weights = {}
    for module, sides in pairs.items():
        a, b = sides["A"], sides["B"]
        weights[module] = LoraWeight(
            flat, offsets[a.key], offsets[b.key], a.shape[0], a.shape[1], b.shape[0], settings.scaling(names[module])
        )  # fmt: skip
    return AdapterWeights(ref, flat, weights)
