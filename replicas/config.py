"""Settings of an engine."""

from dataclasses import dataclass
from math import inf
from pathlib import Path

from ranklet.replicas.model.modules import ALL_MODULES, LORA_MODULES

BACKENDS = ("auto", "fastest", "native", "csgmv", "merged")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_TOKEN_ROWS = 8192
DEFAULT_ADDED_TOKENS = 256


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine, which serves one base model on one device.

    Raises:
        ValueError: a field is out of range; the message names the field, the expected range and the given value.
    """

    # Folder of the base model.
    model_dir: Path
    # "auto" is CUDA if available, else the CPU.
    device: str = "auto"
    # "auto" is bfloat16 on CUDA and float32 on the CPU.
    dtype: str = "auto"
    # Number of adapters held on the device at the same time.
    slots: int = 8
    # The largest LoRA rank that is served, rounded up to a multiple of 16.
    max_rank: int = 64
    # Modules that the slots reserve memory for; adapters of other modules are refused. `lm_head` is not among the
    # default ones: each slot reserves max_rank times the vocabulary for it.
    lora_modules: tuple[str, ...] = LORA_MODULES
    # Rows of token embeddings and heads, of all slots together, that adapters may have of their own: for trained or new
    # tokens, or whole matrices. Device memory for them is taken once an adapter needs it. 0 refuses such adapters.
    token_rows: int = DEFAULT_TOKEN_ROWS
    # Number of token ids beyond the base model's that adapters may have, in texts and prompts for them.
    added_tokens: int = DEFAULT_ADDED_TOKENS
    # Largest number of tokens in one batch.
    max_batch_tokens: int = 32_768
    # Largest number of prompts in one batch, and of texts that are generated at the same time.
    max_batch_requests: int = 512
    # Largest number of adapters in one batch; None for the number of slots.
    max_adapters_per_batch: int | None = None
    # Largest number of tokens in a prompt, generated text included; None for the model's own limit, or what
    # kv_cache_bytes holds. Embeddings have at most max_batch_tokens, unless the engine generates text and pools the
    # last token: then it computes their prompts in pieces, like those of texts.
    max_model_len: int | None = None
    # Largest number of tokens that wait for a batch; further requests are refused with 503.
    max_waiting_tokens: int = 4_000_000
    # Longest time that a request may be expected to wait for its first step; others are refused with 503. None for
    # limits.request_timeout_s of the gateways, or no limit in an engine without gateways.
    max_wait_s: float | None = None
    # Host memory that caches adapters, so that they load into a slot without reading files.
    host_cache_bytes: int = 4 << 30
    # Time after which a request whose adapter is still loading is refused with 503 and Retry-After.
    load_timeout_s: float = 8.0
    # Share of the GPU memory left beside weights, slots, steps and graphs that the KV cache takes, for models that
    # generate text.
    kv_cache_fraction: float = 0.9
    # Size of the KV cache in bytes, instead of kv_cache_fraction; 0 serves embeddings only. None serves embeddings only
    # if the folder has the modules.json of an embedding model. Else, on the CPU, None is 256 MiB, or one prompt of
    # max_model_len if that is more.
    kv_cache_bytes: int | None = None
    # Whether texts share the keys and values of equal beginnings of prompts, within one adapter revision.
    prefix_cache: bool = True
    # Factor by which prompts may lengthen a step of running texts, as estimated from the model's dimensions. Steps
    # beside few texts, and those that start many texts at once, may take longer.
    decode_slowdown: float = 1.8
    # Device memory for merged weights of the most requested adapters.
    merged_bytes: int = 0
    # LoRA backend; "fastest" may give up a little accuracy for speed (see kernels/dispatch.py).
    backend: str = "auto"
    # Whether steps are padded without CUDA graphs too. A CPU then computes the steps of a GPU, which helps to find the
    # cause of a wrong answer.
    padded_steps: bool = False
    # fnmatch patterns of the names that adapters may give as their base model.
    base_aliases: tuple[str, ...] = ()
    # Folders that links in an adapter's folder may lead to, besides that folder.
    adapter_roots: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_dir", Path(self.model_dir))
        for name in ("slots", "max_rank", "max_batch_tokens", "max_batch_requests", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("max_adapters_per_batch", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1 or null, got {value}")
        if not 1 <= self.decode_slowdown < inf:
            raise ValueError(f"decode_slowdown: expected at least 1, got {self.decode_slowdown}")
        if self.max_wait_s is not None and not self.max_wait_s > 0:
            raise ValueError(f"max_wait_s: expected more than 0 or null, got {self.max_wait_s}")
        if not self.load_timeout_s > 0:
            raise ValueError(f"load_timeout_s: expected more than 0, got {self.load_timeout_s}")
        if not 0 < self.kv_cache_fraction <= 0.98:
            raise ValueError(f"kv_cache_fraction: expected more than 0 and at most 0.98, got {self.kv_cache_fraction}")
        if self.kv_cache_bytes is not None and self.kv_cache_bytes < 0:
            raise ValueError(f"kv_cache_bytes: expected at least 0 or null, got {self.kv_cache_bytes}")
        for name in ("host_cache_bytes", "merged_bytes", "token_rows", "added_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        unknown = [name for name in self.lora_modules if name not in ALL_MODULES]
        if unknown:
            raise ValueError(f"lora_modules: expected some of {', '.join(ALL_MODULES)}, got {', '.join(unknown)}")

    @property
    def adapters_per_batch(self) -> int:
        return min(self.slots, self.max_adapters_per_batch or self.slots)
