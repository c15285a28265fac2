"""One batch through the model: laid out on the CPU, launched on the device, its vectors fetched.

Letters: T tokens, B prompts, H hidden width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels import dispatch
from ranklet.kernels.batch import LoraBatch, cut, plan
from ranklet.kernels.crossover import crossovers, surface
from ranklet.kernels.merged import Merged
from ranklet.kernels.warm import warm
from ranklet.replicas.attention import Spans
from ranklet.replicas.model import Decoder, Tokens
from ranklet.replicas.pool import AdapterPool
from ranklet.replicas.pooling import Pooling

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """A batch on the device. `vectors` may be read after `wait`."""

    order: list[int]  # row i of `vectors` belongs to prompt order[i]
    backend: str
    vectors: Tensor  # float32 [B, H] on the host
    launched_s: float
    event: Any

    def wait(self) -> NDArray[np.float32]:
        """Block until the device is done: float32 [B, H], in the prompts' own order."""
        if self.event is not None:
            self.event.synchronize()
        out: NDArray[np.float32] = np.empty(self.vectors.shape, dtype=np.float32)
        out[self.order] = self.vectors.numpy()
        return out


class Stepper:
    """Runs batches of one model on one device."""

    def __init__(self, model: Decoder, pool: AdapterPool, pooling: Pooling, backend: str, merged_bytes: int) -> None:
        self._model = model
        self._pool = pool
        self._pooling = pooling
        self._backend = backend
        self._cuda = model.device.type == "cuda"
        known = crossovers(model.embedding.device.index)
        projections, hidden = pool.projections, pool.architecture.hidden
        measured = surface(known, dispatch.scope_of(projections), hidden)
        self._layer = dispatch.Layer(projections, pool.rank, self._cuda, measured)
        self._merged = Merged(merged_bytes)
        dispatch.BACKENDS["merged"] = self._merged
        self._count = np.arange(1, dtype=np.int32)

    def warm(self, longest: int, max_tokens: int) -> None:
        """Compile and load what prompts and batches of up to so many tokens need, so that no request waits for it."""
        if not self._cuda:
            return
        began_s = perf_counter()
        warm(self._pool.stacks_of_one_layer(), max_tokens)
        long = [np.zeros(longest, dtype=np.int32)] * max(1, max_tokens // longest)
        for prompts in ([np.zeros(1, dtype=np.int32)], long):
            self.launch(prompts, [None] * len(prompts)).wait()
        logger.info("kernels are warm after %.1f s", perf_counter() - began_s)

    @torch.inference_mode()
    def launch(self, prompts: Sequence[NDArray[np.int32]], slots: Sequence[int | None]) -> Running:
        """Start a batch; on CUDA it returns while the device works.

        Args:
            prompts: int32 [length] each.
            slots: the pool slot of each prompt's adapter, None for the base.
        """
        launched_s = perf_counter()
        order, lora = plan([len(prompt) for prompt in prompts], slots)
        lora = dispatch.choose(lora, self._layer, self._backend)
        self._merged.observe(lora)
        ids, positions, spans, lora = self._lay_out([prompts[i] for i in order], lora)
        states = self._model.forward(Tokens(ids, positions, spans, lora), self._pool.layers, self._pool.embedding)
        rows = self._model.final_norm(self._pooling.rows(states, spans))
        vectors = self._pooling.vectors(rows, spans)
        host, event = self._to_host(vectors)
        return Running(order, lora.backend, host, launched_s, event)

    def _lay_out(
        self, prompts: Sequence[NDArray[np.int32]], lora: LoraBatch
    ) -> tuple[Tensor, Tensor, Spans, LoraBatch]:
        """Ids, positions, offsets and tile tables in one buffer, so that they travel to the device in one copy."""
        lengths = tuple(len(prompt) for prompt in prompts)
        if len(self._count) < max(lengths):
            self._count = np.arange(max(lengths), dtype=np.int32)
        positions = [self._count[:length] for length in lengths]
        tiles = cut(lora) if lora.backend == "csgmv" else ()
        parts = (*prompts, *positions, np.array((0, *accumulate(lengths)), dtype=np.int32))
        tables = [array for kind in tiles for array in kind.arrays]
        parts = (*parts, *(array.reshape(-1) for array in tables))
        buffer = torch.empty(sum(map(len, parts)), dtype=torch.int32, pin_memory=self._cuda)
        np.concatenate(parts, out=buffer.numpy())
        moved = buffer.to(self._model.device, non_blocking=True)
        sizes = (sum(lengths), sum(lengths), len(lengths) + 1, *(array.size for array in tables))
        ids, places, offsets, *moved_tables = moved.split(sizes)
        placed = tuple(replace(kind, device=moved_tables[3 * i : 3 * i + 3]) for i, kind in enumerate(tiles))
        return ids, places, Spans(lengths, offsets), replace(lora, tiles=placed)

    def shed(self) -> None:
        """Give back device memory that is only there for speed."""
        self._merged.drop()
        if self._cuda:
            torch.cuda.empty_cache()

    def _to_host(self, vectors: Tensor) -> tuple[Tensor, Any]:
        if not self._cuda:
            return vectors, None
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        return host, torch.cuda.current_stream().record_event()
