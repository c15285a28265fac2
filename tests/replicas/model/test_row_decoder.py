"""Steps against the whole sequences in float64, with adapters merged into the weights."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ranklet.kernels import csgmv, native
from ranklet.kernels.batch import LoraBatch, cut, plan
from ranklet.kernels.packs import PACKS
from ranklet.kernels.paged_spans import PAGE_TOKENS, LayerPages, PagedSpans
from ranklet.kernels.stack import LinearStack
from ranklet.replicas.engine.tile_tables import tiled
from ranklet.replicas.model import row_decoder
from ranklet.replicas.model.attention import AttentionBatch
from ranklet.replicas.model.decoder import Decoder, DeviceBatch, Stacks
from ranklet.replicas.model.row_decoder import RowDecoder
from tests.bench.decode_step import RandomDecoder
from tests.bench.shapes import decoder
from tests.kernels import oracle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # the interpreter multiplies no bfloat16
TOLERANCE = 2e-2 if torch.cuda.is_available() else 1e-4
SHAPE = decoder(
    "Qwen3Model", layers=2, hidden=48, heads=3, kv_heads=1, head_dim=32, intermediate=96, vocab=50
)  # widths as odd as SmolLM2's
RANKS = {0: 4, 1: 16, 2: 9}
TOKENS, SEQUENCES = 4, 4
SLOTS: list[int | None] = [2, 0, 1, None]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> RandomDecoder:
    if not torch.cuda.is_available():
        monkeypatch.setattr(row_decoder, "supports", lambda _: True)
    return RandomDecoder(SHAPE, DEVICE, DTYPE)


def adapters_of(layer: int) -> dict[str, oracle.Adapters]:
    dims = SHAPE.module_dims()
    return {
        pack: oracle.random_adapters(
            {slot: (rank,) * len(modules) for slot, rank in RANKS.items()}, dims[modules[0]][0],
            [dims[name][1] for name in modules], dtype=DTYPE, seed=layer,
        )
        for pack, modules in PACKS.items()
    }  # fmt: skip


def stack_of(pack: str, adapters: oracle.Adapters) -> LinearStack:
    dims = SHAPE.module_dims()
    widths = [dims[name][1] for name in PACKS[pack]]
    return oracle.linear_stack(adapters, 3, 16, dims[PACKS[pack][0]][0], widths, stale=0.0, device=str(DEVICE))


def states_of(model: Decoder, ids: Tensor, slot: int | None) -> Tensor:
    """Return the states of one sequence before the final norm, float64 [tokens, H]."""
    shape, heads, width = SHAPE, SHAPE.heads + 2 * SHAPE.kv_heads, SHAPE.head_dim
    x = model.embedding.cpu().double()[ids]
    rotary = model.rotary(model.layers[0], torch.arange(len(ids)))
    cos, sin = (table.cpu().double()[: len(ids), None] for table in (rotary.cos, rotary.sin))
    for i, layer in enumerate(model.layers):
        adapters = adapters_of(i)

        def project(pack: str, y: Tensor, weight: Tensor, of: dict[str, oracle.Adapters] = adapters) -> Tensor:
            return oracle.linear(y, weight.cpu(), None, [slot] * len(y), of[pack])

        def norm(y: Tensor, weight: Tensor) -> Tensor:
            return functional.rms_norm(y, y.shape[-1:], weight.cpu().double(), shape.eps)

        qkv = project("qkv", norm(x, layer.input_norm), layer.qkv.weight).view(len(ids), heads, width)
        queries, keys, values = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
        assert layer.qk_norms is not None
        turned = []
        for part, weight in zip((queries, keys), layer.qk_norms, strict=True):
            low, high = norm(part, weight).chunk(2, -1)
            turned.append(torch.cat((low * cos - high * sin, high * cos + low * sin), -1).transpose(0, 1))
        attended = functional.scaled_dot_product_attention(
            turned[0], turned[1], values.transpose(0, 1), is_causal=True, enable_gqa=True
        )
        x = x + project("o", attended.transpose(0, 1).flatten(1), layer.o.weight)
        gate, up = project("gate_up", norm(x, layer.post_norm), layer.gate_up.weight).chunk(2, 1)
        x = x + project("down", functional.silu(gate) * up, layer.down.weight)
    return x


class Steps:
    """Steps of `SEQUENCES` sequences, whose pages are in no order."""

    def __init__(self, model: RandomDecoder) -> None:
        self.rows = RowDecoder(model)
        self.ids = torch.randint(SHAPE.vocab, (SEQUENCES, TOKENS), dtype=torch.int32)
        found = [{pack: stack_of(pack, of) for pack, of in adapters_of(i).items()} for i in range(SHAPE.layers)]
        self.stacks = [Stacks(**stacks) for stacks in found]
        size = (SHAPE.layers, 2, SEQUENCES, SHAPE.kv_heads, PAGE_TOKENS, SHAPE.head_dim)
        self.pages = [LayerPages(kv[0], kv[1]) for kv in torch.zeros(size, dtype=DTYPE, device=DEVICE)]
        self.table = np.array([[2], [0], [3], [1]])

    def batch(self, begins: list[int], ends: list[int]) -> tuple[DeviceBatch, dict[int, slice]]:
        """Return a step of these tokens of the sequences, and the rows of each sequence that has some.

        One token is a decode, more are a piece of a prompt.
        """
        counts = np.subtract(ends, begins)
        some = counts.nonzero()[0]
        order, lora = plan(counts[some].tolist(), [SLOTS[each] for each in some])
        used = some[order]
        starts = np.cumsum(counts[used]) - counts[used]
        positions = np.concatenate([np.arange(begins[each], ends[each]) for each in used])
        owners = used.repeat(counts[used])

        def spans(chosen: NDArray[np.bool_]) -> PagedSpans | None:
            if not chosen.any():
                return None
            of, rows = used[chosen], on_device(starts[chosen])
            lengths = on_device(np.take(ends, of))
            return PagedSpans(rows, on_device(counts[of]), lengths, on_device(self.table[of]), TOKENS)

        attention = AttentionBatch(
            chunks=spans(counts[used] > 1), decodes=spans(counts[used] == 1),
            kv_slots=on_device(self.table[owners, 0] * PAGE_TOKENS + positions),
        )  # fmt: skip
        tiles = tuple(tiles.to(DEVICE) for tiles in cut(lora, padded=True))
        batch = DeviceBatch(
            on_device(self.ids[owners, positions]), on_device(positions), attention,
            LoraBatch(lora.segments, lora.rows, tiles=tiles, padded=True),
        )  # fmt: skip
        ranges = zip(used.tolist(), starts.tolist(), counts[used].tolist(), strict=True)
        return batch, {each: slice(start, start + count) for each, start, count in ranges}

    def forward(self, batch: DeviceBatch) -> Tensor:
        return self.rows.forward(batch, self.stacks, None, self.pages)


def on_device(values: Any) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    "ends", [[[i] * SEQUENCES for i in range(TOKENS + 1)], [[0, 0, 0, 0], [0, 2, 3, 1], [4, 3, 4, 2], [4, 4, 4, 4]]],
    ids=["token by token", "with pieces of prompts"],
)  # fmt: skip
def test_steps_give_the_states_of_whole_sequences(model: RandomDecoder, ends: list[list[int]]) -> None:
    steps = Steps(model)
    found: list[list[Tensor]] = [[] for _ in range(SEQUENCES)]
    for before, after in pairwise(ends):
        batch, rows = steps.batch(before, after)
        states = steps.forward(batch).cpu().double()
        for each, own in rows.items():
            found[each].append(states[own])
    for each, slot in enumerate(SLOTS):
        wanted = states_of(model, steps.ids[each].long(), slot)
        assert (torch.cat(found[each]) - wanted).norm() <= TOLERANCE * wanted.norm()


@pytest.mark.gpu
def test_a_replayed_step_gives_the_bits_of_a_launched_one(model: RandomDecoder) -> None:
    steps = Steps(model)
    batch, _ = steps.batch([0] * SEQUENCES, [1] * SEQUENCES)
    launched = steps.forward(batch).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = steps.forward(batch)
    for _ in range(100):
        graph.replay()
        assert torch.equal(replayed, launched)


def test_unsupported_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="Hopper"):
        RowDecoder(RandomDecoder(SHAPE, torch.device("cpu"), torch.float32))


@pytest.mark.parametrize(
    ("decodes", "prompt", "adapters", "wanted"),
    [
        (256, 0, 0, True), (257, 0, 0, False), (256, 0, 64, True), (255, 64, 0, False), (0, 64, 0, False),
        (0, 64, 1, True), (200, 56, 4, True), (200, 56, 5, False), (200, 64, 16, True), (200, 64, 17, False),
        (0, 1024, 1, True), (0, 1025, 1, False),
    ],
)  # fmt: skip
def test_batches_that_take_less_time(decodes: int, prompt: int, adapters: int, wanted: bool) -> None:
    lengths = [1] * decodes + [prompt] * (prompt > 0)
    lora = plan(lengths, [i % adapters if adapters else None for i in range(len(lengths))])[1]
    for backend in (csgmv, native):
        batch = tiled(replace(lora, implementation=backend if adapters else None), lora.rows, padded=True)

        def suits(hidden: int, rank: int, of: LoraBatch = batch) -> bool:
            return row_decoder.suits(of, hidden, rank, only_decodes=not prompt)

        assert suits(1024, 64) == (wanted and (backend is csgmv or not adapters))
        assert suits(1024, 128) == (suits(1024, 64) and not prompt)
        assert suits(4096, 64) == (suits(1024, 64) and lora.rows <= 256)
