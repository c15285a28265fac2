"""One batch through the model: laid out on the CPU, launched on the device, its vectors fetched.

Letters: T tokens, B prompts, H hidden width.
"""

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels import dispatch
from ranklet.kernels.batch import LoraBatch, cut, one_each, plan
from ranklet.kernels.cost_model import LoraLayer
from ranklet.kernels.crossover import crossovers, surface
from ranklet.kernels.precompile import precompile
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.engine.bucket import Bucket, is_full
from ranklet.replicas.engine.cuda_graphs import GraphCache
from ranklet.replicas.model import cudnn_attention
from ranklet.replicas.model.attention import Spans, reads_lengths_on_device
from ranklet.replicas.model.decoder import Decoder, DeviceBatch, StageCallback, ignore_stage
from ranklet.replicas.model.pooling import Pooling

logger = logging.getLogger(__name__)

_REPLAYED_TOKENS = 16_384  # larger batches keep the device busy longer than Python takes to launch them; see `Bucket`
_REHEARSED_TOKENS = (16, 300, 1100, 5000)
_REHEARSED_ADAPTERS = (1, 2, 8, 64)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A batch as it travels: `buffer` holds ids, positions, offsets, and the tiles' arrays."""

    lengths: tuple[int, ...]
    longest: int
    lora: LoraBatch
    last: LoraBatch | None  # of the prompts' last tokens, where pooling reads no others
    buffer: Tensor  # int32, pinned where there is a GPU


@dataclass(slots=True)
class Running:
    """A batch on the device. `vectors` may be read after `wait`."""

    order: list[int]  # row i of `vectors` belongs to prompt order[i]
    backend: str
    vectors: Tensor  # float32 [B, H] on the host
    launched_s: float
    took_s: float  # launching; on the CPU that is the whole computation
    events: tuple[Any, Any] | None  # of CUDA, before the batch and behind it

    def wait(self) -> NDArray[np.float32]:
        """Block until the device is done: float32 [B, H], in the prompts' own order."""
        if self.events is not None:
            self.events[1].synchronize()
        out: NDArray[np.float32] = np.empty(self.vectors.shape, dtype=np.float32)
        out[self.order] = self.vectors.numpy()
        return out

    def device_s(self) -> float:
        """How long the batch had the device; after `wait`."""
        return self.took_s if self.events is None else float(self.events[0].elapsed_time(self.events[1])) * 1e-3


