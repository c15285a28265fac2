"""LoRA in float64, row by row, and stacks of random adapters to compare backends with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ranklet.kernels.stack import EmbeddingStack, LinearStack, SlotMeta


@dataclass(frozen=True)
class Lora:
    """One slice of one adapter."""

    a: Tensor  # [r, K]; of the embedding [r, V]
    b: Tensor  # [N, r]
    scaling: float


Adapters = dict[int, list[Lora]]  # by slot, one entry per slice; rank 0 if the slice is not targeted


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Sequence[int | None], adapters: Adapters) -> Tensor:
    """Return `W x + bias + s B A x` with each row's adapter, float64 [T, N]."""
    y = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    for t, slot in enumerate(rows):
        if slot is not None:
            y[t] += torch.cat(
                [lora.scaling * (lora.b.double() @ (lora.a.double() @ x[t].double())) for lora in adapters[slot]]
            )
    return y


def with_terms(y: Tensor, rows: Sequence[int | None], terms: Tensor) -> Tensor:
    """Return `gain * y + shift` with each row's slot of `terms` [S, 2, N]; rows of the base model as they are."""
    return torch.stack(
        [row if slot is None else row * terms[slot, 0] + terms[slot, 1] for row, slot in zip(y, rows, strict=True)]
    )


def give_terms(stack: LinearStack, slots: Sequence[int]) -> Tensor:
    """Give column terms to some slots of a stack. Returns those of all slots, float64 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    shape = (stack.b.shape[0], 2, stack.b.shape[1])
    terms = torch.tensor([1.0, 0.0])[None, :, None].repeat(shape[0], 1, shape[2])
    for slot in slots:
        terms[slot] += torch.randn(shape[1:], generator=generator)
        stack.meta[slot] = replace(stack.meta[slot], terms=True)
    stack.terms = terms.to(stack.b.device)
    return terms.double()


def embedding(ids: Tensor, table: Tensor, rows: Sequence[int | None], adapters: Adapters) -> Tensor:
    """Return `table[id] + s B A[:, id]` with each row's adapter, float64 [T, N]."""
    y = table.double()[ids]
    for t, slot in enumerate(rows):
        if slot is not None:
            (lora,) = adapters[slot]
            y[t] += lora.scaling * (lora.b.double() @ lora.a.double()[:, ids[t]])
    return y


def random_adapters(
    ranks: Mapping[int, Sequence[int]],
    wide: int,
    widths: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Adapters:
    """Draw adapters whose output is about as large as a base output of size 1. Each slice has a scaling of its own.

    Args:
        ranks: by slot, one per slice.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int, std: float) -> Tensor:
        return (std * torch.randn(rows, columns, generator=generator)).to(dtype)

    def slices(slot: int, by_slice: Sequence[int]) -> list[Lora]:
        scalings = [(0.5 + 0.25 * slot) * (1 - 0.25 * index) for index in range(len(by_slice))]
        return [
            Lora(draw(rank, wide, wide**-0.5), draw(width, rank, max(rank, 1) ** -0.5), scaling)
            for rank, width, scaling in zip(by_slice, widths, scalings, strict=True)
        ]

    return {slot: slices(slot, by_slice) for slot, by_slice in ranks.items()}


def linear_stack(
    adapters: Adapters, slots: int, rank: int, wide: int, widths: Sequence[int], *, stale: float, device: str = "cpu"
) -> LinearStack:
    """Return a stack that holds `adapters`.

    Args:
        stale: value of all other elements, as an earlier adapter may have left them.
    """
    dtype = next((lora.a.dtype for loras in adapters.values() for lora in loras), torch.float32)
    a = torch.full((slots, len(widths) * rank, wide), stale, dtype=dtype, device=device)
    b = torch.full((slots, sum(widths), rank), stale, dtype=dtype, device=device)
    stack = LinearStack(a, b, tuple(widths))
    for slot, loras in adapters.items():
        column = 0
        for index, (lora, width) in enumerate(zip(loras, widths, strict=True)):
            found = lora.a.shape[0]
            a[slot, index * rank : index * rank + found] = lora.a.to(device)
            b[slot, column : column + width, :found] = lora.b.to(device)
            column += width
        stack.describe(slot, _meta(loras))
    return stack


def embedding_stack(
    adapters: Adapters, slots: int, rank: int, vocab: int, width: int, *, stale: float, device: str = "cpu"
) -> EmbeddingStack:
    """Return a token embedding's stack that holds `adapters`; `stale` as in `linear_stack`."""
    dtype = next((loras[0].a.dtype for loras in adapters.values()), torch.float32)
    a = torch.full((slots, vocab, rank), stale, dtype=dtype, device=device)
    b = torch.full((slots, width, rank), stale, dtype=dtype, device=device)
    stack = EmbeddingStack(a, b)
    for slot, (lora,) in adapters.items():
        found = lora.a.shape[0]
        a[slot, :, :found] = lora.a.t().to(device)
        b[slot, :, :found] = lora.b.to(device)
        stack.describe(slot, _meta([lora]))
    return stack


def _meta(loras: Sequence[Lora]) -> SlotMeta:
    return SlotMeta(tuple(lora.a.shape[0] for lora in loras), tuple(lora.scaling for lora in loras))
