"""Packs the arrays of a step into a single buffer, so that they reach the device in one copy.

Letters: T tokens, B sequences.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.powers import power_of_two
from ranklet.replicas.engine.bucket import Bucket
from ranklet.replicas.engine.tile_tables import TileShapes, all_tiles, placed, shapes_of, tiled
from ranklet.replicas.model.heads import Head

ChooseLast = Callable[[LoraBatch, Sequence[int]], LoraBatch]


class TokenSpan(NamedTuple):
    """The tokens of one sequence in a step.

    Attributes:
        ids: int32 [length].
        start: position of the first of these tokens in the sequence.
        head: computes the output from the hidden states of these tokens; None for no output.
        row: row of the sequence's pages; None if keys and values are not kept.
        scored: int32: tokens whose logprobs are computed from the first hidden states; None for none.
        top: number of best alternatives to each scored token.
        skipped: number of these tokens that pooling leaves out, the first ones.
    """

    ids: NDArray[np.int32]
    start: int
    head: Head | None
    row: int | None = None
    scored: NDArray[np.int32] | None = None
    top: int = 0
    skipped: int = 0


def whole_prompts(prompts: Iterable[NDArray[np.int32]], head: Head) -> list[TokenSpan]:
    return [TokenSpan(ids, 0, head) for ids in prompts]


class DeviceArrays(NamedTuple):
    """The arrays of a layout on the device."""

    ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    offsets: Tensor  # int32 [B + 1]
    skipped: Tensor | None  # int32 [B]
    lora: LoraBatch  # with its tile tables
    last: LoraBatch | None


@dataclass(frozen=True, slots=True)
class Layout:
    """A packed step.

    Attributes:
        lengths: tokens of each sequence, fillers of a padded step included.
        longest: upper bound on `lengths`.
        lora: LoRA of every token.
        last: LoRA of the last token of each sequence; None if the last layer computes all tokens.
        skips: whether pooling leaves out tokens of any sequence.
        buffer: int32: ids, positions, offsets, the numbers of skipped tokens if there are any, then the tile tables of
            `lora` and `last`. Pinned for a GPU.
    """

    lengths: tuple[int, ...]
    longest: int
    lora: LoraBatch
    last: LoraBatch | None
    skips: bool
    buffer: Tensor

    @classmethod
    def pack(
        cls, spans: Sequence[TokenSpan], lora: LoraBatch, choose_last: ChooseLast | None,
        bucket: Bucket | None = None, *, pinned: bool = False,
    ) -> "Layout":  # fmt: skip
        """Pack spans into a layout.

        Args:
            spans: in the order of the rows of `lora`.
            choose_last: makes the LoRA batch of the sequences' last tokens; None if all rows are needed.
            bucket: size to pad the step to, with filler sequences behind the others.
        """
        lengths = tuple(len(span.ids) for span in spans)
        longest, tokens = max(lengths), sum(lengths)
        if bucket is not None:
            lengths, longest = bucket.filled(lengths), bucket.longest
        padded = bucket is not None
        lora = tiled(lora, sum(lengths), padded=padded)
        last = None if choose_last is None else tiled(choose_last(lora, lengths), len(lengths), padded=padded)
        count = _positions(power_of_two(max(span.start + len(span.ids) for span in spans)))
        # Fillers get position 0: one may be longer than the model's longest prompt.
        filler = np.zeros(lora.rows - tokens, dtype=np.int32)
        parts = [span.ids for span in spans] + [filler]
        parts += [count[span.start : span.start + len(span.ids)] for span in spans]
        parts += [filler, np.array((0, *accumulate(lengths)), dtype=np.int32)]
        skips = any(span.skipped for span in spans)
        if skips:
            skipped = np.zeros(len(lengths), dtype=np.int32)
            skipped[: len(spans)] = [span.skipped for span in spans]
            parts.append(skipped)
        parts += [array.reshape(-1) for tiles in all_tiles(lora, last) for array in tiles.arrays]
        buffer = torch.empty(sum(map(len, parts)), dtype=torch.int32, pin_memory=pinned)
        np.concatenate(parts, out=buffer.numpy())
        return cls(lengths, longest, lora, last, skips, buffer)

    def unpack(self, moved: Tensor) -> DeviceArrays:
        tiles = all_tiles(self.lora, self.last)
        tokens, count = sum(self.lengths), len(self.lengths)
        tables = (array.size for kind in tiles for array in kind.arrays)
        ids, positions, offsets, skipped, *parts = moved.split(
            (tokens, tokens, count + 1, count if self.skips else 0, *tables)
        )
        lora, last = placed(self.lora, self.last, parts)
        return DeviceArrays(ids, positions, offsets, skipped if self.skips else None, lora, last)

    @property
    def tile_shapes(self) -> TileShapes:
        return shapes_of(self.lora, self.last)


@cache
def _positions(size: int) -> NDArray[np.int32]:
    return np.arange(size, dtype=np.int32)
