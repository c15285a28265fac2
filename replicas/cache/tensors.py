"""The key-value cache's pages on the device, and how many of them fit."""

import torch
from torch import Tensor

from ranklet.kernels.paged_spans import LayerPages
from ranklet.replicas.cache.pages import PAGE_TOKENS, pages_of
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.architecture import Architecture

_CPU_BYTES = 256 << 20


class KvPages:
    """Keys and values of all layers. Keys are stored after norm and rotation.

    The memory is not initialised: a page is read only where a sequence has written.

    Attributes:
        pages: [layers, 2, pages, G, 64, D]; the second axis is keys and values, G is the number of key heads.
    """

    def __init__(self, architecture: Architecture, pages: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (architecture.layers, 2, pages, architecture.kv_heads, PAGE_TOKENS, architecture.head_dim)
        self.pages: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self._layers = [LayerPages(*layer) for layer in self.pages]

    def layer(self, index: int) -> LayerPages:
        return self._layers[index]

    @property
    def count(self) -> int:
        return self.pages.shape[2]

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes


def page_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Return the size of one page in all layers."""
    return 2 * architecture.layers * architecture.kv_heads * PAGE_TOKENS * architecture.head_dim * dtype.itemsize


def pages_that_fit(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, config: EngineConfig, max_model_len: int,
    reserve_bytes: int = 0, row_bytes: int = 0,
) -> int:  # fmt: skip
    """Return how many pages the engine can have.

    On CUDA this measures the free memory, so it must be called after weights, slots and tables exist. The pages get
    `kv_cache_fraction` of what is free beside the reserve and the rows of tokens. Without `kv_cache_bytes` a CPU gets
    256 MiB or, if that is more, space for one prompt of `max_model_len` tokens. The operating system provides this
    memory only as far as it is written.

    Args:
        reserve_bytes: device memory that steps and graphs need besides. Ignored if `kv_cache_bytes` is set.
        row_bytes: device memory of the tokens' own rows, which is taken once an adapter needs it.

    Raises:
        ModelError: not even one prompt of `max_model_len` tokens fits, or `kv_cache_bytes` are not free.
    """
    each = page_bytes(architecture, dtype)
    least = pages_of(max_model_len)
    free = _free_bytes(device)
    free = None if free is None else max(free - row_bytes, 0)
    if config.kv_cache_bytes is not None:
        budget, setting = config.kv_cache_bytes, "kv_cache_bytes"
        remedy = "Raise kv_cache_bytes or lower max_model_len"
        if free is not None and budget > free:
            raise ModelError(
                f"kv_cache_bytes: expected at most {free}, the free bytes of the device beside weights, slots and "
                f"rows of tokens, got {budget}. Lower kv_cache_bytes, slots or token_rows"
            )
    elif free is not None:
        budget, setting = int(max(free - reserve_bytes, 0) * config.kv_cache_fraction), "device memory for the KV cache"
        remedy = (
            f"Of {free} free bytes, steps and graphs need {reserve_bytes}. Lower max_model_len, slots, token_rows, "
            "max_batch_tokens or max_batch_requests, or raise kv_cache_fraction"
        )
    else:
        budget, setting, remedy = max(_CPU_BYTES, least * each), "", ""
    if budget // each < least:
        raise ModelError(
            f"{setting}: expected at least {least * each} bytes ({least} pages of {each} bytes) for one prompt of "
            f"max_model_len ({max_model_len}) tokens, got {budget}. {remedy}"
        )
    return budget // each


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # what torch keeps for later allocations is free
    free, _ = torch.cuda.mem_get_info(device)
    return free
