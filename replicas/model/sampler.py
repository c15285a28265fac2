"""Draws tokens from logits, and computes logprobs.

Letters: N rows of logits, V vocabulary, R rows of the state.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.adjust import MOST_COUNTED, SamplingTables, adjusted
from ranklet.kernels.logprobs import largest_logprobs, logprobs_at, target_logprobs, top_logprobs
from ranklet.kernels.sample import finish, noise_of, scaled, scan
from ranklet.kernels.sampling_row import CHANGING, ROW_WIDTH, Column, Feature
from ranklet.kernels.truncate import draw_truncated, truncated
from ranklet.replicas.model.sampling_values import SamplingValues

MAX_EDITS: Final = 2048  # tokens of one sequence that have a bias or are banned


class Sampled(NamedTuple):
    """Tokens of one step, on the device.

    Attributes:
        tokens: int32 [N]; -1 if the row's logits have NaN or infinity, or if no token may be drawn.
        logprobs: float32 [N]: logprob of the token in the unchanged logits.
        top_ids: int32 [N, TOP_LOGPROBS], the largest first, ties by the lower id. Any values in rows that did not ask.
        top_logprobs: float32 [N, TOP_LOGPROBS].
    """

    tokens: Tensor
    logprobs: Tensor | None
    top_ids: Tensor | None
    top_logprobs: Tensor | None


class TokenLogprobs(NamedTuple):
    """Logprobs of given tokens: [N], and the largest of each row as in `Sampled`."""

    logprobs: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None


class Sampler:
    """Draws a token for each row of logits, and keeps the state of each sequence on the device.

    A table of the state is allocated when a sequence first needs it. All methods use the current stream.

    Args:
        vocab: number of token ids of the base model.
        rows: number of sequences; the state has one row more, which fillers use.
        added: number of token ids beyond these, which some logits have.
    """

    def __init__(self, vocab: int, rows: int, device: torch.device, added: int = 0) -> None:
        self._vocab = vocab
        self._widest = vocab + added
        self._rows = rows
        self._device = device
        self._pins = device.type == "cuda"
        self._tables = SamplingTables()

    @property
    def tables(self) -> SamplingTables:
        return self._tables

    def state_bytes(self, features: Feature) -> int:
        """Return the size of the tables that steps with these features read."""
        return sum(2 * rows * width if name == "counts" else 4 * rows * width
                   for name, (rows, width) in self._shapes(features).items())  # fmt: skip

    @torch.inference_mode()
    def prepare(self, features: Feature) -> None:
        """Allocate the tables that steps with these features read. Needed before the capture of a CUDA graph.

        Raises:
            RuntimeError: a graph is being captured, and a table is missing.
        """
        missing = {name: shape for name, shape in self._shapes(features).items() if getattr(self._tables, name) is None}
        if not missing:
            return
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"call prepare({features!r}) before the capture of a CUDA graph")
        made = {name: getattr(self._tables, name) for name in ("counts", "edits", "masks")}
        for name, shape in missing.items():
            dtype = torch.int16 if name == "counts" else torch.int32
            made[name] = torch.zeros(shape, dtype=dtype, device=self._device)
        if "edits" in missing:
            made["edits"] = made["edits"].view(self._rows + 1, 3, MAX_EDITS)
        self._tables = SamplingTables(**made)

    @torch.inference_mode()
    def begin(
        self, row: int, values: SamplingValues, prompt_ids: NDArray[np.int32], output_ids: NDArray[np.int32]
    ) -> None:
        """Set a row of the state for a sequence that starts, or starts again after a preemption.

        Args:
            output_ids: tokens that the sequence has drawn so far.
        """
        features = values.features
        self.prepare(features)
        if features & Feature.PENALIZE and self._tables.counts is not None:
            counts = self._tables.counts[row].zero_()
            counts.index_fill_(0, self._to_device(prompt_ids.astype(np.int64)), -MOST_COUNTED - 1)
            ids, times = np.unique(output_ids, return_counts=True)
            drawn = np.minimum(times, MOST_COUNTED).astype(np.int16)
            counts.index_add_(0, self._to_device(ids.astype(np.int64)), self._to_device(drawn))
        if features & Feature.EDIT and self._tables.edits is not None:
            edits = values.edits()
            if edits.shape[1] > MAX_EDITS:
                raise ValueError(f"expected at most {MAX_EDITS} edited tokens, got {edits.shape[1]}")
            self._tables.edits[row, :, : edits.shape[1]].copy_(self._to_device(edits))
        if values.allowed_token_ids is not None:
            allowed = np.asarray(values.allowed_token_ids, dtype=np.int64)
            words = np.zeros(-(-self._widest // 32), dtype=np.uint32)
            np.bitwise_or.at(words, allowed // 32, np.uint32(1) << (allowed % 32).astype(np.uint32))
            self._write_masks([row], words.view(np.int32)[None])

    @torch.inference_mode()
    def set_masks(self, rows: Sequence[int], allowed: Sequence[NDArray[np.int32]]) -> None:
        """Write which of the base model's tokens sequences may draw, and no others. Returns before the copy.

        Bit t % 32 of word t // 32 allows token t.
        """
        words = np.zeros((len(rows), -(-self._widest // 32)), dtype=np.int32)
        np.stack(allowed, out=words[:, : len(allowed[0])])
        if self._vocab % 32:
            words[:, self._vocab // 32] &= (1 << self._vocab % 32) - 1
        self._write_masks(rows, words)

    def _write_masks(self, rows: Sequence[int], allowed: NDArray[np.int32]) -> None:
        self.prepare(Feature.MASK)
        if self._tables.masks is not None:
            words = torch.empty(allowed.shape, dtype=torch.int32, pin_memory=self._pins)
            words.copy_(torch.from_numpy(allowed))
            at = self._to_device(np.asarray(rows, dtype=np.int64))
            self._tables.masks.index_copy_(0, at, words.to(self._device, non_blocking=True))

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,  # float32 [N, V] or [N, V + added], not written
        columns: Tensor,  # int32 [N, ROW_WIDTH], contiguous
        features: Feature,
        last_token: Tensor | None = None,  # int32 [R + 1], written at each row of the state
    ) -> Sampled:
        """Draw a token for each row, and count it in the state.

        Args:
            features: all that any row asks for; a superset changes no token.
            last_token: takes the tokens; 0 for an invalid row, so that the next step can look up its embedding.
        """
        if logits.shape[1] not in (self._vocab, self._widest) or columns.shape != (len(logits), ROW_WIDTH):
            raise ValueError(
                f"expected logits [N, {self._vocab}] and columns [N, {ROW_WIDTH}], "
                f"got {tuple(logits.shape)} and {tuple(columns.shape)}"
            )
        self.prepare(features)
        draw = sample_by_kernels if logits.is_cuda else sample_by_torch
        return draw(logits, columns, self._tables, features, last_token)

    def _shapes(self, features: Feature) -> dict[str, tuple[int, int]]:
        asked = {"counts": (Feature.PENALIZE, self._widest), "edits": (Feature.EDIT, 3 * MAX_EDITS),
                 "masks": (Feature.MASK, -(-self._widest // 32))}  # fmt: skip
        return {name: (self._rows + 1, width) for name, (feature, width) in asked.items() if features & feature}

    def _to_device(self, array: NDArray[np.integer]) -> Tensor:
        if not self._pins:
            return torch.from_numpy(array)
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)


@torch.inference_mode()
def sample_by_kernels(
    logits: Tensor, columns: Tensor, tables: SamplingTables, features: Feature, last_token: Tensor | None
) -> Sampled:
    scanned = scan(logits, columns, tables, features)
    drawn = draw_truncated(logits, columns, scanned, features) if features & Feature.TRUNCATE else None
    tokens, logprobs = finish(logits, columns, scanned, drawn, tables.counts, last_token, features)
    tops = top_logprobs(logits, scanned, columns) if features & Feature.TOP else (None, None)
    return Sampled(tokens, logprobs, *tops)


@torch.inference_mode()
def sample_by_torch(
    logits: Tensor, columns: Tensor, tables: SamplingTables, features: Feature, last_token: Tensor | None
) -> Sampled:
    value = adjusted(logits, columns, tables, features) if features & CHANGING else logits
    is_valid = (value < torch.inf).all(1) & (value > -torch.inf).any(1)
    if features & Feature.NOISE:
        value = scaled(value, columns)
        if features & Feature.TRUNCATE:
            value = truncated(value, columns)
        value = value + noise_of(columns, logits.shape[1])
    tokens = torch.where(is_valid, value.argmax(1), -1).int()
    kept, possible = columns[:, Column.ROW].long(), tokens.clamp(min=0)
    if last_token is not None:
        last_token[kept] = possible
    if features & Feature.PENALIZE and tables.counts is not None:
        asks = ((columns[:, Column.FLAGS] & Feature.PENALIZE) != 0) & is_valid
        counts, at = tables.counts, (kept[asks], tokens[asks].long())
        counts[at] += ((counts[at] & MOST_COUNTED) < MOST_COUNTED).to(torch.int16)
    logprobs = None
    if features & Feature.LOGPROB:
        logprobs = torch.where(is_valid, logprobs_at(logits, possible), torch.nan)
    return Sampled(tokens, logprobs, *(largest_logprobs(logits) if features & Feature.TOP else (None, None)))


@torch.inference_mode()
def logprobs_of(
    logits: Tensor,  # float32 [N, V]
    targets: Tensor,  # int32 [N]
    top: int,
) -> TokenLogprobs:
    """Return the logprobs of given tokens and, if `top` is not 0, the largest of each row. NaN logits give NaN."""
    if not logits.is_cuda:
        return TokenLogprobs(logprobs_at(logits, targets), *(largest_logprobs(logits) if top else (None, None)))
    features = Feature.LOGPROB | (Feature.TOP if top else Feature(0))
    columns = torch.full((len(logits), ROW_WIDTH), int(features), dtype=torch.int32, device=logits.device)
    scanned = scan(logits, columns, SamplingTables(), features)
    tops = top_logprobs(logits, scanned, None) if top else (None, None)
    return TokenLogprobs(target_logprobs(logits, targets, scanned), *tops)
