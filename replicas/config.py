"""The engine's settings, checked when they are made."""

from dataclasses import dataclass, field
from pathlib import Path

from ranklet.replicas.model.modules import LORA_MODULES

BACKENDS = ("auto", "fastest", "native", "csgmv", "merged")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine: one base model on one device.

    Raises:
        ValueError: a field is out of range; the message names it, what was expected and what came.
    """

    model_dir: Path
    device: str = "auto"  # "cuda" when there is one, else "cpu"
    dtype: str = "auto"  # bfloat16 on CUDA, float32 on the CPU
    slots: int = 8  # adapters resident on the device at once
    max_rank: int = 64  # rounded up to a multiple of 16
    lora_modules: tuple[str, ...] = LORA_MODULES  # what the slots have room for
    max_batch_tokens: int = 32_768
    max_batch_requests: int = 512
    max_adapters_per_batch: int | None = None  # None: as many as there are slots
    max_model_len: int | None = None  # None: what the model says, at most max_batch_tokens
    max_waiting_tokens: int = 4_000_000  # beyond it requests are refused with 503
    host_cache_bytes: int = 4 << 30
    load_timeout_s: float = 8.0  # requests wait so long for an adapter on its way; then they are told to come back
    merged_bytes: int = 0  # device memory for merged weights of adapters that dominate traffic
    backend: str = "auto"  # of LoRA; "fastest" may give up a little accuracy for speed, see kernels/dispatch.py
    base_aliases: tuple[str, ...] = field(default=())  # names (fnmatch patterns) adapters may call this base by

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_dir", Path(self.model_dir))
        for name in ("slots", "max_rank", "max_batch_tokens", "max_batch_requests", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("max_adapters_per_batch", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1 or null, got {value}")
        if self.max_model_len is not None and self.max_model_len > self.max_batch_tokens:
            raise ValueError(
                f"max_model_len: expected at most max_batch_tokens ({self.max_batch_tokens}), since a prompt runs in "
                f"one batch; got {self.max_model_len}. Raise max_batch_tokens or lower max_model_len"
            )
        if not self.load_timeout_s > 0:
            raise ValueError(f"load_timeout_s: expected more than 0, got {self.load_timeout_s}")
        for name in ("host_cache_bytes", "merged_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        unknown = [name for name in self.lora_modules if name not in LORA_MODULES]
        if unknown:
            raise ValueError(f"lora_modules: expected some of {', '.join(LORA_MODULES)}, got {', '.join(unknown)}")

    @property
    def adapters_per_batch(self) -> int:
        """The most adapters one batch may mix."""
        return min(self.slots, self.max_adapters_per_batch or self.slots)
