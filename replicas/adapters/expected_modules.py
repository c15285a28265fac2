"""What an adapter is verified against."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ranklet.kernels.stack import padded_rank
from ranklet.replicas.adapters.folder_check import BaseFolder
from ranklet.replicas.adapters.tensor_names import EMBEDDING_MODULE
from ranklet.replicas.config import DEFAULT_ADDED_TOKENS, DEFAULT_TOKEN_ROWS
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.base_linears import BaseLinears
from ranklet.replicas.model.end_of_text import EndOfText
from ranklet.replicas.model.lm_head import LmHead
from ranklet.replicas.model.modules import EMBED_TOKENS, LM_HEAD, Module


@dataclass(frozen=True)
class ExpectedModules:
    """The modules, shapes and base model that an adapter is verified against.

    Attributes:
        bases: names (fnmatch patterns) of the base model.
        embedding: the base model's token embedding [vocab, hidden], on any device.
        head: the base model's head. Without one, LoRA on `lm_head` changes no answer and is not read.
        end_of_text: finds the tokens that end an adapter's texts; None leaves them out, and checks no files but the
            config and the weights.
        slots: number of slots on the device.
        roots: folders that links in an adapter's folder may lead to.
        linears: the base model's linear modules, which DoRA and trained biases refer to.
        token_rows: number of rows of tokens that adapters may have of their own.
        added_tokens: number of token ids beyond the base model's.
    """

    architecture: Architecture
    max_rank: int
    modules: tuple[str, ...]
    bases: tuple[str, ...]
    embedding: Tensor
    head: LmHead | None = None
    end_of_text: EndOfText | None = None
    slots: int = 1
    roots: tuple[Path, ...] = ()
    linears: BaseLinears = field(default_factory=BaseLinears)
    token_rows: int = DEFAULT_TOKEN_ROWS
    added_tokens: int = DEFAULT_ADDED_TOKENS

    @cached_property
    def base_folder(self) -> BaseFolder | None:
        if self.end_of_text is None:
            return None
        return BaseFolder(self.end_of_text.model_dir, self.architecture.max_position, self.architecture.hidden)

    def prepare(self) -> None:
        """Get ready to compare tokenizers, on a thread of its own, if adapters' texts or added tokens may need that."""
        if self.base_folder is not None and (self.head is not None or self.added_tokens):
            self.base_folder.prepare()

    @property
    def head_bytes(self) -> int:
        """Return the device memory that slots for `lm_head` take."""
        elements = padded_rank(self.max_rank) * sum(self.architecture.dims(LM_HEAD))
        return self.slots * elements * self.embedding.element_size()

    @property
    def widths(self) -> dict[str, int]:
        """Return the output columns of each module."""
        names = (*self.architecture.stored_modules(), EMBED_TOKENS, LM_HEAD)
        return {name: self.architecture.dims(name)[1] for name in names}

    def every_module(self) -> list[Module]:
        """Return every module of the decoder that LoRA may target."""
        linear = self.architecture.stored_modules()
        return [EMBEDDING_MODULE, *((i, name) for i in range(self.architecture.layers) for name in linear)]

    def shapes(self, name: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B of a module of this name at this rank."""
        wide, out = self.architecture.dims(name)
        return (rank, wide), (out, rank)
