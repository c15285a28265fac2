"""Time of attention over keys and values in pages, in CUDA graphs.

`decode`: one token of each sequence, as a share of the rate at which the GPU copies memory. Launches use different
pages, so that the keys and values come from memory and not from the L2 cache. `shared`: the same for sequences that
begin with one of some system prompts, each sequence read alone (`alone_us`) and in groups; the rate is that of reading
each page once. `prefill`: pieces of prompts behind tokens in pages, in TFLOP/s.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ranklet.kernels.paged_attention import decode, group_limit
from ranklet.kernels.paged_spans import PAGE_TOKENS, LayerPages, PagedSpans, PrefixGroups
from ranklet.kernels.prefill_attention import prefill
from ranklet.kernels.tuning.random_lora import gpu_ms, graphed
from ranklet.replicas.engine.prefix_groups import group_by_prefix
from tests.bench import report

SHAPES = {"Qwen3-0.6B": (16, 8), "Llama-3.1-8B": (32, 8)}
WIDTH = 128
BATCHES, LENGTHS = (1, 16, 64, 256), (128, 300, 640, 1000, 8192)
SHARED = (  # sequences, tokens of each, different system prompts, tokens of each system prompt
    (256, 1000, 256, 0), (256, 300, 256, 0), (256, 2096, 64, 2048), (256, 2096, 8, 2048), (256, 2096, 1, 2048),
    (256, 600, 64, 512), (256, 600, 1, 512), (64, 2096, 16, 2048), (64, 2096, 1, 2048), (16, 2096, 4, 2048),
    (16, 2096, 1, 2048), (4, 2096, 1, 2048), (4, 8240, 1, 8192), (64, 8240, 4, 8192), (256, 600, 64, 256),
)  # fmt: skip
PIECES = (  # pieces, tokens of each, tokens in pages before each
    (1, 2048, 0), (1, 1024, 2000), (1, 2048, 8192), (1, 2048, 30_000), (1, 1024, 30_000), (1, 512, 30_000),
    (1, 256, 30_000), (1, 64, 30_000), (1, 100, 8000), (1, 64, 8000), (64, 32, 0), (32, 512, 0), (64, 128, 8000),
)  # fmt: skip
LAUNCH_BYTES = 300e6  # keys and values of the launches in a graph, several times the L2 cache
MOST_LAYERS = 28


def copied_bytes_per_s(device: torch.device, count: int) -> float:
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / (gpu_ms(lambda: target.copy_(source), rep_ms=50) * 1e-3)


def make_pages(layers: int, count: int, keys: int, device: torch.device, dtype: torch.dtype) -> list[LayerPages]:
    """Return pages of random keys and values. They are drawn in place, because a batch of 8,192 tokens is large."""
    states = torch.empty(layers, 2, count, keys, PAGE_TOKENS, WIDTH, device=device, dtype=dtype)
    for part in states.flatten(0, 1):
        part.normal_()
    return [LayerPages(*both.unbind()) for both in states]


def decoded(
    name: str, batch: int, length: int, copied: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    heads = SHAPES[name]
    held = -(-length // PAGE_TOKENS)
    size = 2 * batch * length * heads[1] * WIDTH * dtype.itemsize
    layers = max(1, min(MOST_LAYERS, int(LAUNCH_BYTES // size) + 1)) if device.type == "cuda" else 1
    pages = make_pages(layers, batch * held, heads[1], device, dtype)
    table = torch.randperm(batch * held, device=device).view(batch, held).int()
    each = torch.ones(batch, dtype=torch.int32, device=device)
    spans = PagedSpans(torch.arange(batch, dtype=torch.int32, device=device), each, each * length, table, 1)
    qkv = torch.randn(batch, (heads[0] + 2 * heads[1]) * WIDTH, device=device).to(dtype)
    out = torch.empty(batch, heads[0] * WIDTH, device=device, dtype=dtype)

    def run() -> None:
        for layer in pages:
            decode(qkv, spans, layer, heads, None, out)

    us = gpu_ms(graphed(run)) * 1e3 / layers
    return {"part": "decode", "model": name, "what": f"{batch} x {length}", "us": us, "rate": size / us * 1e6 / copied}


def shared(
    name: str, case: tuple[int, int, int, int], copied: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    heads, (batch, length, prompts, common) = SHAPES[name], case
    held, whole = -(-length // PAGE_TOKENS), common // PAGE_TOKENS
    size = 2 * (prompts * common + batch * (length - common)) * heads[1] * WIDTH * dtype.itemsize
    layers = max(1, min(MOST_LAYERS, int(LAUNCH_BYTES // size) + 1)) if device.type == "cuda" else 1
    pages = make_pages(layers, batch * held, heads[1], device, dtype)
    table = torch.randperm(batch * held).view(batch, held)
    table[:, :whole] = table[:prompts, :whole].repeat_interleave(batch // prompts, 0)
    each = torch.ones(batch, dtype=torch.int32)
    grouped = group_by_prefix(np.arange(batch), (each * length).numpy(), table.int().numpy(), group_limit(heads))
    rows, lengths, own, *groups = (torch.from_numpy(array).to(device) for array in grouped)
    alone = PagedSpans(rows.int(), each.to(device), lengths, own, 1)
    qkv = torch.randn(batch, (heads[0] + 2 * heads[1]) * WIDTH, device=device).to(dtype)
    out = torch.empty(batch, heads[0] * WIDTH, device=device, dtype=dtype)

    def us(spans: PagedSpans) -> float:
        def run() -> None:
            for layer in pages:
                decode(qkv, spans, layer, heads, None, out)

        return gpu_ms(graphed(run)) * 1e3 / layers

    taken_us, alone_us = us(replace(alone, groups=PrefixGroups(*groups))), us(alone)
    what = f"{batch} x {length}, {prompts} prompts of {common}"
    rate = size / taken_us * 1e6 / copied
    return {"part": "shared", "model": name, "what": what, "us": taken_us, "rate": rate, "alone_us": alone_us}


def prefilled(
    name: str, pieces: int, count: int, past: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    heads, length = SHAPES[name], count + past
    held = -(-length // PAGE_TOKENS)
    (pages,) = make_pages(1, pieces * held, heads[1], device, dtype)
    table = torch.randperm(pieces * held, device=device).view(pieces, held).int()
    rows = torch.arange(pieces, dtype=torch.int32, device=device) * count
    each = torch.ones(pieces, dtype=torch.int32, device=device)
    spans = PagedSpans(rows, each * count, each * length, table, count)
    qkv = torch.randn(pieces * count, (heads[0] + 2 * heads[1]) * WIDTH, device=device).to(dtype)
    out = torch.empty(pieces * count, heads[0] * WIDTH, device=device, dtype=dtype)
    us = gpu_ms(graphed(lambda: prefill(qkv, spans, pages, heads, None, out))) * 1e3
    flops = 4 * heads[0] * WIDTH * pieces * (count * past + count * (count + 1) / 2)
    what = f"{pieces} x {count} behind {past}"
    return {"part": "prefill", "model": name, "what": what, "us": us, "rate": flops / us / 1e6}


def measure(*, tiny: bool) -> Iterator[dict[str, Any]]:
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda:0" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    copied = copied_bytes_per_s(device, 1 << (20 if tiny else 30))
    yield {"part": "copy", "model": "", "what": "GB/s", "us": 0.0, "rate": copied / 1e9}
    for name in SHAPES:
        for batch in BATCHES[:1] if tiny else BATCHES:
            for length in LENGTHS[:2] if tiny else LENGTHS:
                yield decoded(name, batch, length, copied, device, dtype)
        for case in ((4, 200, 2, 128),) if tiny else SHARED:
            yield shared(name, case, copied, device, dtype)
        for pieces, count, past in ((2, 20, 70),) if tiny else PIECES:
            yield prefilled(name, pieces, count, past, device, dtype)


def main() -> None:
    parser = report.parser(__doc__, "attention-h200")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, a smoke test")
    options = parser.parse_args()
    report.save(options.name, list(measure(tiny=options.tiny)), options.out)


if __name__ == "__main__":
    main()
