"""The settings of one benchmark run, checked before anything is sent."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from ranklet.cluster.command.bench.text_plan import TextPlan
from ranklet.kernels.mixes import MIXES, exponent


def cpu_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes() -> int:
    return max(1, min(8, cpu_cores() // 4))


@dataclass(frozen=True)
class BenchPlan:
    """One run against one server with OpenAI's API for embeddings or text.

    Raises:
        ValueError: A field is out of range. The message names the flag, the expected value and the actual one.
    """

    base_url: str = "http://127.0.0.1:8000"
    text: TextPlan | None = None  # None: embeddings
    endpoint: str | None = None  # None: the path of the task in OpenAI's API
    api_key: str = field(default="", repr=False)
    model: str | None = None  # name of the base model; None: the server's first model without a parent
    adapters: tuple[str, ...] = ()  # names, or patterns of names in /v1/models; empty: only the base model
    adapter_as: str = "model"  # field that names the adapter; "lora_path" for SGLang
    adapter_distribution: str = "uniform"
    dataset: str = "random"
    path: Path | None = None  # for dataset "file": one text per line, or JSON lines with "text" or "input", and "model"
    input_len: int = 512  # tokens
    range_ratio: float = 1.0  # lengths are uniform in [range_ratio * input_len, input_len], as in SGLang's benchmark
    length_distribution: str = "uniform"
    vocab: int = 10_000  # upper bound of random token ids
    as_text: bool = False  # random words instead of token ids, so that the server tokenizes
    num_prompts: int = 1000
    batch_size: int = 1  # prompts per request
    request_rate: float = math.inf  # requests per second, Poisson; infinite: all at once
    max_concurrency: int | None = None
    encoding_format: str = "base64"
    seed: int = 0
    warmup: int = 8  # requests before the measurement, to each adapter in turn; the values of their answers are checked
    timeout_s: float = 300.0
    processes: int = field(default_factory=_processes)  # fewer if there are fewer requests, or concurrency is lower

    def __post_init__(self) -> None:
        for name in ("input_len", "vocab", "num_prompts", "batch_size", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)}: expected at least 1, got {getattr(self, name)}")
        for name in ("warmup", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag_name(name)}: expected at least 0, got {getattr(self, name)}")
        if not 0 < self.range_ratio <= 1:
            raise ValueError(f"--range-ratio: expected a number above 0 and up to 1, got {self.range_ratio}")
        if not self.request_rate > 0:
            raise ValueError(f"--request-rate: expected more than 0 requests a second, or inf; got {self.request_rate}")
        if not self.timeout_s > 0:
            raise ValueError(f"--timeout-s: expected more than 0 seconds, got {self.timeout_s}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"--max-concurrency: expected at least 1, got {self.max_concurrency}")
        for name, known in (
            ("dataset", ("random", "file")), ("adapter_as", ("model", "lora_path")),
            ("encoding_format", ("base64", "float")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{flag_name(name)}: expected {' or '.join(known)}, got {getattr(self, name)!r}")
        if self.text and self.batch_size > 1:
            raise ValueError(f"--batch-size: expected 1 with --task text, got {self.batch_size}")
        if self.length_distribution != "uniform":
            lognormal_sigma(self.length_distribution)
            if self.range_ratio == 1 and (self.text is None or self.text.output_range_ratio == 1):
                raise ValueError("--length-distribution lognormal: expected a range ratio below 1, got 1.0")
        if (self.dataset == "file") != (self.path is not None):
            raise ValueError("--dataset file: expected --path FILE with it, and --path only with it")
        if self.adapter_distribution not in MIXES:
            try:
                exponent(self.adapter_distribution)
            except ValueError as error:
                raise ValueError(f"--adapter-distribution: {error}") from None
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"--base-url: expected http://... or https://..., got {self.base_url!r}")

    @property
    def url(self) -> str:
        path = self.endpoint or (self.text.endpoint if self.text else "/v1/embeddings")
        return self.base_url.rstrip("/") + "/" + path.lstrip("/")


def lognormal_sigma(distribution: str) -> float:
    """Return SIGMA of "lognormal:SIGMA".

    Raises:
        ValueError: The distribution is another one, or SIGMA is not a finite number above 0.
    """
    name, _, sigma = distribution.partition(":")
    try:
        found = float(sigma) if name == "lognormal" else 0.0
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise ValueError(
            f"--length-distribution: expected uniform or lognormal:SIGMA (such as lognormal:0.8), got {distribution!r}"
        )
    return found


def flag_name(field: str) -> str:
    return "--vocab-size" if field == "vocab" else "--" + field.replace("_", "-")
