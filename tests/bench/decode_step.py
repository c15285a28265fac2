"""Time of one step that makes one token a request: layers, attention over pages, norm, head and argmax in a CUDA graph.

The weights are random, in the shapes of Qwen3-0.6B and Llama-3.1-8B. LoRA is on all seven projections, and consecutive
requests use different adapters. Without a GPU, nothing can be measured.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranklet.kernels.batch import LoraBatch, cut, plan
from ranklet.kernels.packs import PACKS
from ranklet.kernels.paged_spans import PAGE_TOKENS, LayerPages, PagedSpans
from ranklet.kernels.stack import LinearStack, SlotMeta
from ranklet.kernels.tuning.compile import compile_all
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.attention import AttentionBatch
from ranklet.replicas.model.decoder import Decoder, DeviceBatch, Layer, Projection, Stacks
from ranklet.replicas.model.row_decoder import RowDecoder
from tests.bench import report
from tests.bench.shapes import LLAMA_31_8B, QWEN3_EMBEDDING_06B

COPY_BYTES_PER_S = 4.29e12
REPLAYS, ROUNDS = 5, 7
MOST_ADAPTERS = 32


class Work(NamedTuple):
    rows: int
    context: int
    adapters: tuple[int, ...]


WORKS = (
    Work(1, 640, (0, 1)), Work(16, 640, (0, 1, 4, 16)), Work(64, 640, (0, 32)), Work(256, 288, (0, 1, 4, 32)),
    Work(256, 640, (0, 1, 4, 32)),
)  # fmt: skip
SHAPES = {"Qwen3-0.6B": QWEN3_EMBEDDING_06B, "Llama-3.1-8B": LLAMA_31_8B}


class RandomDecoder(Decoder):
    """A decoder with random weights, which it does not read from a folder."""

    def __init__(self, shape: Architecture, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.architecture, self.device, self.dtype = shape, device, dtype
        self.embedding = self._draw(shape.vocab, shape.hidden)
        angles = torch.outer(
            torch.arange(8192, device=device), 1e6 ** -torch.linspace(0, 1, shape.head_dim // 2, device=device)
        )
        tables = angles.cos(), angles.sin()
        self.layers = [self._layer(tables) for _ in range(shape.layers)]
        self.norm = self._draw(shape.hidden) + 1

    def _draw(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype).mul_(size[-1] ** -0.5)

    def _layer(self, tables: tuple[Tensor, Tensor]) -> Layer:
        shape, dims = self.architecture, self.architecture.module_dims()

        def packed(pack: str) -> Projection:
            return Projection(self._draw(sum(dims[name][1] for name in PACKS[pack]), dims[PACKS[pack][0]][0]), None)

        norms = (self._draw(shape.head_dim) + 1, self._draw(shape.head_dim) + 1) if shape.qk_norm else None
        return Layer(
            self._draw(shape.hidden) + 1, packed("qkv"), norms, packed("o"), self._draw(shape.hidden) + 1,
            packed("gate_up"), packed("down"), None, tables,
        )  # fmt: skip


class DecodeStep:
    """The tensors of one work, and its step."""

    def __init__(self, decoder: RandomDecoder, rank: int) -> None:
        self._decoder, self._rows = decoder, RowDecoder(decoder)
        self._stacks = [self._random_stacks(rank) for _ in decoder.layers]

    def milliseconds(self, work: Work) -> dict[int, float]:
        """Return the time of a replayed step by number of adapters."""
        return {adapters: _replayed_ms(step) for adapters, step in self._steps(work)}

    def run(self, work: Work) -> None:
        for _, step in self._steps(work):
            step()

    def _steps(self, work: Work) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        shape, device = self._decoder.architecture, self._decoder.device
        held = math.ceil(work.context / PAGE_TOKENS)
        size = (shape.layers, 2, work.rows * held, shape.kv_heads, PAGE_TOKENS, shape.head_dim)
        kv = torch.empty(size, device=device, dtype=self._decoder.dtype).normal_()
        pages = [LayerPages(layer[0], layer[1]) for layer in kv]
        table = torch.randperm(work.rows * held, device=device).int().view(work.rows, held)
        lengths = torch.full((work.rows,), work.context, dtype=torch.int32, device=device)
        spans = PagedSpans(
            torch.arange(work.rows, dtype=torch.int32, device=device), torch.ones_like(lengths), lengths, table, 1
        )
        last = work.context - 1
        slots = table[:, last // PAGE_TOKENS] * PAGE_TOKENS + last % PAGE_TOKENS
        ids = torch.randint(shape.vocab, (work.rows,), device=device, dtype=torch.int32)
        for adapters in work.adapters:
            attention = AttentionBatch(decodes=spans, kv_slots=slots)
            batch = DeviceBatch(ids, lengths - 1, attention, _lora(work.rows, adapters, device))
            yield adapters, partial(self._step, batch, pages)

    def floor_ms(self, work: Work, adapters: int, rank: int) -> float:
        """Return the time to read weights, keys, values and adapters once, at the rate of a copy."""
        shape = self._decoder.architecture
        dims = shape.module_dims().values()
        values = shape.layers * sum(wide * out for wide, out in dims) + shape.vocab * shape.hidden
        values += adapters * shape.layers * rank * sum(wide + out for wide, out in dims)
        values += work.rows * work.context * shape.layers * 2 * shape.kv_heads * shape.head_dim
        return values * 2 / COPY_BYTES_PER_S * 1e3

    def _step(self, batch: DeviceBatch, pages: list[LayerPages]) -> Tensor:
        states = self._rows.forward(batch, self._stacks, None, pages)
        normed = self._decoder.final_norm(states)
        return torch.mm(normed, self._decoder.embedding.t(), out_dtype=torch.float32).argmax(1)

    def _random_stacks(self, rank: int) -> Stacks:
        dims, device = self._decoder.architecture.module_dims(), self._decoder.device
        stacks = {}
        for pack, modules in PACKS.items():
            wide, widths = dims[modules[0]][0], tuple(dims[name][1] for name in modules)
            a = torch.randn(MOST_ADAPTERS, len(widths) * rank, wide, device=device, dtype=torch.bfloat16)
            b = torch.randn(MOST_ADAPTERS, sum(widths), rank, device=device, dtype=torch.bfloat16)
            size = (MOST_ADAPTERS, len(widths))
            stack = LinearStack(
                a.mul_(wide**-0.5), b.mul_(0.1), widths, torch.full(size, rank, dtype=torch.int32, device=device),
                torch.ones(size, device=device),
            )  # fmt: skip
            stack.meta[:] = [SlotMeta((rank,) * len(widths), (1.0,) * len(widths))] * MOST_ADAPTERS
            stacks[pack] = stack
        return Stacks(**stacks)


def _lora(rows: int, adapters: int, device: torch.device) -> LoraBatch:
    batch = plan([1] * rows, [i % adapters if adapters else None for i in range(rows)])[1]
    tiles = tuple(tiles.to(device) for tiles in cut(batch, padded=True))
    return LoraBatch(batch.segments, rows, tiles=tiles, padded=True)


def _replayed_ms(call: Callable[[], object]) -> float:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    found = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / REPLAYS)
    return float(median(found))


def _compile(job: tuple[Architecture, Work, int]) -> None:
    shape, work, rank = job
    with torch.inference_mode():
        short = replace(shape, layers=2, windows=(None, None))  # the first layer's rows have other parts of squares
        DecodeStep(RandomDecoder(short, torch.device("cuda", 0)), rank).run(work)


@torch.inference_mode()
def main() -> None:
    parser = report.parser(__doc__, "decode-step-h200")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    single = [work._replace(adapters=(adapters,)) for work in WORKS for adapters in work.adapters]
    jobs = [(shape, work, options.rank) for shape in SHAPES.values() for work in single]
    for job, worked in zip(jobs, compile_all(_compile, jobs), strict=True):
        if not worked:
            _compile(job)  # raises what the worker process has met
    for name, shape in SHAPES.items():
        step = DecodeStep(RandomDecoder(shape, torch.device("cuda", 0)), options.rank)
        for work in WORKS:
            found = step.milliseconds(work)
            for adapters, ms in found.items():
                floor = step.floor_ms(work, adapters, options.rank)
                row = {
                    "shapes": name, "batch": work.rows, "context": work.context, "adapters": adapters, "ms": ms,
                    "tokens_per_s": work.rows / ms * 1e3, "floor_ms": floor, "of base": ms / found[0],
                }  # fmt: skip
                rows.append(row)
                print(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()), flush=True)
        del step
        torch.cuda.empty_cache()
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
