"""The settings of a run that asks for text."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TextPlan:
    """What each request of `--task text` asks for.

    Raises:
        ValueError: A field is out of range. The message names the flag, the expected value and the actual one.
    """

    chat: bool = False  # /v1/chat/completions instead of /v1/completions
    stream: bool = True
    output_len: int = 128  # tokens
    output_range_ratio: float = 1.0  # of --output-len, as BenchPlan.range_ratio is of --input-len
    common_prompt_tokens: int = 0  # before the prompt of --input-len tokens, and equal in all requests
    ignore_eos: bool = False
    temperature: float = 0.0  # above 0, each request also has a seed
    continuous_usage: bool = False  # asks for token counts in every frame, which costs the client more CPU

    def __post_init__(self) -> None:
        if self.output_len < 1:
            raise ValueError(f"--output-len: expected at least 1, got {self.output_len}")
        if not 0 < self.output_range_ratio <= 1:
            raise ValueError(
                f"--output-range-ratio: expected a number above 0 and up to 1, got {self.output_range_ratio}"
            )
        if self.common_prompt_tokens < 0:
            raise ValueError(f"--common-prompt-tokens: expected at least 0, got {self.common_prompt_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature: expected at least 0, got {self.temperature}")
        if self.continuous_usage and not self.stream:
            raise ValueError("--continuous-usage: expected only without --no-stream")

    @property
    def endpoint(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"
