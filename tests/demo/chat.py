"""One question to several models at once, streamed through the openai client."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from openai import AsyncOpenAI

MAX_TOKENS = 48


@dataclass
class ChatAnswer:
    """An answer that grows while it streams.

    Attributes:
        first_s: time from the request to the first token.
        last_s: time from the request to the newest token.
        finish_reason: None while it streams.
        right: how many of its leading tokens equal the reference's; None until they are compared.
    """

    model: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    first_s: float | None = None
    last_s: float = 0.0
    finish_reason: str | None = None
    right: int | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first token; None for fewer than two tokens."""
        if self.first_s is None or len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / max(self.last_s - self.first_s, 1e-9)


async def stream_all(url: str, answers: Sequence[ChatAnswer], question: str) -> None:
    """Ask all models at the same time, so that one batch mixes their answers. Fills `answers` as tokens arrive."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    async with client, asyncio.TaskGroup() as group:
        for answer in answers:
            group.create_task(_stream(client, answer, question))


async def _stream(client: AsyncOpenAI, answer: ChatAnswer, question: str) -> None:
    started_s = time.perf_counter()
    stream = await client.chat.completions.create(
        model=answer.model, messages=[{"role": "user", "content": question}], stream=True, temperature=0,
        max_tokens=MAX_TOKENS, extra_body={"return_token_ids": True},
    )  # fmt: skip
    async for chunk in stream:
        for choice in chunk.choices:
            answer.text += choice.delta.content or ""
            answer.finish_reason = choice.finish_reason
            new = (choice.model_extra or {}).get("token_ids") or []
            if new:
                answer.last_s = time.perf_counter() - started_s
                answer.first_s = answer.first_s or answer.last_s
                answer.tokens += new
