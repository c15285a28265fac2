"""Frozen descriptions of adapters, shared by engines, replicas and gateways. Imports no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ranklet.replicas.adapters.invocation import Invocation
from ranklet.replicas.adapters.vector_head import VectorHead
from ranklet.replicas.model.classifier import MODEL_CONFIG_FILE
from ranklet.replicas.model.sentence_files import MODULE_FILES, MODULES_FILE, SETTINGS_FILES
from ranklet.replicas.model.tokenizer_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from ranklet.replicas.model.dense import DenseLayers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)  # the files that make an adapter's revision
TEMPLATE_FILE = "chat_template.jinja"
RANKLET_FILE = "ranklet.json"  # ranklet's own settings of an adapter
# These are part of it too, where a folder has them. Prompts, vectors and texts depend on them.
OPTIONAL_FILES = (TEMPLATE_FILE, *TOKENIZER_FILES, *SETTINGS_FILES, *MODULE_FILES, MODEL_CONFIG_FILE, RANKLET_FILE)
LISTING_FILE, LISTED_FILES = MODULES_FILE, MODULE_FILES  # a folder without the first has none of the others
RECENTLY_USED_S = 30.0  # a prefetch does not evict adapters that were used within this time


@dataclass(frozen=True)
class AdapterRef:
    """One revision of an adapter. Equality depends on name and revision, not on the folder.

    Attributes:
        name: the name that requests use.
        path: the adapter's folder.
        revision: hash of the files' content.
        marks: sizes and times of the files (see `marks_of`); "" where the files never change.
        invocation: the adapter changes a prompt's tokens from these on; None if it changes all.
        tokenizer: hash of its tokenizer files, "" without any; None if it is not known.
    """

    name: str
    path: str = field(compare=False)
    revision: str
    marks: str = field(default="", compare=False)
    invocation: Invocation | None = field(default=None, compare=False)
    tokenizer: str | None = field(default=None, compare=False)

    def __hash__(self) -> int:
        return hash(self.name)  # each step looks up each of its adapters several times


@dataclass(frozen=True)
class AdapterInfo:
    """A verified adapter in a slot.

    Attributes:
        end_ids: ids that end its texts, besides those of the base model.
        notes: what its folder has instead of the base model's settings, and what of it is not used.
        head: of a classifier. Only the engine's process has it, and the next.
        dense: layers on its vectors, perhaps none; None for those of the base model.
        invocation: as in `AdapterRef`.
        vocab: number of token ids; None for that of the base model.
    """

    name: str
    revision: str
    rank: int
    modules: tuple[str, ...]
    bytes: int
    end_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    head: VectorHead | None = field(default=None, compare=False, repr=False)
    dense: "DenseLayers | None" = field(default=None, compare=False, repr=False)
    invocation: Invocation | None = None
    vocab: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "head": None, "dense": None}


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """State of one revision of an adapter on one engine.

    Attributes:
        where: gpu, host, disk, loading or refused.
        references: number of requests that wait for the adapter or run with it.
        info: None if the adapter is in no slot.
        error: the reason for a refusal.
        marks: marks of the files that were read.
    """

    name: str
    revision: str
    where: str
    references: int = 0
    info: AdapterInfo | None = None
    error: str | None = None
    marks: str = ""


@dataclass(frozen=True, slots=True)
class HeldAdapters:
    """Names of the adapters that an engine holds at one moment; cheaper to make than a snapshot of a long queue."""

    resident: tuple[str, ...] = ()  # ready in a slot, most recently used last
    loading: tuple[str, ...] = ()  # being loaded into a slot
    hosted: tuple[str, ...] = ()  # in the host cache
    used_slots: int = 0  # slots whose adapter is loading or was used recently


@dataclass(frozen=True)
class LoadRecord:
    """One finished load. `tier` is where the adapter was found: host or disk; `error` is the code of a refusal."""

    adapter: str
    rank: int
    tier: str
    seconds: float
    error: str | None = None