def rehearsals(
    slots: int, longest: int, max_tokens: int, max_requests: int
) -> Iterator[tuple[list[int], list[int | None]]]:
    """Batches, as prompts' lengths and slots, that between them make a model launch every kernel in every form.

    Triton compiles a kernel anew for a number that is 1 or a multiple of 16: these are of one adapter and of several,
    with rows of the base and without, small and large.
    """
    for tokens in sorted({min(tokens, max_tokens) for tokens in (*_REHEARSED_TOKENS, max_tokens)}):
        for adapters in sorted({min(count, slots, tokens) for count in _REHEARSED_ADAPTERS}):
            for base in (0, 1):
                count = min(max(adapters + base, tokens // min(longest, 512)), max_requests, tokens)
                taken: list[int | None] = [i % adapters if i >= base else None for i in range(count)]
                yield [max(1, min(tokens // count, longest))] * count, taken


class Runner:
    """Runs batches of one model on one device."""

    def __init__(
        self, model: Decoder, pool: AdapterPool, pooling: Pooling, backend: str, merged_bytes: int, max_tokens: int
    ) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._pool = pool
        self._pooling = pooling
        self._backend = backend
        self._cuda = model.device.type == "cuda"
        known = crossovers(model.embedding.device.index)
        projections, hidden = pool.projections, pool.architecture.hidden
        measured = surface(known, dispatch.scope_of(projections), hidden)
        self.backends = dispatch.Backends(LoraLayer(projections, pool.rank, self._cuda, measured), merged_bytes)
        self._count = np.arange(1, dtype=np.int32)
        self._ragged = cudnn_attention.is_available(model.device) and model.dtype in (torch.bfloat16, torch.float16)
        self._replays = GraphCache(model.device) if self._cuda else None
        self._rounds = reads_lengths_on_device(model.device, model.dtype, model.architecture.windows)

    def warm(self, longest: int, max_requests: int) -> None:
        """Compile and load what prompts and batches of up to so many tokens need, so that no request waits for it.

        Not in float32, which is for comparisons: Triton takes seconds for each of some hundred kernels.
        """
        if not self._cuda or self._model.dtype == torch.float32:
            return
        began_s, max_tokens = perf_counter(), self._max_tokens
        if self._backend != "native":
            places = torch.zeros(max_tokens, dtype=torch.int32, device=self._model.device)
            rotary = self._model.rotary(self._model.layers[0], places)
            precompile(self._pool.stacks_of_one_layer(), max_tokens, rotary)
        if self._ragged:
            shape, model = self._model.architecture, self._model
            heads = (shape.heads, shape.kv_heads)
            cudnn_attention.build_graphs(model.device, max_requests, longest, heads, shape.head_dim, model.dtype)
        long = [np.zeros(longest, dtype=np.int32)] * max(1, max_tokens // longest)
        for prompts in ([np.zeros(1, dtype=np.int32)], long):
            self.launch(prompts, [None] * len(prompts)).wait()
        self._pool.compile_load()
        with self._pool.placeholder_adapters():
            for lengths, slots in rehearsals(self._pool.slots, longest, max_tokens, max_requests):
                self.launch([np.zeros(length, dtype=np.int32) for length in lengths], slots).wait()
            self.shed()  # what was kept of adapters that there are not
        logger.info("kernels are warm after %.1f s", perf_counter() - began_s)

    @torch.inference_mode()
    def launch(
        self, prompts: Sequence[NDArray[np.int32]], slots: Sequence[int | None], mark: StageCallback | None = None
    ) -> Running:
        """Start a batch; on CUDA it returns while the device works.

        Args:
            prompts: int32 [length] each.
            slots: the pool slot of each prompt's adapter, None for the base.
            mark: see `Decoder.forward`; a marked batch is never replayed.
        """
        launched_s = perf_counter()
        order, lora = plan([len(prompt) for prompt in prompts], slots)
        lora = self.backends.choose(lora, self._backend)
        self.backends.merged.observe(lora)
        rounds = self._rounds and lora.backend in ("csgmv", "none")
        worth = lora.rows <= _REPLAYED_TOKENS or (rounds and is_full(lora.rows, self._max_tokens))
        replayed = worth and self._replays is not None and mark is None
        padded = replayed and rounds
        layout = self._lay_out([prompts[i] for i in order], lora, padded=padded)
        began = self._mark()
        shape = self._shape(layout) if replayed else None
        if shape is None or self._replays is None:
            moved = layout.buffer.to(self._model.device, non_blocking=True)
            vectors = self._forward(layout, moved, mark or ignore_stage)
        else:
            vectors = self._replays.run(shape, layout.buffer, partial(self._forward, layout))
        host = self._to_host(vectors[: len(prompts)])
        ended = self._mark()
        events = (began, ended) if self._cuda else None
        return Running(order, lora.backend, host, launched_s, perf_counter() - launched_s, events)

    def _lay_out(self, prompts: Sequence[NDArray[np.int32]], lora: LoraBatch, *, padded: bool = False) -> _Layout:
        """Ids, positions, offsets and tile tables in one buffer, so that they travel to the device in one copy.

        Padded, it is laid out as every batch of its bucket is, prompts that nobody asked for behind the others.
        """
        lengths = tuple(len(prompt) for prompt in prompts)
        longest, asked = max(lengths), sum(lengths)
        if padded:
            bucket = Bucket.of(lengths, self._max_tokens)
            lengths, longest, lora = bucket.filled(lengths), bucket.longest, replace(lora, rows=bucket.tokens)
        if len(self._count) < longest:
            self._count = np.arange(longest, dtype=np.int32)
        positions = [self._count[: len(prompt)] for prompt in prompts]
        lora = _cut(lora, padded)
        last = _cut(self._last(lora, lengths), padded) if self._pooling.mode == "last" else None
        nothing = np.zeros(lora.rows - asked, dtype=np.int32)  # positions too: a filler may be too long for the model
        parts = (*prompts, nothing, *positions, nothing, np.array((0, *accumulate(lengths)), dtype=np.int32))
        tables = [array for batch in (lora, last) if batch for kind in batch.tiles for array in kind.arrays]
        parts = (*parts, *(array.reshape(-1) for array in tables))
        buffer = torch.empty(sum(map(len, parts)), dtype=torch.int32, pin_memory=self._cuda)
        np.concatenate(parts, out=buffer.numpy())
        return _Layout(lengths, longest, lora, last, buffer)

    def _last(self, lora: LoraBatch, lengths: Sequence[int]) -> LoraBatch:
        """The batch of the prompts' last tokens; weights are not merged for so few rows."""
        last = one_each(lora, lengths)
        return self.backends.choose(last) if lora.backend == "merged" else last

    def _forward(self, layout: _Layout, moved: Tensor, mark: StageCallback = ignore_stage) -> Tensor:
        """The batch's vectors, float32 [B, H], from its buffer on the device."""
        lengths, lora = layout.lengths, layout.lora
        kinds = [*lora.tiles, *(layout.last.tiles if layout.last else ())]
        sizes = (sum(lengths), sum(lengths), len(lengths) + 1, *(array.size for kind in kinds for array in kind.arrays))
        ids, places, offsets, *tables = moved.split(sizes)
        placed = [replace(kind, on_device=tables[3 * i : 3 * i + 3]) for i, kind in enumerate(kinds)]
        whole = replace(lora, tiles=tuple(placed[: len(lora.tiles)]))
        last = layout.last and replace(layout.last, tiles=tuple(placed[len(lora.tiles) :]))
        shape, padded = self._model.architecture, None
        if self._ragged:
            padded = cudnn_attention.cudnn_spans(offsets, len(lengths), (shape.heads, shape.kv_heads), shape.head_dim)
        tokens = DeviceBatch(ids, places, Spans(lengths, offsets, layout.longest, padded), whole, last)
        mark("begin")
        states = self._model.forward(tokens, self._pool.layers, self._pool.embedding, mark)
        rows = self._model.final_norm(states if last else self._pooling.rows(states, tokens.spans))
        vectors = self._pooling.vectors(rows, tokens.spans)
        mark("pool")
        return vectors

    def _shape(self, layout: _Layout) -> Hashable | None:
        """What the launches of a batch depend on besides device memory, None where they depend on too much.

        `csgmv` reads lengths, slots and ranks on the device: any batch of the bucket will do whose adapters have LoRA
        in the same places. `native` bakes them in: the same adapters in the same slots. `merged` keeps copies and
        scratch that come and go. Where attention reads lengths on the host, they must be the same too.
        """
        lora = layout.lora
        bucket = (lora.rows, len(layout.lengths), layout.longest) if self._rounds else layout.lengths
        contents = [self._pool.contents[segment.slot] for segment in lora.segments]
        if lora.backend == "csgmv":
            kinds = [*lora.tiles, *(layout.last.tiles if layout.last else ())]
            tiles = tuple((k.height, k.rows, len(k.table), len(k.runs), len(k.blocks)) for k in kinds)
            return bucket, tiles, frozenset().union(*(each.modules for each in contents))
        if lora.backend == "native":
            return layout.lengths, tuple(lora.segments), tuple(contents)
        return bucket if lora.backend == "none" else None

    def shed(self) -> None:
        """Give back device memory that is only there for speed."""
        self.backends.merged.drop()
        if self._replays is not None:
            self._replays.clear()
        if self._cuda:
            torch.cuda.empty_cache()

    def _to_host(self, vectors: Tensor) -> Tensor:
        if not self._cuda:
            return vectors
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        return host

    def _mark(self) -> Any:
        """An event at this place of the stream; None on the CPU."""
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if self._cuda else None


def _cut(batch: LoraBatch, padded: bool) -> LoraBatch:
    return replace(batch, tiles=cut(batch, padded=padded), padded=padded) if batch.backend == "csgmv" else batch
